from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from sqlalchemy.engine import URL, make_url

from sheppy_sql._urls import parse
from tests.support.urls import SECRET, refusal
from tests.support.urls import no_defaults as no_defaults

PUBLIC = "postgresql://h/db"
pytestmark = pytest.mark.usefixtures("no_defaults")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def root(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "root.crt"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sslmode=disable", {"ssl": "disable"}),
        ("sslmode=allow", {"ssl": "allow"}),
        ("sslmode=prefer", {"ssl": "prefer"}),
        ("ssl=prefer", {"ssl": "prefer"}),
        ("sslmode=disable&sslrootcert=/nowhere&sslkey=/nowhere", {"ssl": "disable"}),
        ("sslnegotiation=postgres", {"direct_tls": False}),
        ("application_name=my+app%21", {"server_settings": {"application_name": "my app!"}}),
        ("connect_timeout=10", {"timeout": 10.0}),
        ("connect_timeout=0", {"timeout": None}),
        ("connect_timeout=-1", {"timeout": None}),
        ("timeout=2.5", {"timeout": 2.5}),
        ("command_timeout=60", {"command_timeout": 60.0}),
        ("target_session_attrs=read-write", {"target_session_attrs": "read-write"}),
        ("target_session_attrs=prefer-standby", {"target_session_attrs": "prefer-standby"}),
        ("prepared_statement_cache_size=0", {"prepared_statement_cache_size": 0}),
        ("statement_cache_size=0", {"statement_cache_size": 0}),
        ("pgbouncer=true", {"statement_cache_size": 0}),
        ("max_cached_statement_lifetime=0", {"max_cached_statement_lifetime": 0}),
        ("max_cacheable_statement_size=1024", {"max_cacheable_statement_size": 1024}),
        ("channel_binding=disable", {}),
        ("channel_binding=prefer", {}),
        ("gssencmode=disable", {}),
        ("gssencmode=prefer", {}),
        ("client_encoding=UTF8", {}),
        ("client_encoding=utf-8", {}),
        ("client_encoding=auto", {}),
        ("keepalives=0", {}),
        ("load_balance_hosts=disable", {}),
        ("sslsni=1", {}),
        ("&", {}),
        (
            "connect_timeout=1&application_name=a&",
            {"timeout": 1.0, "server_settings": {"application_name": "a"}},
        ),
    ],
)
def test_a_parameter_is_translated_for_the_driver(query: str, expected: dict[str, Any]) -> None:
    assert parse(f"{PUBLIC}?{query}").connect_args == expected
    assert parse(f"{PUBLIC}?{query}").url == parse(PUBLIC).url
    assert parse(make_url(f"{PUBLIC}?{query}")).connect_args == expected


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("-c geqo=off", {"geqo": "off"}),
        ("-cgeqo=off", {"geqo": "off"}),
        ("--geqo=off", {"geqo": "off"}),
        ("--statement-timeout=5s", {"statement_timeout": "5s"}),
        (
            "-c search_path=a,b  --geqo=on\t-c work_mem=8MB",
            {"search_path": "a,b", "geqo": "on", "work_mem": "8MB"},
        ),
        (r"-c search_path=my\ schema,\\x", {"search_path": r"my schema,\x"}),
        ("-c app.tenant=a=b", {"app.tenant": "a=b"}),
        ("-c jit=", {"jit": ""}),
    ],
)
def test_options_become_settings_of_the_server(options: str, settings: dict[str, str]) -> None:
    url = URL.create("postgresql", host="h", query={"options": options})
    assert parse(url).connect_args == {"server_settings": settings}
    assert parse(url.render_as_string()).connect_args == {"server_settings": settings}


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (f"options=-d {SECRET}", "options must be written as -c name=value"),
        (f"options=endpoint={SECRET}", "options must be written as -c name=value"),
        ("options=-c", "options must be written as -c name=value"),
        ("options=-c geqo", "options must be written as -c name=value"),
        ("options=-c user=postgres", "options cannot set user"),
        ("options=--client-encoding=latin1", "options cannot set client_encoding"),
        (f"sslmode={SECRET}", "disable, allow, prefer, require, verify-ca or verify-full"),
        ("ssl=maybe", "disable, allow, prefer"),
        ("ssl=require&sslmode=require", "keep sslmode"),
        (f"target_session_attrs={SECRET}", "target_session_attrs must be any, primary"),
        (f"connect_timeout={SECRET}", "connect_timeout must be a number of seconds"),
        ("connect_timeout=nan", "connect_timeout must be a number of seconds"),
        ("connect_timeout=1&timeout=2", "timeout repeats another parameter"),
        (
            "prepared_statement_cache_size=-1",
            "prepared_statement_cache_size must be a whole number",
        ),
        ("statement_cache_size=1.5", "statement_cache_size must be a whole number"),
        (
            "channel_binding=require",
            "channel_binding cannot be honoured: asyncpg has no channel binding",
        ),
        ("gssencmode=require", "gssencmode cannot be honoured"),
        ("client_encoding=latin1", "client_encoding cannot be honoured: asyncpg speaks UTF-8 only"),
        ("keepalives=1", "keepalives cannot be honoured"),
        ("keepalives_idle=30", "tcp_keepalives_idle"),
        ("keepalives_interval=30", "tcp_keepalives_interval"),
        ("keepalives_count=3", "tcp_keepalives_count"),
        ("tcp_user_timeout=30", "-c%20tcp_user_timeout"),
        ("load_balance_hosts=random", "load_balance_hosts cannot be honoured"),
        ("service=mydb", "write host, user and database into the URL"),
        ("require_auth=scram-sha-256", "require_auth is not supported"),
        ("requirepeer=postgres", "requirepeer is not supported"),
        ("hostaddr=127.0.0.1", "use host"),
        ("sslcrldir=/etc", "use sslcrl"),
        ("replication=database", "replication is not supported"),
        ("schema=jobs", "give SqlBackend its schema argument"),
        ("pool_size=5", "pass that engine to SqlBackend"),
        ("max_overflow=5", "pass that engine to SqlBackend"),
        ("echo=true", "pass that engine to SqlBackend"),
        ("search_path=jobs", "'search_path' is not a known parameter"),
        ("pgbouncer=false", "pgbouncer must be true; leave it out where there is none"),
        ("pgbouncer=true&statement_cache_size=9", "repeats another parameter: keep one"),
        ("sslmod=require", "'sslmod' is not a known parameter"),
        ("sslmode=require&sslmode=require", "'sslmode' is given twice"),
        ("dbname=a&database=b", "'dbname' is given twice"),
        ("sslnegotiation=direct", "sslnegotiation=direct needs sslmode=require"),
        ("sslnegotiation=x", "sslnegotiation must be postgres or direct"),
        ("passfile=/nowhere", "passfile points to '/nowhere', and there is no such file"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused(parameter: str, reason: str) -> None:
    assert reason in refusal(f"postgresql://ann:{SECRET}@h/db?{parameter}")
    assert reason in refusal(make_url(f"postgresql://ann:{SECRET}@h/db?{parameter}"))


def test_a_passfile_goes_to_the_driver(tmp_path: Path) -> None:
    file = tmp_path / "pgpass"
    file.touch()
    assert parse(f"{PUBLIC}?passfile={file}").connect_args == {"passfile": str(file)}


def test_kerberos_goes_to_a_driver_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncpg, "connect", lambda krbsrvname: None)
    assert parse(f"{PUBLIC}?krbsrvname=pg").connect_args == {"krbsrvname": "pg"}
    monkeypatch.setattr(asyncpg, "connect", lambda host: None)
    assert "krbsrvname needs asyncpg 0.30 or newer" in refusal(f"{PUBLIC}?krbsrvname=pg")


def context_of(query: str) -> ssl.SSLContext:
    context = parse(f"{PUBLIC}?{query}").connect_args["ssl"]
    assert isinstance(context, ssl.SSLContext)
    return context


@pytest.mark.parametrize("query", ["sslmode=require", "ssl=require", "ssl=true"])
def test_require_without_a_root_certificate_verifies_nothing(query: str) -> None:
    context = context_of(query)
    assert context.verify_mode is ssl.CERT_NONE
    assert not context.check_hostname


@pytest.mark.parametrize(
    ("mode", "checks_hostname"),
    [("sslmode=require", False), ("sslmode=verify-ca", False), ("ssl=verify_full", True)],
)
def test_a_root_certificate_is_what_the_server_is_checked_against(
    root: Path, mode: str, checks_hostname: bool
) -> None:
    context = context_of(f"{mode}&sslrootcert={root}")
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname is checks_hostname
    assert len(context.get_ca_certs()) == 1
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_variables_and_home_directory_give_what_the_url_does_not(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path.home() / ".postgresql"
    home.mkdir()
    root.rename(home / "root.crt")
    assert context_of("sslmode=verify-full").get_ca_certs()
    assert context_of("sslmode=require").verify_mode is ssl.CERT_REQUIRED
    elsewhere = (home / "root.crt").rename(root)
    monkeypatch.setenv("PGSSLROOTCERT", str(elsewhere))
    assert context_of("sslmode=verify-full").get_ca_certs()
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    assert context_of("application_name=x").check_hostname
    assert parse(f"{PUBLIC}?sslmode=disable").connect_args == {"ssl": "disable"}
    monkeypatch.setenv("PGSSLMODE", "never")
    assert "PGSSLMODE" in refusal(PUBLIC)


def test_the_systems_root_certificates_imply_verify_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for query in ("sslrootcert=system", "sslmode=verify-full&sslrootcert=system"):
        assert context_of(query).verify_mode is ssl.CERT_REQUIRED
        assert context_of(query).check_hostname
    for mode in ("allow", "prefer", "require", "verify-ca"):
        assert "needs sslmode=verify-full" in refusal(f"{PUBLIC}?sslmode={mode}&sslrootcert=system")


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_verifying_without_a_root_certificate_is_refused(mode: str) -> None:
    message = refusal(f"{PUBLIC}?sslmode={mode}")
    assert f"sslmode={mode} needs a root certificate" in message
    assert "sslrootcert=system" in message


@pytest.mark.parametrize("mode", ["", "sslmode=allow&", "sslmode=prefer&"])
@pytest.mark.parametrize(
    "parameter",
    ["sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "ssl_min_protocol_version"],
)
def test_files_for_a_connection_that_may_be_unencrypted_are_refused(
    root: Path, mode: str, parameter: str
) -> None:
    message = refusal(f"{PUBLIC}?{mode}{parameter}={root}")
    assert f"{parameter} has no effect without TLS: add sslmode=require" in message


@pytest.mark.parametrize("parameter", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_a_missing_file_is_named(root: Path, parameter: str) -> None:
    files = {"sslrootcert": root, "sslcert": root, parameter: "/nowhere/x.pem"}
    query = "&".join(f"{name}={path}" for name, path in files.items())
    assert f"{parameter} points to '/nowhere/x.pem'" in refusal(f"{PUBLIC}?sslmode=require&{query}")


@pytest.mark.parametrize("parameter", ["sslrootcert", "sslcert", "sslcrl"])
def test_a_file_that_is_no_certificate_is_named(root: Path, parameter: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text(SECRET)
    files = {"sslrootcert": root, parameter: bad}
    query = "&".join(f"{name}={path}" for name, path in files.items())
    assert f"{parameter} {str(bad)!r} " in refusal(f"{PUBLIC}?sslmode=require&{query}")


def test_a_key_or_a_revocation_list_that_would_go_unused_is_refused(root: Path) -> None:
    assert "add sslcert" in refusal(f"{PUBLIC}?sslmode=require&sslkey={root}")
    assert "add sslrootcert" in refusal(f"{PUBLIC}?sslmode=require&sslcrl={root}")


def test_an_encrypted_key_needs_the_right_password(authority: trustme.CA, tmp_path: Path) -> None:
    issued = authority.issue_cert("ann")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(SECRET.encode()),
    )
    (tmp_path / "ann.key").write_bytes(encrypted)
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "ann.crt"))
    query = f"sslmode=require&sslcert={tmp_path}/ann.crt&sslkey={tmp_path}/ann.key"
    assert context_of(f"{query}&sslpassword={SECRET}")
    assert "sslpassword is right" in refusal(f"{PUBLIC}?{query}&sslpassword=wrong")
    assert "sslpassword is right" in refusal(f"{PUBLIC}?{query}")


def test_tls_versions_can_be_narrowed() -> None:
    context = context_of("sslmode=require&ssl_min_protocol_version=TLSv1.3")
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    context = context_of("sslmode=require&ssl_max_protocol_version=TLSv1.2")
    assert context.maximum_version is ssl.TLSVersion.TLSv1_2
    assert "must be TLSv1.2 or TLSv1.3" in refusal(
        f"{PUBLIC}?sslmode=require&ssl_min_protocol_version=TLSv1"
    )
    both = "ssl_min_protocol_version=TLSv1.3&ssl_max_protocol_version=TLSv1.2"
    assert "above" in refusal(f"{PUBLIC}?sslmode=require&{both}")


def test_direct_tls_is_for_encrypted_connections() -> None:
    query = "sslmode=require&sslnegotiation=direct"
    assert parse(f"{PUBLIC}?{query}").connect_args["direct_tls"] is True
