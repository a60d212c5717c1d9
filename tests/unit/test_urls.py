from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import OperationalError

from sheppy_sql._urls import Target, parse, redact
from tests.support.urls import SECRET, driver_arguments, engine_of, refusal
from tests.support.urls import no_defaults as no_defaults

PUBLIC = "postgresql://h/db"
pytestmark = pytest.mark.usefixtures("no_defaults")


@pytest.mark.parametrize(
    "scheme", ["postgres", "postgresql", "postgresql+asyncpg", "POSTGRES", "PostgreSQL+AsyncPG"]
)
def test_every_name_of_postgresql_means_asyncpg(scheme: str) -> None:
    url = f"{scheme}://ann:{SECRET}@db.example:5433/app"
    assert parse(url) == Target(
        URL.create("postgresql+asyncpg", "ann", SECRET, "db.example", 5433, "app")
    )
    as_object = URL.create(scheme, "ann", SECRET, "db.example", 5433, "app")
    assert parse(as_object) == parse(url)


@pytest.mark.parametrize(
    ("url", "database"),
    [
        ("sqlite://", None),
        ("sqlite:///:memory:", ":memory:"),
        ("sqlite:///dev.db", "dev.db"),
        ("SQLite:///dev.db", "dev.db"),
        ("sqlite:////var/lib/app.db", "/var/lib/app.db"),
        ("sqlite:////home/ann@work/app.db", "/home/ann@work/app.db"),
        ("sqlite+aiosqlite:///C:/data/app.db", "C:/data/app.db"),
        ("sqlite+aiosqlite://", None),
    ],
)
def test_every_name_of_sqlite_means_aiosqlite(url: str, database: str | None) -> None:
    assert parse(url) == Target(URL.create("sqlite+aiosqlite", database=database))
    assert parse(make_url(url)) == parse(url)


@pytest.mark.parametrize(
    "url", [f" {PUBLIC} ", f"{PUBLIC}\n", f"\t{PUBLIC}\r\n", "\nsqlite:///x.db\n"]
)
def test_space_around_a_url_is_ignored(url: str) -> None:
    assert parse(url) == parse(url.strip())


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg2://ann:{SECRET}@h/db",
        f"postgresql+psycopg://ann:{SECRET}@h/db",
        f"mysql://ann:{SECRET}@h/db",
        f"mysql+aiomysql://ann:{SECRET}@h/db",
        f"mssql+pyodbc://ann:{SECRET}@h/db",
        f"redis://:{SECRET}@h",
        "sqlite+pysqlite:///x.db",
        URL.create("mysql", "ann", SECRET, "h"),
        URL.create("sqlite+pysqlite", database="x.db"),
        "",
        " \n",
        SECRET,
        "not a url",
        f"host=h user=ann password={SECRET}",
        f"psql 'postgresql://ann:{SECRET}@h/db'",
        f"jdbc:postgresql://ann:{SECRET}@h/db",
        "sqlite:x.db",
        "/tmp/x.db",
        "://",
        None,
        f"postgresql://ann:{SECRET}@h/db".encode(),
        5432,
        Path("x.db"),
        ["sqlite://"],
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(url: Any) -> None:
    message = refusal(url)
    assert "accepted are postgresql://" in message
    assert "sqlite:///file.db" in message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://", {}),
        ("postgresql:///", {}),
        ("postgresql://h", {"host": "h"}),
        ("postgresql://h/", {"host": "h"}),
        ("postgresql://h:/db", {"host": "h", "database": "db"}),
        ("postgresql://:5433/db", {"port": 5433, "database": "db"}),
        ("postgresql://ann@h", {"user": "ann", "host": "h"}),
        ("postgresql://ann@/db", {"user": "ann", "database": "db"}),
        ("postgresql://ann:@h", {"user": "ann", "host": "h"}),
        ("postgresql://@h", {"host": "h"}),
        ("postgresql://:pw@h", {"password": "pw", "host": "h"}),
        (
            "postgresql://a%40b:p%40%3A%2F%3F%23%25+%20%C3%A9@h/my%20%2Fdb%3F",
            {"user": "a@b", "password": "p@:/?#%+ é", "host": "h", "database": "my /db?"},
        ),
        (
            "postgresql://ann:p:#[]&=+$;'\"!*()%zz@h",
            {"user": "ann", "password": "p:#[]&=+$;'\"!*()%zz", "host": "h"},
        ),
        ("postgresql://[::1]:5433/db", {"host": "::1", "port": 5433, "database": "db"}),
        ("postgresql://[fe80::1%25eth0]", {"host": "fe80::1%eth0"}),
        (
            "postgresql://%2Fvar%2Frun%2Fpostgresql/db",
            {"host": "/var/run/postgresql", "database": "db"},
        ),
        (
            "postgresql://ann@%2Ftmp:5433/db",
            {"user": "ann", "host": "/tmp", "port": 5433, "database": "db"},
        ),
        (
            "postgresql:///db?host=/var/run/postgresql",
            {"host": "/var/run/postgresql", "database": "db"},
        ),
        (
            "postgresql:///db?host=/cloudsql/p:r:5433",
            {"host": "/cloudsql/p:r:5433", "database": "db"},
        ),
        (
            "postgresql://localhost/db?host=/cloudsql/p:r:i",
            {"host": "/cloudsql/p:r:i", "database": "db"},
        ),
        ("postgresql://:5433/db?host=/tmp", {"host": "/tmp", "port": 5433, "database": "db"}),
        ("postgresql:///?host=::1&port=5433", {"host": "::1", "port": 5433}),
        ("postgresql:///?host=[::1]:5433", {"host": "::1", "port": 5433}),
        ("postgresql:///?host=h:5433", {"host": "h", "port": 5433}),
        ("postgresql://h:5433?port=5434", {"host": "h", "port": 5434}),
        ("postgresql://h:5433?host=i", {"host": "i", "port": 5433}),
        (
            "postgresql://?user=me@srv&password=p%26w&dbname=app&host=h&port=5433",
            {"user": "me@srv", "password": "p&w", "database": "app", "host": "h", "port": 5433},
        ),
        (
            "postgresql://ann:x@h/db?user=bob&password=y&database=c",
            {"user": "bob", "password": "y", "host": "h", "database": "c"},
        ),
        (
            "postgresql://h1:5432,h2:5433/db",
            {"host": ["h1", "h2"], "port": [5432, 5433], "database": "db"},
        ),
        ("postgresql://ann:pw@h1,h2", {"user": "ann", "password": "pw", "host": ["h1", "h2"]}),
        ("postgresql://[::1]:5432,[::2]:5433", {"host": ["::1", "::2"], "port": [5432, 5433]}),
        ("postgresql:///?host=h1,h2&port=5432,5433", {"host": ["h1", "h2"], "port": [5432, 5433]}),
        ("postgresql:///?host=h1,h2&port=5433", {"host": ["h1", "h2"], "port": [5433, 5433]}),
        ("postgresql:///?host=h1:5432&host=h2:5433", {"host": ["h1", "h2"], "port": [5432, 5433]}),
        ("postgresql:///?host=/tmp,::1&port=5433", {"host": ["/tmp", "::1"], "port": [5433, 5433]}),
    ],
)
def test_the_driver_gets_the_address(url: str, expected: dict[str, Any]) -> None:
    assert driver_arguments(parse(url)) == expected


def test_a_url_object_is_taken_literally() -> None:
    url = URL.create("postgresql", "a%40", "p%40 /", "::1", 5433, "d%40", {"sslmode": "disable"})
    assert driver_arguments(parse(url)) == {
        "user": "a%40",
        "password": "p%40 /",
        "host": "::1",
        "port": 5433,
        "database": "d%40",
        "ssl": "disable",
    }
    assert driver_arguments(parse(URL.create("postgresql", host="/var/run:1", port=5433))) == {
        "host": "/var/run:1",
        "port": 5433,
    }


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"postgresql://ann:a@{SECRET}@h/db", "cannot be told apart"),
        (f"postgresql://ann:a/{SECRET}@h/db", "cannot be told apart"),
        (f"postgresql://ann:1/{SECRET}@h/db", "cannot be told apart"),
        (f"postgresql://ann:1?{SECRET}=@h/db", "cannot be told apart"),
        (f"postgresql://ann:a@1/{SECRET}@h/db", "cannot be told apart"),
        (f"postgresql://h/db&password={SECRET}", "cannot be told apart"),
        ("postgresql://h/d%00b", "control characters"),
        ("postgresql://h/d\0b", "control characters"),
        (f"postgresql://h/db\nPASSWORD={SECRET}", "control characters"),
        (f"postgresql://ann:%ff{SECRET}@h/db", "not UTF-8"),
        (f"postgresql://h:{SECRET}/db", "the port is not a number"),
        ("postgresql://h:0/db", "the port is not a number"),
        ("postgresql://h:65536/db", "the port is not a number"),
        ("postgresql://h:-1/db", "the port is not a number"),
        ("postgresql://h/db?port=x", "the port is not a number"),
        ("postgresql://::1:5432/db", "IPv6"),
        ("postgresql://[::1/db", "the host cannot be read"),
        ("postgresql://h x/db", "the host cannot be read"),
        ("postgresql://h1,,h2/db", "a host in the list is empty"),
        ("postgresql://h1:5432,h2/db", "only some of the hosts have a port"),
        ("postgresql:///?host=h1,h2&port=1,2,3", "as many entries"),
        ("postgresql://h/db?port=1,2", "as many entries"),
        ("postgresql:///?host=h1:1&host=h2:2&port=3", "ports stand both in host and in port"),
    ],
)
def test_an_address_with_more_than_one_reading_is_refused(url: str, reason: str) -> None:
    assert reason in refusal(url)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("sslmode=", "'sslmode' is empty"),
        ("sslmode", "must be name=value"),
        (f"password={SECRET}&sslmode", "must be name=value"),
        (f"application_name=%ff{SECRET}", "UTF-8"),
    ],
)
def test_a_malformed_parameter_is_refused(query: str, reason: str) -> None:
    assert reason in refusal(f"{PUBLIC}?{query}")
    assert reason in refusal(f"sqlite:///x.db?{query}")


@pytest.mark.parametrize(
    ("url", "connect_args"),
    [
        ("sqlite:///x.db?timeout=1.5", {"timeout": 1.5}),
        (
            "sqlite:///x.db?cached_statements=5&check_same_thread=false",
            {"cached_statements": 5, "check_same_thread": False},
        ),
        ("sqlite:///file:x.db?mode=ro&uri=true", {"uri": True}),
        ("sqlite:///file::memory:?cache=shared&uri=1", {"uri": True}),
    ],
)
def test_parameters_of_sqlite_are_those_of_sqlalchemy(
    url: str, connect_args: dict[str, Any]
) -> None:
    target = parse(url)
    assert target.connect_args == connect_args
    assert target.url == make_url(url).set(drivername="sqlite+aiosqlite")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite://x.db", "sqlite:///relative.db"),
        (f"sqlite://ann:{SECRET}@h/x.db", "sqlite:///relative.db"),
        ("sqlite://h:port/x.db", "cannot be told apart"),
        ("sqlite:///x.db?mode=ro", "'mode' is not a known parameter"),
        ("sqlite:///x.db?mode=ro&uri=true", "sqlite:///file:PATH?uri=true"),
        ("sqlite:///file:x.db?mode=ro", "sqlite:///file:PATH?uri=true"),
        ("sqlite:///file:x.db?uri=perhaps", "uri must be"),
        (f"sqlite:///x.db?timeout={SECRET}", "timeout must be a number"),
        ("sqlite:///x.db?timeout=1&timeout=2", "'timeout' is given twice"),
        ("sqlite:///x.db?sslmode=require", "'sslmode' is not a known parameter"),
    ],
)
def test_a_sqlite_url_that_would_open_something_else_is_refused(url: str, reason: str) -> None:
    assert reason in refusal(url)


async def test_sqlite_opens_the_file_that_the_url_names(tmp_path: Path) -> None:
    await execute(f"sqlite:///{tmp_path}/my app.db", "CREATE TABLE t (x)")
    read_only = f"sqlite:///file:{tmp_path}/my app.db?mode=ro&uri=true"
    await execute(read_only, "SELECT * FROM t")
    with pytest.raises(OperationalError, match="readonly database"):
        await execute(read_only, "DROP TABLE t")
    assert [path.name for path in tmp_path.glob("*.db*")] == ["my app.db"]


async def execute(url: str, statement: str) -> None:
    async with engine_of(url).begin() as connection:
        await connection.execute(text(statement))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://ann:{SECRET}@h:5432/db", "postgresql://ann:***@h:5432/db"),
        (f" postgres://:{SECRET}@h \n", "postgres://:***@h"),
        ("postgresql+asyncpg://ann@h1:1,h2:2/db", "postgresql+asyncpg://ann@h1:1,h2:2/db"),
        (
            f"postgresql://ann:{SECRET}@[::1]/db?sslmode=require",
            "postgresql://ann:***@[::1]/db?sslmode=require",
        ),
        (
            f"postgresql:///?user=ann&password={SECRET}&host=h",
            "postgresql:///?user=ann&password=***&host=h",
        ),
        (f"postgresql:///?PASS%57ord={SECRET}&host=h", "postgresql:///?***&host=h"),
        (f"postgresql:///?password%3D{SECRET}", "postgresql:///?***"),
        (f"postgresql:///?sslmode=x;password={SECRET}", "postgresql:///?sslmode=x;password=***"),
        (
            f"postgresql:///?sslpassword={SECRET}&sslkey={SECRET}",
            "postgresql:///?sslpassword=***&sslkey=***",
        ),
        (f"postgresql:///?options=-c app.token={SECRET}", "postgresql:///?options=***"),
        (f"postgresql://h/db&password={SECRET}", "postgresql://h/db&password=***"),
        (f"postgresql://h password={SECRET}/db", "postgresql://***/db"),
        ("postgresql://auth.example/tokens", "postgresql://auth.example/tokens"),
        (f"mysql://ann:{SECRET}@h/db", "mysql://ann:***@h/db"),
        (
            "sqlite:////home/me@work/x.db?mode=ro&uri=true",
            "sqlite:////home/me@work/x.db?mode=ro&uri=true",
        ),
        (f"sqlite:///x.db?key={SECRET}", "sqlite:///x.db?key=***"),
        (f"postgresql://ann:a@{SECRET}@h/db", "***"),
        (f"postgresql://ann:a/{SECRET}@h/db", "***"),
        (f"postgresql://ann:a?{SECRET}@h/db", "***"),
        (f"postgresql://ann:{SECRET}\n@h/db", "***"),
        (f"host=h password={SECRET}", "***"),
        (SECRET, "***"),
        ("", "***"),
        (URL.create("postgresql", "ann", SECRET, "h"), "postgresql://ann:***@h"),
        (
            URL.create("postgresql", "ann", f"@/{SECRET}", "h", query={"password": SECRET}),
            "postgresql://ann:***@h?password=***",
        ),
        (None, "***"),
        (SECRET.encode(), "***"),
    ],
)
def test_a_redacted_url_shows_no_secret(url: Any, shown: str) -> None:
    assert redact(url) == shown


def test_a_target_does_not_show_the_password() -> None:
    target = parse(f"postgresql://ann:{SECRET}@h1:1,h2:2/db?connect_timeout=1")
    assert SECRET not in repr(target)
    assert SECRET not in str(target.url)
