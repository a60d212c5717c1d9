"""sslmode and the rest, on servers with a certificate of an authority made for the test."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from sheppy import BackendError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from sheppy_sql import SqlBackend
from tests.support.databases import Databases
from tests.support.postgres import PostgresServer
from tests.support.tls import Authority, programs_with_tls
from tests.support.urls import engine_of
from tests.support.urls import no_defaults as no_defaults

pytestmark = pytest.mark.usefixtures("no_defaults")

# SQLAlchemy 2.1 wraps what the driver raises while it connects, 2.0 does not.
REFUSED = (DBAPIError, asyncpg.PostgresError)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    """An authority that the server's certificate is not from."""
    directory = tmp_path / "stranger"
    directory.mkdir()
    return Authority(directory)


@pytest.fixture
def start_server(
    databases: Databases, authority: Authority
) -> Iterator[Callable[[str], PostgresServer]]:
    """Starts servers that let in nobody without TLS, and with it by the method of pg_hba.conf."""
    servers: list[PostgresServer] = []

    def start(method: str) -> PostgresServer:
        server = PostgresServer.create(
            programs_with_tls(),
            databases.directory / f"tls-{next(_numbers)}",
            {"ssl": True, "ssl_ca_file": "root.crt", "fsync": False},
            hba=f"hostssl all all 127.0.0.1/32 {method}\n",
        )
        servers.append(server)
        server.install_files(authority.files_of_server())
        server.start()
        return server

    yield start
    for server in servers:
        server.destroy()


_numbers = itertools.count()


@pytest.fixture
def server(start_server: Callable[[str], PostgresServer]) -> PostgresServer:
    return start_server("trust")


def url(server: PostgresServer, query: str, host: str = "localhost") -> str:
    return f"postgresql://postgres@{host}:{server.port}/postgres?{query}"


async def is_encrypted(url: str) -> bool:
    """Whether the server says so of a connection made for the question."""
    async with engine_of(url).connect() as connection:
        own = text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return bool(await connection.scalar(own))


@pytest.mark.system
async def test_every_mode_but_disable_encrypts_where_the_server_demands_it(
    server: PostgresServer, authority: Authority
) -> None:
    for query in (
        "sslmode=allow",
        "sslmode=prefer",
        "sslmode=require",
        "ssl=true",
        "application_name=no-sslmode-at-all",
        f"sslmode=require&sslrootcert={authority.root}",
        f"sslmode=verify-ca&sslrootcert={authority.root}",
        f"sslmode=verify-full&sslrootcert={authority.root}",
    ):
        assert await is_encrypted(url(server, query)), query


@pytest.mark.system
async def test_disable_is_refused_by_a_server_that_demands_tls(server: PostgresServer) -> None:
    with pytest.raises(REFUSED, match=r"no pg_hba.conf entry .* no encryption"):
        await is_encrypted(url(server, "sslmode=disable"))


@pytest.mark.system
async def test_only_verify_full_minds_the_hosts_name(
    server: PostgresServer, authority: Authority
) -> None:
    for mode in ("require", "verify-ca"):
        query = f"sslmode={mode}&sslrootcert={authority.root}"
        assert await is_encrypted(url(server, query, "127.0.0.1"))
    query = f"sslmode=verify-full&sslrootcert={authority.root}"
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        await is_encrypted(url(server, query, "127.0.0.1"))


@pytest.mark.system
async def test_a_server_of_another_authority_is_not_trusted(
    server: PostgresServer, stranger: Authority
) -> None:
    for mode in ("require", "verify-ca", "verify-full"):
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
            await is_encrypted(url(server, f"sslmode={mode}&sslrootcert={stranger.root}"))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        await is_encrypted(url(server, "sslrootcert=system"))


@pytest.mark.system
async def test_the_systems_authorities_are_trusted_when_asked_for(
    server: PostgresServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.root))
    assert await is_encrypted(url(server, "sslrootcert=system"))


@pytest.mark.system
async def test_a_revoked_certificate_is_not_trusted(
    server: PostgresServer, authority: Authority
) -> None:
    query = f"sslmode=verify-full&sslrootcert={authority.root}&sslcrl="
    assert await is_encrypted(url(server, f"{query}{authority.revocations()}"))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
        await is_encrypted(url(server, f"{query}{authority.revocations(authority.server)}"))


@pytest.mark.system
async def test_a_client_shows_its_certificate(
    start_server: Callable[[str], PostgresServer], authority: Authority
) -> None:
    server = start_server("cert")
    query = f"sslmode=verify-full&sslrootcert={authority.root}"
    assert await is_encrypted(url(server, f"{query}&{authority.client('postgres')}"))
    with pytest.raises(REFUSED, match="connection requires a valid client certificate"):
        await is_encrypted(url(server, query))
    with pytest.raises(REFUSED, match="certificate authentication failed"):
        await is_encrypted(url(server, f"{query}&{authority.client('ann')}"))


async def test_tls_begins_at_once_where_the_url_says_so(authority: Authority) -> None:
    startup: asyncio.Future[tuple[str | None, bytes]] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = writer.get_extra_info("ssl_object").selected_alpn_protocol()
        startup.set_result((protocol, await reader.readexactly(8)))
        writer.close()

    # PostgreSQL does so from version 17 on, and only for clients with this ALPN protocol.
    context = authority.server_context()
    context.set_alpn_protocols(["postgresql"])
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as listener:
        port = listener.sockets[0].getsockname()[1]
        query = f"sslmode=verify-full&sslrootcert={authority.root}&sslnegotiation=direct"
        with pytest.raises(REFUSED):
            await is_encrypted(f"postgresql://postgres@localhost:{port}/postgres?{query}")
    protocol, message = await startup
    assert protocol == "postgresql"
    assert message[4:] == b"\0\3\0\0"  # the startup message's version


async def test_a_server_without_tls_is_used_only_if_the_mode_allows_it(
    private_server: Callable[[], PostgresServer],
) -> None:
    server = private_server()
    for mode in ("disable", "allow", "prefer"):
        assert not await is_encrypted(url(server, f"sslmode={mode}"))
    with pytest.raises(ConnectionError, match="rejected SSL upgrade"):
        await is_encrypted(url(server, "sslmode=require"))


@pytest.mark.system
async def test_the_backend_works_over_verified_tls(
    server: PostgresServer, authority: Authority, stranger: Authority
) -> None:
    query = "application_name=over-tls&sslmode=verify-full&sslrootcert="
    backend = SqlBackend(url(server, f"{query}{authority.root}"), migrate=True)
    await backend.connect()
    try:
        async with engine_of(url(server, "sslmode=require")).connect() as connection:
            ours = text(
                "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE application_name = 'over-tls'"
            )
            assert (await connection.scalars(ours)).all() == [True]
    finally:
        await backend.disconnect()
    with pytest.raises(BackendError, match="check sslmode and sslrootcert in the URL"):
        await SqlBackend(url(server, f"{query}{stranger.root}")).connect()
