"""Servers of the test's own, that are full, starting up, read-only or picky about passwords."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import psutil
import pytest
from sheppy import BackendError

from sheppy_sql import SqlBackend, migrate
from tests.contract.tasks import finished, ids
from tests.faults.cases import A, B
from tests.faults.load import Load, until
from tests.support.databases import TestDatabase

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer

MakeServer = Callable[..., "PostgresServer"]
MakeBackend = Callable[..., Awaitable[SqlBackend]]

PATIENCE = 60.0  # seconds, a ceiling for what takes one or two
AT_ONCE = 5.0  # seconds, a ceiling for what must not wait for the end of an outage
QUEUE = "q"
PASSWORD = "p4ssw0rd-of-ours"
FAST = {"fsync": False, "full_page_writes": False}

ANY_SESSION = """SELECT pid FROM pg_stat_activity WHERE datname = current_database()
    AND pid <> pg_backend_pid() AND backend_type = 'client backend' LIMIT 1"""


@pytest.fixture
async def connect() -> AsyncIterator[MakeBackend]:
    """Makes connected backends on a server: `await connect(server.url())`."""
    async with AsyncExitStack() as stack:

        async def make(url: str, **options: Any) -> SqlBackend:
            backend = SqlBackend(url, **options)
            stack.push_async_callback(backend.disconnect)
            await backend.connect()
            return backend

        yield make


async def started(
    private_server: MakeServer, settings: dict[str, Any] | None = None, **options: Any
) -> PostgresServer:
    server = await asyncio.to_thread(private_server, {**FAST, **(settings or {})}, **options)
    await asyncio.to_thread(migrate.upgrade, server.url())
    return server


async def test_full_server_is_waited_for(private_server: MakeServer, connect: MakeBackend) -> None:
    server = await started(
        private_server, {"max_connections": 8, "superuser_reserved_connections": 0}
    )
    backend = await connect(server.url())
    await backend.append(QUEUE, [A])
    hogs: list[asyncpg.Connection] = []
    try:
        # The first of them takes the backend's own place, and those of its background's.
        hogs.append(await asyncpg.connect(server.url(driver=None)))
        full = False
        while not full:
            await hogs[0].execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE usename IS NOT NULL AND application_name <> 'hog'"
                " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            try:
                settings = {"application_name": "hog"}
                hogs.append(
                    await asyncpg.connect(server.url(driver=None), server_settings=settings)
                )
            except asyncpg.TooManyConnectionsError:
                [others] = await hogs[0].fetchrow(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name <> 'hog'"
                    " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
                full = others == 0
        refused = server.log.count("too many clients")
        calls: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(backend.append(QUEUE, [B])),
            asyncio.ensure_future(backend.pop(QUEUE)),
            asyncio.ensure_future(backend.get_results(QUEUE, ["task-0"], 30)),
        ]

        async def tried() -> bool:
            assert [call.result() for call in calls if call.done()] == []
            return server.log.count("too many clients") > refused + 3

        await until(tried, "the server was not full")
    finally:
        for hog in hogs:
            await hog.close()
    added, taken = await asyncio.wait_for(asyncio.gather(*calls[:2]), PATIENCE)
    assert (added, ids(taken)) == ([True], ["task-0"])
    await backend.store_result(QUEUE, finished(A))
    assert list(await asyncio.wait_for(calls[2], PATIENCE)) == ["task-0"]


async def test_server_that_is_starting_up_is_waited_for(
    private_server: MakeServer, connect: MakeBackend
) -> None:
    """One in recovery, which lets nobody in until that is over."""
    server = await started(private_server, {"hot_standby": False})
    backend = await connect(server.url())
    await backend.append(QUEUE, [A])
    # The worker's own background, too.
    assert ids(await backend.pop(QUEUE)) == ["task-0"]
    await asyncio.to_thread(server.stop, "immediate")
    server.install_files({"standby.signal": b""})
    await asyncio.to_thread(server.start)
    calls: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(backend.append(QUEUE, [B])),
        asyncio.ensure_future(backend.store_result(QUEUE, finished(A))),
        asyncio.ensure_future(connect(server.url())),
    ]
    try:

        async def tried() -> bool:
            assert [call.result() for call in calls if call.done()] == []
            return server.log.count("not accepting connections") > 5

        await until(tried, "the server let somebody in")
        await asyncio.to_thread(server.promote)
        added, stored, second = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE)
    finally:
        for call in calls:
            call.cancel()
    assert (added, stored) == ([True], True)
    assert ids(await second.pop(QUEUE)) == ["task-1"]


async def test_wrong_password_is_told_at_once(
    private_server: MakeServer, connect: MakeBackend
) -> None:
    server = await started(private_server, password=PASSWORD)
    with pytest.raises(BackendError, match="check the user and the password"):
        await asyncio.wait_for(connect(server.url(password="wrong")), AT_ONCE)
    backend = await connect(server.url())
    assert await backend.append(QUEUE, [A]) == [True]
    # One that is changed while the backend runs is no outage either.
    database = TestDatabase(server.url(), "postgresql")
    await database.execute("ALTER ROLE postgres PASSWORD 'another'")
    changed = TestDatabase(server.url(password="another"), "postgresql")
    await changed.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with pytest.raises(BackendError, match=r"^Failed to append tasks: .*check the user"):
        await asyncio.wait_for(backend.append(QUEUE, [B]), AT_ONCE)
    await changed.execute(f"ALTER ROLE postgres PASSWORD '{PASSWORD}'")
    assert await asyncio.wait_for(backend.append(QUEUE, [B]), PATIENCE) == [True]


async def test_server_that_is_switched_to_read_only_and_back_is_waited_for(
    private_server: MakeServer, connect: MakeBackend
) -> None:
    server = await started(private_server)
    backends = [await connect(server.url()) for _ in range(2)]
    control = await asyncpg.connect(
        server.url(driver=None), server_settings={"default_transaction_read_only": "off"}
    )
    try:
        async with Load(backends, backends, QUEUE) as load:
            await load.progress()
            await control.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            await control.execute("SELECT pg_reload_conf()")

            async def refused() -> bool:
                load.check_that_nothing_failed()
                return server.log.count("read-only transaction") > 3

            await until(refused, "the server went on writing")
            await control.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await control.execute("SELECT pg_reload_conf()")
            await load.progress()
    finally:
        await control.close()


@pytest.mark.torture
@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_restarted_server_is_waited_for(
    mode: Literal["fast", "immediate"], private_server: MakeServer, connect: MakeBackend
) -> None:
    server = await started(private_server)
    backends = [await connect(server.url()) for _ in range(2)]
    async with Load(backends, backends, QUEUE) as load:
        await load.progress()
        await asyncio.to_thread(server.stop, mode)
        await asyncio.to_thread(server.start)
        await load.progress()


@pytest.mark.torture
async def test_killed_server_process_is_waited_for(
    private_server: MakeServer, connect: MakeBackend
) -> None:
    """PostgreSQL then ends all sessions and recovers, as after any crash of one of them."""
    server = await started(private_server, {"restart_after_crash": True})
    backends = [await connect(server.url()) for _ in range(2)]
    database = TestDatabase(server.url(), "postgresql")
    async with Load(backends, backends, QUEUE) as load:
        await load.progress()
        [(pid,)] = await database.fetch(ANY_SESSION)
        psutil.Process(pid).kill()
        await load.progress()
