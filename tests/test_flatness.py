"""What the hot path reads does not grow: not with a backlog, results, or rows that are gone."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql import SqlBackend
from tests.support.databases import TestDatabase

MILLION = 1_000_000
DEAD = 100_000
ROUNDS = 24
GONE = 20_000
LIVE = 10_000
LONG_AGO = datetime(2000, 1, 1, tzinfo=timezone.utc)
SOMETIME = datetime(2100, 1, 1, tzinfo=timezone.utc)
FEW = 300
"""Pages that all scans of one statement may read together: some levels of a few indexes.

With each of the rows in question they would be thousands.
"""

PENDING = (
    "INSERT INTO sheppy_tasks (queue, id, payload, state, position)"
    " SELECT 'q', {prefix} || n, '{{}}', 'pending', n FROM {numbers} AS numbers"
)
SCHEDULED = (
    "INSERT INTO sheppy_scheduled_tasks (queue, task_id, run_at, kind)"
    " SELECT 'q', 'x' || n, now() - interval '1 hour', 'due' FROM {numbers} AS numbers"
)
RESULTS = (
    "INSERT INTO sheppy_results (queue, id, payload, finished_at)"
    " SELECT 'q', 'r' || n, '{{}}', '2026-01-01 00\\:00\\:00' FROM {numbers} AS numbers"
)

CALLS: dict[str, Callable[[SqlBackend], Awaitable[Any]]] = {
    "pop": lambda b: b.pop("q"),
    "pop of many": lambda b: b.pop("q", 10),
    "pop of an empty queue": lambda b: b.pop("empty"),
    "pop_scheduled": lambda b: b.pop_scheduled("q"),
}


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


@pytest.fixture
async def plain(database: TestDatabase) -> AsyncIterator[AsyncEngine]:
    """One without the settings of ours, as an application's is."""
    engine = create_async_engine(database.url, poolclass=NullPool)
    yield engine
    await engine.dispose()


def numbers(count: int) -> str:
    return f"generate_series(1, {count}) AS n, (SELECT 1)"


@asynccontextmanager
async def held_snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Keeps vacuum from removing anything."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        await connection.execute(text("SELECT 1"))
        yield connection


async def pages(backend: SqlBackend, engines: list[AsyncEngine], call: Any) -> dict[str, int]:
    """The most that one statement of the call read, by the statement; each run on all engines."""
    statements: list[tuple[str, Any]] = []
    ours = backend._connected.database.engine

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(ours.sync_engine, "before_cursor_execute", record)
    await call()
    event.remove(ours.sync_engine, "before_cursor_execute", record)
    read: dict[str, int] = {}
    for statement, parameters in statements:
        for engine in engines:
            async with engine.connect() as connection:
                explained = await connection.exec_driver_sql(
                    f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters
                )
                plan = explained.scalar_one()[0]["Plan"]
                await connection.rollback()
            count = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
            read[statement] = max(count, read.get(statement, 0))
    return read


async def assert_flat(backend: SqlBackend, plain: AsyncEngine) -> None:
    engines = [backend._connected.database.engine, plain]
    for name, call in CALLS.items():
        # On every connection that the backend may have: one that is new to it begins at the ground.
        await asyncio.gather(*(call(backend) for _ in range(backend._options.pool_size)))
        # Back into the pool, of which the plans are asked as well.
        await backend._connected.database._connections._release()
        # The first look finds the floor.
        await call(backend)
        read = await pages(backend, engines, functools.partial(call, backend))
        assert read, name
        for statement, count in read.items():
            assert count < FEW, (name, count, statement)


async def test_claims_pass_over_what_a_long_transaction_keeps(
    backend: SqlBackend, database: TestDatabase, plain: AsyncEngine
) -> None:
    async with held_snapshot(plain):
        for insertion in (PENDING, SCHEDULED):
            await database.execute(insertion.format(prefix="'x'", numbers=numbers(DEAD)))
        await database.execute("SELECT setval('sheppy_positions', 1000000)")
        await database.execute("DELETE FROM sheppy_tasks")
        await database.execute("DELETE FROM sheppy_scheduled_tasks")
        await assert_flat(backend, plain)
        # Statistics by which there is nothing, whatever is read.
        async with plain.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("VACUUM ANALYZE sheppy_tasks, sheppy_scheduled_tasks"))
        await assert_flat(backend, plain)
        await backend.append("q", [{"id": f"{n}"} for n in range(50)])
        assert len(await backend.pop("q", 5)) == 5
        await assert_flat(backend, plain)


@pytest.mark.torture
@pytest.mark.timeout(300)
@pytest.mark.parametrize("analyzed", [False, True])
async def test_claims_read_as_little_with_a_million_tasks_or_results(
    backend: SqlBackend, database: TestDatabase, plain: AsyncEngine, analyzed: bool
) -> None:
    for insertion in (PENDING, RESULTS, RESULTS.replace("'r'", "'s'")):
        await database.execute(insertion.format(prefix="'x'", numbers=numbers(MILLION)))
    await database.execute("SELECT setval('sheppy_positions', 2000000)")
    if analyzed:
        await database.execute("ANALYZE")
    await assert_flat(backend, plain)


async def test_plans_that_were_made_for_a_small_queue_serve_a_large_one(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await backend.append("q", [{"id": f"{n}"} for n in range(30)])
    async with backend._connected.database.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("ANALYZE"))
    for _ in range(12):
        assert await backend.pop("q")
    await database.execute(
        PENDING.format(prefix="'x'", numbers=numbers(DEAD)).replace(", n FROM", ", 1000 + n FROM")
    )
    await database.execute("SELECT setval('sheppy_positions', 2000000)")
    rows = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'sheppy_tasks'"
    [(before,)] = await database.fetch(rows)
    for _ in range(12):
        assert await backend.pop("q")
    await backend.disconnect()  # which tells the statistics
    [(after,)] = await database.fetch(rows)
    assert after - before < DEAD


async def _finish(backend: SqlBackend, tasks: list[dict[str, Any]]) -> None:
    ended = [{**task, "finished_at": "now"} for task in tasks]
    await asyncio.gather(*(backend.store_result("q", task) for task in ended))


async def _append_again(backend: SqlBackend, tasks: list[dict[str, Any]]) -> None:
    assert await backend.append("q", tasks, unique=True) == [False] * len(tasks)


async def _promote(backend: SqlBackend, _: object) -> None:
    await backend.schedule("q", {"id": str(uuid4()), "status": "scheduled"}, LONG_AGO)
    due = await backend.pop_scheduled("q")
    assert len(due) == 1
    await backend.append("q", [{**due[0], "status": "pending"}], unique=False)


BY_ID: dict[str, Callable[[SqlBackend, list[dict[str, Any]]], Awaitable[Any]]] = {
    "store_result": _finish,
    "acknowledge": lambda b, tasks: b.acknowledge("q", ids_of(tasks)),
    "heartbeat": lambda b, tasks: b.heartbeat("q", ids_of(tasks)),
    "get_tasks": lambda b, tasks: b.get_tasks("q", ids_of(tasks)),
    "get_results": lambda b, tasks: b.get_results("q", ids_of(tasks)),
    "append, unique": _append_again,
    "append": lambda b, tasks: b.append("q", tasks, unique=False),
    "append of many": lambda b, _: b.append("q", [{"id": str(uuid4())} for _ in range(400)]),
    "schedule": lambda b, tasks: b.schedule("q", tasks[0], SOMETIME, unique=False),
    "schedule, unique": lambda b, _: b.schedule("q", {"id": str(uuid4())}, SOMETIME),
    "schedule, due": _promote,
    "cancel": lambda b, tasks: b.cancel("q", tasks[0]["id"]),
}


def ids_of(tasks: list[dict[str, Any]]) -> list[str]:
    return [task["id"] for task in tasks]


@pytest.mark.parametrize("call", BY_ID)
async def test_tasks_are_found_by_id_without_reading_the_queue_whatever_statistics_say(
    backend: SqlBackend, database: TestDatabase, plain: AsyncEngine, call: str
) -> None:
    """By those of a queue that was just drained, its tasks are all but none."""
    for insertion in (PENDING, RESULTS):
        await database.execute(insertion.format(prefix="'x'", numbers=numbers(GONE)))
    await database.execute("SELECT setval('sheppy_positions', 2000000)")
    for table in ("sheppy_tasks", "sheppy_results"):
        await database.execute(f"DELETE FROM {table}")
    async with plain.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("ANALYZE sheppy_tasks, sheppy_results"))
    await database.execute(RESULTS.format(prefix="'x'", numbers=numbers(LIVE)))
    for start in range(0, LIVE, 1000):
        await backend.append("q", [{"id": f"{start + n}"} for n in range(1000)])
    read = "SELECT sum({column}) FROM {view} WHERE relname IN ('sheppy_tasks', 'sheppy_results')"
    entries = read.format(column="idx_tup_read", view="pg_stat_user_indexes")
    rows = read.format(column="seq_tup_read", view="pg_stat_user_tables")
    [(before,)] = await database.fetch(f"SELECT ({entries}) + ({rows})")
    for _ in range(ROUNDS):
        tasks = await backend.pop("q", 10)
        assert len(tasks) == 10
        await BY_ID[call](backend, tasks)
    await backend.disconnect()  # which tells the statistics
    [(after,)] = await database.fetch(f"SELECT ({entries}) + ({rows})")
    # What is gone was read a few times: by the first look, and, if the server tells it late, as it
    # was deleted.
    assert after - before < 5 * GONE < ROUNDS * LIVE / 2
