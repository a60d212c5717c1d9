"""One call that brings many tasks: all of them are stored, in the caller's order, or none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sheppy_sql import SqlBackend
from sheppy_sql._stores import tasks as task_store
from tests.contract.tasks import ids, make_task
from tests.faults.load import until
from tests.support.databases import TestDatabase

QUEUE = "test"
MANY = 1100
IDS = [f"task {number * 7919 % MANY:04}" for number in range(MANY)]
"""In no order of their own."""
LATE = IDS[-50]
PATIENCE = 30.0  # seconds


def many() -> list[dict[str, Any]]:
    return [make_task(task_id) for task_id in IDS]


@pytest.mark.parametrize("bad", [{"id": LATE, "spec": object()}, {"id": 5}, {}, "task"])
async def test_none_is_stored_where_one_is_bad(backend: SqlBackend, bad: Any) -> None:
    tasks = [bad if task["id"] == LATE else task for task in many()]
    with pytest.raises(ValueError, match="task"):
        await backend.append(QUEUE, tasks)
    assert (await backend.size(QUEUE), await backend.list_queues()) == (0, {})
    assert await backend.append(QUEUE, many()) == [True] * MANY
    assert ids(await backend.pop(QUEUE, MANY)) == IDS


async def test_each_is_told_whether_it_was_new(backend: SqlBackend) -> None:
    finished, live = IDS[300], IDS[700]
    await backend.store_result(QUEUE, make_task(finished, finished_at="2026-01-01T00:00:00Z"))
    await backend.append(QUEUE, [make_task(live)])
    old = {finished, live}
    tasks = many()
    added = await backend.append(QUEUE, [*tasks, tasks[0]])
    assert added == [*(task_id not in old for task_id in IDS), False]
    rest = [task_id for task_id in IDS if task_id not in old]
    assert ids(await backend.pop(QUEUE, MANY)) == [live, *rest]


async def test_large_ones_go_in_as_many_statements_as_they_need(
    backend: SqlBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_store, "STATEMENT_BYTES", 10_000)
    statements: list[str] = []
    engine = backend._connected.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    tasks = [{**task, "padding": "x" * 1000} for task in many()]
    assert await backend.append(QUEUE, tasks) == [True] * MANY
    assert len(statements) > MANY / 10
    assert await backend.pop(QUEUE, MANY) == tasks


async def hold_an_id(engine: AsyncEngine) -> Any:
    """A connection with a transaction that has stored one of the last ids, and goes on."""
    connection = await engine.connect()
    held = text(
        "INSERT INTO sheppy_tasks (queue, id, payload, state) VALUES (:queue, :id, '{}', 'idle')"
    )
    await connection.execute(held, {"queue": QUEUE, "id": LATE})
    return connection


WAITING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
    " AND wait_event_type = 'Lock' AND query LIKE '%sheppy_tasks%'"
)


async def begin_and_wait_for_a_lock(
    backend: SqlBackend, database: TestDatabase
) -> tuple[asyncio.Task[list[bool]], int]:
    """A call that has stored most of its tasks, and the server's process that it waits in."""
    call = asyncio.create_task(backend.append(QUEUE, many()))
    found: list[Any] = []

    async def waits() -> bool:
        found[:] = await database.fetch(WAITING)
        return bool(found)

    await until(waits, "no append waits for a lock", timeout=PATIENCE)
    return call, found[0][0]


async def test_all_are_stored_once_though_the_connection_is_lost_on_the_way(
    postgres_database: TestDatabase,
) -> None:
    engine, backend = create_async_engine(postgres_database.url), SqlBackend(postgres_database.url)
    await backend.connect()
    holder = await hold_an_id(engine)
    call, process = await begin_and_wait_for_a_lock(backend, postgres_database)
    await postgres_database.fetch(f"SELECT pg_terminate_backend({process})")
    await holder.rollback()
    assert await asyncio.wait_for(call, PATIENCE) == [True] * MANY
    assert ids(await backend.pop(QUEUE, 2 * MANY)) == IDS
    await holder.close()
    await backend.disconnect()
    await engine.dispose()


async def test_all_or_none_are_stored_where_the_caller_is_cancelled(
    postgres_database: TestDatabase,
) -> None:
    engine, backend = create_async_engine(postgres_database.url), SqlBackend(postgres_database.url)
    await backend.connect()
    holder = await hold_an_id(engine)
    call, _ = await begin_and_wait_for_a_lock(backend, postgres_database)
    call.cancel()
    await holder.rollback()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, PATIENCE)
    assert await backend.size(QUEUE) == MANY
    await holder.close()
    await backend.disconnect()
    await engine.dispose()
