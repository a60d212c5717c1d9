"""One call that brings many tasks: all of them are stored, in the caller's order, or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

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


HELD = text(
    "INSERT INTO sheppy_tasks (queue, id, payload, state) VALUES (:queue, :id, '{}', 'idle')"
)
WAITING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
    " AND wait_event_type = 'Lock' AND query LIKE '%sheppy_tasks%'"
)


@asynccontextmanager
async def held_up(
    backend: SqlBackend, database: TestDatabase
) -> AsyncIterator[tuple[asyncio.Task[list[bool]], int]]:
    """A call that waits for one of its last ids until the block ends, and its server process."""
    engine = create_async_engine(database.url)
    async with engine.connect() as holder:
        await holder.execute(HELD, {"queue": QUEUE, "id": LATE})
        call = asyncio.create_task(backend.append(QUEUE, many()))
        found: list[Any] = []

        async def waits() -> bool:
            found[:] = await database.fetch(WAITING)
            return bool(found)

        await until(waits, "no append waits for a lock", timeout=PATIENCE)
        yield call, found[0][0]
    await engine.dispose()


async def test_all_are_stored_once_though_the_connection_is_lost_on_the_way(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    async with held_up(backend, postgres_database) as (call, process):
        await postgres_database.fetch(f"SELECT pg_terminate_backend({process})")
    assert await asyncio.wait_for(call, PATIENCE) == [True] * MANY
    assert ids(await backend.pop(QUEUE, 2 * MANY)) == IDS
    await backend.disconnect()


async def test_all_or_none_are_stored_where_the_caller_is_cancelled(
    postgres_database: TestDatabase,
) -> None:
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    async with held_up(backend, postgres_database) as (call, _):
        call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, PATIENCE)
    assert await backend.size(QUEUE) == MANY
    await backend.disconnect()
