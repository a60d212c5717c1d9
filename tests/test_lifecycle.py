"""Connections, event loops, processes: where a backend may be used, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sheppy import BackendError
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import SqlBackend
from sheppy_sql._heart import Heart
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner

MakeBackend = Callable[..., Awaitable[SqlBackend]]


def task(task_id: str, **fields: Any) -> dict[str, Any]:
    return {"id": task_id, "status": "new", "finished_at": None, **fields}


async def test_concurrent_first_calls_connect_once(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)
    try:
        await asyncio.gather(*(backend.connect() for _ in range(20)))
        sessions = {id(backend._session)}
        await asyncio.gather(*(backend.connect() for _ in range(20)))
        assert sessions == {id(backend._session)}
        assert await backend.append("q", [task("a")]) == [True]
    finally:
        await backend.disconnect()


async def test_backend_reconnects_in_a_second_event_loop(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)

    async def add(task_id: str) -> int:
        if not backend.is_connected:
            await backend.connect()
        await backend.append("q", [task(task_id)])
        return await backend.size("q")

    def run_twice() -> list[int]:
        # As the host's command line does: a loop each, and never a disconnect.
        return [asyncio.run(add("a")), asyncio.run(add("b"))]

    assert await asyncio.to_thread(run_twice) == [1, 2]
    assert not backend.is_connected
    await backend.connect()
    assert await backend.size("q") == 2
    await backend.disconnect()


async def test_end_of_the_event_loop_hands_back_what_was_taken(
    backend: SqlBackend, database: TestDatabase, spawn: Spawner
) -> None:
    """A program that runs a worker by asyncio.run(), and never disconnects."""
    source = """
import asyncio, sys
from sheppy_sql import SqlBackend

async def work(turns):
    backend = SqlBackend(sys.argv[1])
    await backend.connect()
    pop = asyncio.create_task(backend.pop("q", 2, timeout=5))
    # At another await each time: between two turns of the loop.
    for _ in range(turns):
        await asyncio.sleep(0)
    pop.cancel()
    return await backend.size("q") if turns % 8 else None

for turns in range(0, 60, 4):
    asyncio.run(work(turns))
"""
    await backend.append("q", [task("a"), task("b")])
    child = spawn.script(source, database.url)
    assert await asyncio.to_thread(child.wait, 60) == 0
    assert [taken["id"] for taken in await backend.pop("q", 5)] == ["a", "b"]


async def test_event_loop_that_is_closed_by_hand_does_not_matter(
    database: TestDatabase, spawn: Spawner
) -> None:
    """Nothing can close such a loop's connections; a new loop gets new ones."""
    source = """
import asyncio, sys
from sheppy_sql import SqlBackend

backend = SqlBackend(sys.argv[1])
for task_id in ("a", "b"):
    loop = asyncio.new_event_loop()
    assert not backend.is_connected
    loop.run_until_complete(backend.connect())
    loop.run_until_complete(backend.append("q", [{"id": task_id}]))
    loop.close()
"""
    child = spawn.script(source, database.url)
    assert await asyncio.to_thread(child.wait, 60) == 0
    assert await database.fetch("SELECT id FROM sheppy_tasks ORDER BY id") == [("a",), ("b",)]


async def test_backend_refuses_another_running_event_loop(backend: SqlBackend) -> None:
    def use_elsewhere() -> None:
        asyncio.run(backend.size("q"))

    with pytest.raises(BackendError, match="another running event loop"):
        await asyncio.to_thread(use_elsewhere)
    assert await backend.size("q") == 0


@pytest.mark.posix
async def test_forked_child_is_unconnected_and_leaves_its_parent_alone(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backend = await make_backend()
    await backend.append("q", [task("a")])

    def child() -> int:
        # What a preforking server does: the parent's object, a loop of one's own.
        async def work() -> bool:
            if backend.is_connected:
                return False
            try:
                await backend.size("q")
            except BackendError:
                pass
            else:
                return False
            await backend.connect()
            await backend.append("q", [task("b")])
            size = await backend.size("q")
            await backend.disconnect()
            return size == 2

        return 0 if asyncio.run(work()) else 1

    assert await asyncio.to_thread(_run_in_fork, child) == 0
    # The parent's connection still works: the child has not spoken on its socket.
    assert await backend.size("q") == 2


def _run_in_fork(function: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            # Of the parent's loop nothing runs here; asyncio must not think so.
            asyncio._set_running_loop(None)
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def test_pickled_backend_connects_in_its_new_process(database: TestDatabase) -> None:
    backend = SqlBackend(database.url, ttl=60, table_prefix="sheppy_")
    copy = pickle.loads(pickle.dumps(backend))
    await copy.connect()
    assert await copy.append("q", [task("a")]) == [True]
    await copy.disconnect()


async def test_engine_of_the_application_stays_open(database: TestDatabase) -> None:
    engine = create_async_engine(database.url)
    disposals: list[object] = []
    event.listen(engine.sync_engine, "engine_disposed", disposals.append)
    backend = SqlBackend(engine)
    await backend.connect()
    assert await backend.append("q", [task("a")]) == [True]
    await backend.disconnect()
    assert disposals == []
    assert await database.fetch("SELECT id FROM sheppy_tasks") == [("a",)]
    await engine.dispose()


@pytest.mark.parametrize("isolation_level", ["AUTOCOMMIT", "SERIALIZABLE"])
async def test_isolation_level_of_the_applications_engine_does_not_matter(
    database: TestDatabase, isolation_level: str
) -> None:
    engine = create_async_engine(database.url, isolation_level=isolation_level)
    backend = SqlBackend(engine)
    await backend.connect()
    await asyncio.gather(*(backend.append("q", [task(str(n))]) for n in range(20)))
    taken = await asyncio.gather(*(backend.pop("q", 10) for _ in range(4)))
    assert sorted(int(t["id"]) for some in taken for t in some) == list(range(20))
    await backend.disconnect()
    await engine.dispose()


async def test_two_backends_share_an_engine_in_memory() -> None:
    """Its only connection is in one transaction at a time."""
    engine = create_async_engine("sqlite+aiosqlite://")
    one, other = SqlBackend(engine), SqlBackend(engine)
    await one.connect()
    await other.connect()
    added = await asyncio.gather(
        *((one, other)[n % 2].append("q", [task(str(n))]) for n in range(20))
    )
    assert added == [[True]] * 20
    assert await other.size("q") == 20
    await one.disconnect()
    await other.disconnect()
    await engine.dispose()


async def test_sqlite_engine_with_the_recommended_listeners_works(
    sqlite_database: TestDatabase,
) -> None:
    engine = create_async_engine(sqlite_database.url)

    @event.listens_for(engine.sync_engine, "connect")
    def leave_transactions_to_sqlalchemy(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    backend = SqlBackend(engine)
    await backend.connect()
    assert await backend.append("q", [task("a")]) == [True]
    assert [taken["id"] for taken in await backend.pop("q")] == ["a"]
    await backend.disconnect()
    await engine.dispose()


async def test_cancelled_disconnect_goes_on(
    postgres_database: TestDatabase,
) -> None:
    backend, watching = SqlBackend(postgres_database.url), SqlBackend(postgres_database.url)
    await backend.connect()
    await watching.connect()
    await backend.append("q", [task("a")])
    await backend.pop("q")
    blocking = create_async_engine(postgres_database.url)
    async with blocking.connect() as connection:
        await connection.execute(text("LOCK TABLE sheppy_results"))
        blocked = asyncio.create_task(backend.get_tasks("q", ["a"]))
        while (  # noqa: ASYNC110  # an event in another program
            await postgres_database.fetch(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
            == []
        ):
            await asyncio.sleep(0.01)
        leaving = asyncio.create_task(backend.disconnect())
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    await blocking.dispose()
    assert [taken["id"] for taken in await watching.pop("q", timeout=20)] == ["a"]
    assert list(await blocked) == ["a"]
    await watching.disconnect()


async def test_engine_of_another_driver_is_refused() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    engine.sync_engine.dialect.driver = "another"
    with pytest.raises(ValueError, match=r"sqlite\+another; accepted are"):
        SqlBackend(engine)


async def test_cancelled_pop_hands_its_tasks_back(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await backend.append("q", [task(str(n)) for n in range(50)])
    for attempt in range(60):
        pop = asyncio.create_task(backend.pop("q", 3))
        # At another await each time: between two turns of the loop.
        for _ in range(attempt % 20):
            await asyncio.sleep(0)
        pop.cancel()
        try:
            for taken in await pop:
                await backend.store_result("q", {**taken, "finished_at": "now"})
        except asyncio.CancelledError:
            pass
    stats = await backend.get_stats("q")
    assert stats["pending"] + stats["completed"] == 50
    assert await database.fetch("SELECT count(*) FROM sheppy_tasks WHERE state = 'claimed'") == [
        (0,)
    ]


async def test_disconnect_hands_back_what_was_taken(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    leaving, staying = await make_backend(), await make_backend()
    await staying.append("q", [task("a"), task("b"), task("c")])
    await leaving.pop("q", 2)
    waiting = asyncio.create_task(staying.pop("q", 5, timeout=20))
    assert [taken["id"] for taken in await waiting] == ["c"]
    waiting = asyncio.create_task(staying.pop("q", 5, timeout=20))
    await leaving.disconnect()
    # In their old places, ahead of what came later.
    assert [taken["id"] for taken in await waiting] == ["a", "b"]


async def test_pop_that_nobody_awaits_leaves_no_claim_behind_a_disconnect(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """What the host's worker does when it stops: it cancels its pop and goes."""
    watching = await make_backend()
    for turns in range(12):
        backend = await make_backend()
        await watching.append("q", [task(str(turns))])
        pop = asyncio.create_task(backend.pop("q", timeout=5))
        for _ in range(turns):
            await asyncio.sleep(0)
        pop.cancel()
        await backend.disconnect()
        assert await watching.size("q") == turns + 1
    assert await database.fetch("SELECT count(*) FROM sheppy_tasks WHERE owner IS NOT NULL") == [
        (0,)
    ]


async def test_disconnect_ends_what_waits(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    waiting = [
        asyncio.create_task(backend.pop("q", timeout=60)),
        asyncio.create_task(backend.get_results("q", ["a"], timeout=60)),
    ]
    await asyncio.sleep(0)
    await backend.disconnect()
    for call in waiting:
        with pytest.raises(BackendError, match="disconnected"):
            await asyncio.wait_for(call, 10)


async def test_backends_in_two_threads_wake_each_other(database: TestDatabase) -> None:
    """Signals cross event loops, so a waiter need not wait for its next poll."""
    ready = threading.Event()

    async def consume() -> list[dict[str, Any]]:
        backend = SqlBackend(database.url, max_poll_interval=30)
        await backend.connect()
        pop = asyncio.create_task(backend.pop("q", timeout=20))
        await asyncio.sleep(1)  # past the first, frequent polls
        ready.set()
        taken = await pop
        await backend.disconnect()
        return taken

    consumer = asyncio.create_task(asyncio.to_thread(asyncio.run, consume()))
    await asyncio.to_thread(ready.wait)
    producer = SqlBackend(database.url)
    await producer.connect()
    await producer.append("q", [task("a")])
    assert [t["id"] for t in await asyncio.wait_for(consumer, 10)] == ["a"]
    await producer.disconnect()


async def test_server_that_is_too_old_is_refused(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheppy_sql._dialects.postgresql.OLDEST_VERSION", 99)
    monkeypatch.setattr("sheppy_sql._dialects.sqlite.OLDEST_VERSION", (99, 0, 0))
    backend = SqlBackend(database.url)
    with pytest.raises(BackendError, match="too old") as refused:
        await backend.connect()
    assert "99" in str(refused.value)
    assert not backend.is_connected


async def test_disconnect_during_the_first_beat_leaves_nothing_running(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on, beat = asyncio.Event(), asyncio.Event(), Heart._beat

    async def slow_beat(*args: Any, **kwargs: Any) -> None:
        await beat(*args, **kwargs)
        reached.set()
        await go_on.wait()

    monkeypatch.setattr(Heart, "_beat", slow_beat)
    backend = SqlBackend(database.url, lease=1)
    await backend.connect()
    popping = asyncio.create_task(backend.pop("q", timeout=1))
    await reached.wait()
    # The first step of a disconnect; its next ones may take as long as a drain.
    await backend._connected._background.stop_parts()
    go_on.set()
    await popping
    await backend.disconnect()
    assert not [thread for thread in threading.enumerate() if thread.name == "sheppy-sql-heart"]


async def test_disconnect_during_the_first_pop_leaves_nothing_running(
    database: TestDatabase,
) -> None:
    for turns in range(10):
        backend = SqlBackend(database.url, lease=1)
        await backend.connect()
        background = backend._connected._background
        popping = asyncio.create_task(backend.pop("q", timeout=1))
        for _ in range(turns):
            await asyncio.sleep(0)
        await backend.disconnect()
        with pytest.raises(BackendError):
            await popping
        assert not [part._name for part in background._parts if _runs(part._running)]
        heart = background._heart
        assert heart is not None
        assert heart._thread is None or not heart._thread.is_alive()


def _runs(task: asyncio.Task[None] | None) -> bool:
    return task is not None and not task.done()
