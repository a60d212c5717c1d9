"""Behind PgBouncer in transaction mode, which changes the server between two transactions."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sheppy import BackendError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sheppy_sql import SqlBackend, _waiting, _wakeups, migrate
from sheppy_sql._dialects import poolers
from sheppy_sql._errors import Fault, fault
from tests.concurrency.test_exactly_once import run_all
from tests.contract.tasks import finished, ids, make_task, make_tasks
from tests.support.databases import SETTINGS, Databases
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PostgresServer
from tests.support.processes import Spawner

pytestmark = pytest.mark.system

CALL = "from sheppy_sql.cli import main; main()"
POOL_SIZE = 2  # connections to the server, shared by all clients

# What the application gives to create_async_engine.
FIT: dict[str, Any] = {
    "connect_args": {"statement_cache_size": 0, "prepared_statement_name_func": lambda: ""}
}
BY_SQLALCHEMYS_RECIPE: dict[str, Any] = {
    "connect_args": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
    }
}


@pytest.fixture
def server(private_server: Callable[..., PostgresServer]) -> PostgresServer:
    return private_server(SETTINGS)


@pytest.fixture
def pgbouncer(server: PostgresServer, databases: Databases) -> Iterator[PgBouncer]:
    directory = databases.directory / f"pgbouncer-{next(_numbers)}"
    pgbouncer = PgBouncer(server, directory, pool_mode="transaction", pool_size=POOL_SIZE)
    databases.guard.kill_later(pgbouncer.pid)
    yield pgbouncer
    pgbouncer.destroy()


_numbers = itertools.count()


@pytest.fixture
def url(server: PostgresServer, pgbouncer: PgBouncer) -> str:
    """A database with our tables, through PgBouncer."""
    migrate.upgrade(server.url())
    return pgbouncer.url


MakeBackend = Callable[..., Awaitable[SqlBackend]]


@pytest.fixture
async def make_backend(url: str) -> AsyncIterator[MakeBackend]:
    async with AsyncExitStack() as stack:

        async def make(url_or_engine: str | AsyncEngine = url, **options: Any) -> SqlBackend:
            backend = SqlBackend(url_or_engine, **options)
            stack.push_async_callback(backend.disconnect)
            await backend.connect()
            return backend

        yield make


@pytest.fixture
async def make_engine(url: str) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Makes the application's engines."""
    engines = []

    def make(**options: Any) -> AsyncEngine:
        engines.append(create_async_engine(url, pool_size=1, max_overflow=0, **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.dispose()


@asynccontextmanager
async def other_client(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A client in an open transaction, which keeps one of the server's connections."""
    client = await asyncpg.connect(url.replace("+asyncpg", ""), statement_cache_size=0)
    try:
        await client.execute("BEGIN")
        yield client
        await client.execute("ROLLBACK")
    finally:
        await client.close()


async def prepared_names(url: str) -> list[str]:
    """Names of the prepared statements on all connections to the server."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(other_client(url)) for _ in range(POOL_SIZE)]
        pids = {await client.fetchval("SELECT pg_backend_pid()") for client in clients}
        assert len(pids) == POOL_SIZE
        rows = [
            await client.fetch("SELECT name FROM pg_prepared_statements ORDER BY name")
            for client in clients
        ]
    return [row["name"] for some in rows for row in some]


async def call_on_both_servers(url: str, call: Callable[[], Awaitable[Any]]) -> None:
    """The same call twice, with no choice of the connection to the server, and then the other."""
    async with AsyncExitStack() as first:
        taken = await first.enter_async_context(other_client(url))
        pid = await taken.fetchval("SELECT pg_backend_pid()")
        await call()
        async with other_client(url) as second:
            assert await second.fetchval("SELECT pg_backend_pid()") != pid
            await first.aclose()
            await call()


async def live(one: SqlBackend, other: SqlBackend, queue: str) -> None:
    """All that can happen in a queue, by two backends in turn."""
    tasks = make_tasks(5)
    assert await one.append(queue, tasks) == [True] * 5
    assert await other.append(queue, tasks[:1]) == [False]
    assert await other.size(queue) == 5
    assert ids(await one.get_pending(queue, 9)) == ids(tasks)
    waiting = asyncio.create_task(one.get_results(queue, ids(tasks), timeout=30))
    for backend in (one, other):
        for task in await backend.pop(queue, 2):
            assert await backend.store_result(queue, finished(task)) is True
    [last] = await other.pop(queue, 9, timeout=1)
    await other.acknowledge(queue, [last["id"]])
    assert await other.append(queue, [last], unique=False) == [True]
    assert await one.pop(queue, 9) == [last]
    await one.store_result(queue, finished(last))
    assert await waiting == {task["id"]: finished(task) for task in tasks}

    now = datetime.now(timezone.utc)
    early, late = make_task("early"), make_task("late")
    assert await one.schedule(queue, early, now - timedelta(seconds=1)) is True
    assert await other.schedule(queue, late, now + timedelta(days=1)) is True
    assert await other.get_scheduled(queue) == [early, late]
    assert await other.pop_scheduled(queue) == [early]
    assert await other.append(queue, [early], unique=False) == [True]
    assert await one.get_stats(queue) == {"pending": 1, "completed": 5, "scheduled": 1}
    assert len(await one.get_all_tasks(queue)) == 7
    assert (await other.list_queues())[queue] == 1

    cron = {"expression": "* * * * *"}
    assert await one.add_cron(queue, "cron", cron) is True
    assert await other.add_cron(queue, "cron", cron) is False
    assert await other.get_crons(queue) == [cron]
    assert await other.delete_cron(queue, "cron") is True

    workflow = {"id": "wf", "completed": False, "error": None, "pending_task_ids": ["a", "b"]}
    assert await one.store_workflow(queue, workflow) is True
    assert await other.get_workflows(queue, ["wf"]) == {"wf": workflow}
    assert await other.get_pending_workflows(queue) == [workflow]
    assert await other.mark_workflow_task_complete(queue, "wf", "a") == 1
    assert await one.mark_workflow_task_complete(queue, "wf", "b") == 0
    assert await one.delete_workflow(queue, "wf") is True

    for strategy in ("sliding_window", "fixed_window"):
        assert await one.acquire_rate_limit(queue, strategy, 1, 60, "a", strategy) is None
        assert (await other.acquire_rate_limit(queue, strategy, 1, 60, "b", strategy) or 0) > 30

    assert await other.clear(queue) == 7
    assert await one.get_all_tasks(queue) == []


async def test_everything_works_for_many_at_once(make_backend: MakeBackend) -> None:
    one, other = await make_backend(), await make_backend()
    await asyncio.gather(*(live(one, other, f"queue-{number}") for number in range(12)))


async def test_statements_find_the_server_that_they_need(
    make_backend: MakeBackend, url: str
) -> None:
    for options in ({}, {"prepared_statements": False}):
        backend = await make_backend(pool_size=1, **options)
        await call_on_both_servers(url, functools.partial(backend.size, "q"))
        await call_on_both_servers(url, functools.partial(backend.append, "q", [make_task()]))


async def test_statements_that_are_kept_and_not_found_again_are_prepared_anew(
    make_backend: MakeBackend, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for all of this: they are missing, and asked for again on another connection."""
    missing = []

    def seen(error: BaseException) -> Fault:
        missing.append("does not exist" in str(error))
        return fault(error)

    monkeypatch.setattr("sheppy_sql._attempts.fault", seen)
    for at, option in ((url, True), (f"{url}?statement_cache_size=100", None)):
        missing.clear()
        backend = await make_backend(at, pool_size=1, prepared_statements=option)
        await call_on_both_servers(url, functools.partial(backend.size, "q"))
        assert any(missing)


async def test_thousands_of_calls_leave_no_statement_behind(
    make_backend: MakeBackend, url: str
) -> None:
    backends = [await make_backend() for _ in range(3)]

    async def use(backend: SqlBackend, number: int) -> None:
        queue = f"queue-{number % 4}"
        for turn in range(20):
            task = make_task(f"{number}-{turn}")
            assert await backend.append(queue, [task]) == [True]
            await backend.size(queue)
            for taken in await backend.pop(queue):
                await backend.store_result(queue, finished(taken))
            await backend.get_results(queue, [task["id"]])

    await asyncio.gather(*(use(b, i * 7 + n) for i, b in enumerate(backends) for n in range(7)))
    assert sum([(await backends[0].get_stats(f"queue-{n}"))["completed"] for n in range(4)]) == 420
    assert await prepared_names(url) == []


async def test_every_task_runs_once_in_two_processes(
    make_backend: MakeBackend, url: str, spawn: Spawner, tmp_path: Path
) -> None:
    backend = await make_backend()
    ran = await run_all(backend, url, spawn, tmp_path / "ran", tasks=300, workers=2)
    assert ran == list(range(300))


async def test_tables_are_made_and_dropped(pgbouncer: PgBouncer) -> None:
    url = pgbouncer.url
    await asyncio.gather(*(asyncio.to_thread(migrate.upgrade, url) for _ in range(3)))
    made = migrate.current(url)
    assert made.version is not None
    migrate.downgrade(url)
    assert migrate.current(url) == migrate.Position(None, None)
    migrate.upgrade(url)
    assert migrate.current(url) == made


async def test_tables_are_made_on_connecting(pgbouncer: PgBouncer) -> None:
    backend = SqlBackend(pgbouncer.url, migrate=True)
    await backend.connect()
    await backend.append("q", [make_task()])
    await backend.disconnect()


def test_the_command_line_finds_out_or_is_told(pgbouncer: PgBouncer, spawn: Spawner) -> None:
    told = f"{pgbouncer.url}?pgbouncer=true"
    for url, command in (
        (pgbouncer.url, "db upgrade"),
        (pgbouncer.url, "db check"),
        (pgbouncer.url, "work --queue q --oneshot"),
        (told, "db check"),
    ):
        child = spawn.python("-c", CALL, *command.split(), env={"SHEPPY_BACKEND_URL": url})
        assert child.wait() == 0, child.report()


@pytest.mark.parametrize("options", [FIT, BY_SQLALCHEMYS_RECIPE], ids=["ours", "sqlalchemys"])
@pytest.mark.parametrize("prepared", [None, False])
async def test_engine_of_the_application_works_with_settings(
    make_backend: MakeBackend,
    make_engine: Callable[..., AsyncEngine],
    url: str,
    options: dict[str, Any],
    prepared: bool | None,
) -> None:
    for isolation in ({}, {"isolation_level": "AUTOCOMMIT"}):
        one, other = [
            await make_backend(make_engine(**options, **isolation), prepared_statements=prepared)
            for _ in range(2)
        ]
        await asyncio.gather(*(live(one, other, f"queue-{number}") for number in range(4)))
        await call_on_both_servers(url, functools.partial(one.size, "q"))
        # Before their engine goes, which they still need.
        await one.disconnect()
        await other.disconnect()


@pytest.mark.parametrize(
    "connect_args",
    [
        {},
        {"prepared_statement_cache_size": 0},
        {"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__"},
    ],
    ids=["defaults", "common names", "kept"],
)
async def test_engine_of_the_application_without_them_is_refused(
    make_engine: Callable[..., AsyncEngine], connect_args: dict[str, Any]
) -> None:
    backend = SqlBackend(make_engine(connect_args=connect_args))
    with pytest.raises(BackendError, match=re.escape(poolers.SETTINGS)):
        await backend.connect()
    assert not backend.is_connected


async def test_engine_of_the_application_is_believed_to_fit_when_told(
    make_backend: MakeBackend, make_engine: Callable[..., AsyncEngine]
) -> None:
    backend = await make_backend(make_engine(), prepared_statements=True)
    assert await backend.size("q") == 0


async def test_whoever_waits_looks_where_no_notification_comes_through(
    make_backend: MakeBackend, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """LISTEN is of a connection to the server, which is somebody else's at the next moment."""
    caplog.set_level(logging.INFO, "sheppy_sql")
    pooled, user = await make_backend(), await make_backend(notify="off")
    taking = asyncio.create_task(pooled.pop("q", timeout=60))
    line: Any = pooled._connected.wakeups.lines[0]
    await asyncio.wait_for(line._tried.wait(), 30)
    assert not line.is_told
    await user.append("q", [make_task("one")])
    assert ids(await asyncio.wait_for(taking, 20)) == ["one"]
    [said] = [message for message in caplog.messages if "none comes back" in message]
    assert "pooler" in said
    # Whoever gets that connection next is told nothing.
    direct = await asyncpg.connect(server.url().replace("+asyncpg", ""))
    listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
    assert await direct.fetchval(listening) == 0
    await direct.close()


async def test_notifications_that_are_required_are_missed(make_backend: MakeBackend) -> None:
    backend = await make_backend(notify="on")
    with pytest.raises(BackendError, match="pooler"):
        await asyncio.wait_for(backend.pop("q", timeout=60), 30)


async def test_whoever_listens_directly_hears_of_tasks_that_come_through_it(
    make_backend: MakeBackend, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_wakeups, "hub", lambda _: _wakeups.Wakeups())
    monkeypatch.setattr(_waiting, "FIRST_POLL", 60.0)
    pooled = await make_backend()
    direct = await make_backend(server.url(), notify="on", max_poll_interval=60)
    taking = asyncio.create_task(direct.pop("q", timeout=60))
    while not direct._connected.wakeups.anybody:  # noqa: ASYNC110  # nothing tells of it
        await asyncio.sleep(0.01)
    await pooled.append("q", [make_task("one")])
    assert ids(await asyncio.wait_for(taking, 20)) == ["one"]
