"""Callers' transactions among others: every isolation level, and one that stays open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from sheppy_sql import BoundBackend, SqlBackend, TransactionConflictError
from tests.contract.tasks import FUTURE, make_task
from tests.support.databases import TestDatabase

QUEUE = "emails"
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    """SQLite has one level, and one transaction that writes at a time."""
    return postgres_database


@pytest.fixture
async def engine(database: TestDatabase) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database.url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def connection(engine: AsyncEngine, level: str) -> AsyncIterator[AsyncConnection]:
    """With a snapshot that is taken."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        await connection.execute(text("SELECT 1 FROM sheppy_tasks"))
        yield connection


@pytest.fixture
async def bound(backend: SqlBackend, connection: AsyncConnection) -> BoundBackend:
    bound = backend.bind(connection)
    await bound.connect()
    return bound


async def finish(backend: SqlBackend, task_id: str = "task") -> None:
    """Run a task to its end."""
    assert await backend.append(QUEUE, [make_task(task_id)]) == [True]
    [taken] = await backend.pop(QUEUE)
    await backend.store_result(
        QUEUE, {**taken, "status": "completed", "finished_at": FUTURE.isoformat()}
    )


@pytest.mark.parametrize("level", LEVELS)
async def test_ids_are_unique_against_what_is_visible(
    backend: SqlBackend, bound: BoundBackend, connection: AsyncConnection
) -> None:
    await connection.rollback()
    await finish(backend, "done")
    await backend.append(QUEUE, [make_task("pending")])
    new = [make_task("done"), make_task("pending"), make_task("new")]
    assert await bound.append(QUEUE, new) == [False, False, True]
    assert not await bound.schedule(QUEUE, make_task("done"), FUTURE)
    await connection.commit()
    assert await backend.get_stats(QUEUE) == {"pending": 2, "completed": 1, "scheduled": 0}


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("level", LEVELS)
async def test_id_that_ended_since_the_snapshot_is_refused_or_seen(
    backend: SqlBackend, bound: BoundBackend, connection: AsyncConnection, level: str, unique: bool
) -> None:
    await finish(backend)
    if level == "READ COMMITTED":
        assert await bound.append(QUEUE, [make_task()], unique) == [not unique]
        await connection.commit()
        assert (await backend.get_results(QUEUE, ["task"]) == {}) is not unique
        return
    with pytest.raises(TransactionConflictError, match="run it again"):
        await bound.append(QUEUE, [make_task()], unique)
    await connection.rollback()
    assert await bound.append(QUEUE, [make_task()], unique) == [not unique]
    await connection.commit()
    # Of one id either a live task or a result, whichever way.
    stats = await backend.get_stats(QUEUE)
    assert stats["pending"] + stats["completed"] == 1


@pytest.mark.parametrize("level", LEVELS)
async def test_id_that_was_appended_since_the_snapshot_is_refused_or_seen(
    backend: SqlBackend, bound: BoundBackend, connection: AsyncConnection, level: str
) -> None:
    await backend.append(QUEUE, [make_task()])
    if level == "READ COMMITTED":
        assert await bound.append(QUEUE, [make_task()]) == [False]
        return
    with pytest.raises(TransactionConflictError):
        await bound.append(QUEUE, [make_task()])


@pytest.mark.parametrize("level", LEVELS)
async def test_cancelling_what_was_taken_since_the_snapshot_cancels_nothing(
    backend: SqlBackend, engine: AsyncEngine, level: str
) -> None:
    await backend.append(QUEUE, [make_task()])
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        bound = backend.bind(connection)
        await bound.connect()
        assert await bound.size(QUEUE) == 1
        assert len(await backend.pop(QUEUE)) == 1
        if level == "READ COMMITTED":
            assert await bound.cancel(QUEUE, "task") is None
        else:
            with pytest.raises(TransactionConflictError):
                await bound.cancel(QUEUE, "task")
        await connection.rollback()
    assert (await backend.get_tasks(QUEUE, ["task"]))["task"]["status"] != "cancelled"


@pytest.mark.torture
@pytest.mark.parametrize("level", LEVELS)
async def test_open_transaction_holds_up_only_who_wants_the_same_id(
    backend: SqlBackend, bound: BoundBackend, connection: AsyncConnection
) -> None:
    clock = asyncio.get_running_loop().time
    assert await bound.append(QUEUE, [make_task("held")]) == [True]
    same = asyncio.create_task(backend.append(QUEUE, [make_task("held")]))
    ends_at, number = clock() + 10, 0
    while clock() < ends_at:
        number += 1
        task = make_task(f"other {number}")
        assert await asyncio.wait_for(backend.append(QUEUE, [task]), 5) == [True]
        [taken] = await asyncio.wait_for(backend.pop(QUEUE, timeout=5), 5)
        done = {**taken, "status": "completed", "finished_at": FUTURE.isoformat()}
        await asyncio.wait_for(backend.store_result(QUEUE, done), 5)
    assert not same.done()
    await connection.commit()
    assert await asyncio.wait_for(same, 20) == [False]
    assert [task["id"] for task in await backend.pop(QUEUE)] == ["held"]


@pytest.mark.parametrize("level", ["READ COMMITTED"])
async def test_open_transaction_with_the_first_task_of_a_queue_holds_nobody_up(
    backend: SqlBackend, bound: BoundBackend, connection: AsyncConnection
) -> None:
    assert await bound.append("first", [make_task("held")]) == [True]
    assert await asyncio.wait_for(backend.append("first", [make_task("other")]), 20) == [True]
    await connection.rollback()
    assert await backend.list_queues() == {"first": 1}
