"""Whether a URL leads to the server, user and settings that it names."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError

from sheppy_sql._dialects.postgresql import PostgreSQL
from sheppy_sql._urls import parse
from tests.support.postgres import PostgresServer
from tests.support.urls import engine_of
from tests.support.urls import no_defaults as no_defaults

pytestmark = pytest.mark.usefixtures("no_defaults")

PASSWORD = "p@ss/w:rd?#%25 +é&=;"

StartServer = Callable[..., PostgresServer]


async def fetch(url: str | URL, sql: str) -> Any:
    async with engine_of(url).connect() as connection:
        return await connection.scalar(text(sql))


async def test_a_password_of_special_characters_is_accepted(private_server: StartServer) -> None:
    server = private_server(password=PASSWORD)
    where = f"127.0.0.1:{server.port}/postgres"
    for escaped in (quote(PASSWORD, safe=""), quote(PASSWORD, safe=" +:&=;")):
        assert await fetch(f"postgres://postgres:{escaped}@{where}\n", "SELECT 1") == 1
    password = quote(PASSWORD, safe="")
    assert await fetch(f"postgresql://{where}?user=postgres&password={password}", "SELECT 1") == 1
    as_object = URL.create("postgresql", "postgres", PASSWORD, "127.0.0.1", server.port, "postgres")
    assert await fetch(as_object, "SELECT 1") == 1
    with pytest.raises((DBAPIError, asyncpg.InvalidPasswordError), match="password auth"):
        await fetch(f"postgresql://postgres:wrong@{where}", "SELECT 1")


async def test_a_password_is_found_in_a_file(private_server: StartServer, tmp_path: Path) -> None:
    server = private_server(password="plain")
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"127.0.0.1:{server.port}:*:postgres:plain\n")
    passfile.chmod(0o600)
    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres?passfile={passfile}"
    assert await fetch(url, "SELECT 1") == 1


async def test_names_of_special_characters_reach_the_server(private_server: StartServer) -> None:
    server = private_server()
    base = f"postgresql://postgres@127.0.0.1:{server.port}"
    engine = engine_of(f"{base}/postgres").execution_options(isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text('CREATE DATABASE "a b/c%é"'))
        await connection.execute(text('CREATE ROLE "ann@example.com" LOGIN'))
    database = quote("a b/c%é", safe="")
    assert await fetch(f"{base}/{database}", "SELECT current_database()") == "a b/c%é"
    assert await fetch(f"{base}?dbname={database}", "SELECT current_database()") == "a b/c%é"
    ann = f"postgresql://ann%40example.com@127.0.0.1:{server.port}/postgres"
    assert await fetch(ann, "SELECT current_user") == "ann@example.com"


async def test_the_database_is_by_default_named_as_the_user(private_server: StartServer) -> None:
    server = private_server()
    url = f"postgresql://postgres@127.0.0.1:{server.port}"
    assert await fetch(url, "SELECT current_database()") == "postgres"


@pytest.mark.posix
async def test_a_socket_is_reached_by_its_directory(private_server: StartServer) -> None:
    server = private_server(hba="local all all trust\n", start=False)
    directory = server.data_dir
    with (directory / "postgresql.conf").open("a", encoding="utf-8") as conf:
        conf.write(f"unix_socket_directories = '{directory}'\n")
    server.start()
    over_a_socket = "SELECT inet_server_addr() IS NULL"
    for url in (
        f"postgresql://postgres@:{server.port}/postgres?host={directory}",
        f"postgresql://postgres@/postgres?host={directory}&port={server.port}",
        f"postgresql://postgres@ignored/postgres?host={directory}&port={server.port}",
        f"postgresql://postgres@{quote(str(directory), safe='')}:{server.port}/postgres",
        f"postgresql:///?host={directory}&port={server.port}&user=postgres&sslmode=require",
    ):
        assert await fetch(url, over_a_socket), url


async def test_the_next_host_is_tried_when_one_is_down(private_server: StartServer) -> None:
    server = private_server()
    # Bound and not listening: nobody else gets the port, and a connection is refused.
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = nobody.getsockname()[1]
        for url in (
            f"postgresql://postgres@127.0.0.1:{closed},127.0.0.1:{server.port}/postgres",
            f"postgresql://postgres@/?host=127.0.0.1,127.0.0.1&port={closed},{server.port}",
            f"postgresql://postgres@/?host=127.0.0.1:{closed}&host=127.0.0.1:{server.port}",
            f"postgresql://postgres@[::1]:{closed},127.0.0.1:{server.port}/postgres",
        ):
            assert await fetch(url, "SELECT inet_server_port()") == server.port, url


async def test_the_primary_is_found_among_several_hosts(private_server: StartServer) -> None:
    primary = private_server()
    standby = primary.make_standby()
    hosts = f"127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
    for wanted, port in (
        ("any", standby.port),
        ("read-write", primary.port),
        ("primary", primary.port),
        ("standby", standby.port),
    ):
        url = f"postgresql://postgres@{hosts}/postgres?target_session_attrs={wanted}"
        assert await fetch(url, "SELECT inet_server_port()") == port, wanted


async def test_settings_in_the_url_hold_for_the_session(private_server: StartServer) -> None:
    server = private_server()
    options = quote(r'-c search_path="my\ schema" --statement-timeout=7s -c app.name=a\\b=c')
    query = f"application_name=my%20app&options={options}&connect_timeout=0"
    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres?{query}"
    for setting, value in (
        ("application_name", "my app"),
        ("search_path", '"my schema"'),
        ("statement_timeout", "7s"),
        ("app.name", r"a\b=c"),
    ):
        assert await fetch(url, f"SELECT current_setting('{setting}')") == value


async def test_every_size_and_limit_is_known_to_the_driver(private_server: StartServer) -> None:
    server = private_server()
    query = (
        "prepared_statement_cache_size=0&statement_cache_size=0&max_cached_statement_lifetime=0"
        "&max_cacheable_statement_size=0&command_timeout=30&connect_timeout=30"
        "&channel_binding=prefer&gssencmode=disable&client_encoding=UTF8&keepalives=0"
    )
    url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres?{query}"
    assert await fetch(url, "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql") <= 1


async def test_a_server_that_does_not_answer_is_given_up_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with pytest.raises(asyncio.TimeoutError):
            await fetch(f"postgresql://postgres@127.0.0.1:{port}?connect_timeout=0.2", "SELECT 1")


@pytest.mark.parametrize("query", ["", "?statement_cache_size=50"])
async def test_a_direct_connection_keeps_statements(
    private_server: StartServer, query: str
) -> None:
    dialect = PostgreSQL()
    target = parse(f"{private_server().url()}{query}")
    engine = dialect.create_engine(target, pool_size=1, connect_timeout=10)
    prepared = text("SELECT name FROM pg_prepared_statements WHERE strpos(statement, 'mine') > 0")
    names = []
    for _ in range(2):
        async with engine.connect() as connection:
            await connection.run_sync(dialect.begin, write=False)
            names.append((await connection.scalars(prepared)).all())
    await engine.dispose()
    assert len(names[0]) == 1
    assert names[0] == names[1]


async def test_reads_of_an_engine_with_a_direct_connection_need_no_transaction(
    private_server: StartServer,
) -> None:
    dialect = PostgreSQL()
    levels = []
    for _ in range(2):
        async with engine_of(private_server().url()).connect() as connection:
            await connection.run_sync(dialect.begin, write=False)
            await connection.run_sync(dialect.check_server)
            assert connection.sync_connection is not None
            options = connection.sync_connection.get_execution_options()
            levels.append(options["isolation_level"])
    assert levels == ["READ COMMITTED", "AUTOCOMMIT"]
