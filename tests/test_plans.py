"""The statements on the hot path, as they go out, and how the databases run them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import event

from sheppy_sql import SqlBackend
from tests.support.databases import TestDatabase

ROWS = 20_000


@pytest.fixture
async def large(backend: SqlBackend, database: TestDatabase) -> SqlBackend:
    """A queue with many tasks of every kind, and statistics about them."""
    for start in range(0, ROWS, 10_000):
        tasks = [{"id": f"{n:06}", "finished_at": None} for n in range(start, start + 10_000)]
        await backend.append("q", tasks)
    await database.execute(
        "UPDATE sheppy_tasks SET state = 'scheduled', position = NULL WHERE id < '010000'"
    )
    await database.execute(
        "INSERT INTO sheppy_scheduled_tasks (queue, task_id, run_at, kind)"
        " SELECT queue, id, '2999-01-01 00:00:00', 'due' FROM sheppy_tasks WHERE id < '010000'"
    )
    await database.execute(
        "INSERT INTO sheppy_results (queue, id, payload, finished_at)"
        " SELECT queue, 'r' || id, payload, '2026-01-01 00:00:00' FROM sheppy_tasks"
    )
    await database.execute("ANALYZE")
    return backend


async def plans(
    backend: SqlBackend, database: TestDatabase, call: Callable[[], Awaitable[Any]]
) -> list[str]:
    """The plan of each statement that `call` sends, for the parameters that it sends."""
    statements: list[tuple[str, Any]] = []
    engine = backend._connected.database.engine

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", record)
    await call()
    event.remove(engine.sync_engine, "before_cursor_execute", record)
    explain = "EXPLAIN QUERY PLAN" if database.dialect == "sqlite" else "EXPLAIN"
    found = []
    async with engine.connect() as connection:
        for statement, parameters in statements:
            if statement.split()[0] in {"SELECT", "UPDATE", "INSERT", "DELETE", "WITH"}:
                rows = await connection.exec_driver_sql(f"{explain} {statement}", parameters)
                found.append("\n".join(str(row[-1]) for row in rows))
        await connection.rollback()
    return found


CALLS: dict[str, Callable[[SqlBackend], Awaitable[Any]]] = {
    "pop": lambda b: b.pop("q", 10),
    "pop of an empty queue": lambda b: b.pop("empty", 10),
    "get_pending": lambda b: b.get_pending("q", 10),
    "pop_scheduled": lambda b: b.pop_scheduled("q"),
    "append": lambda b: b.append("q", [{"id": "new"}]),
    "append again": lambda b: b.append("q", [{"id": "new"}], unique=False),
    "store_result": lambda b: b.store_result("q", {"id": "020000", "finished_at": "now"}),
    "get_results": lambda b: b.get_results("q", ["r020000"]),
    "get_tasks": lambda b: b.get_tasks("q", ["020000", "r020000"]),
}


async def assert_nothing_is_read_whole(backend: SqlBackend, database: TestDatabase) -> None:
    for name, call in CALLS.items():
        found = await plans(backend, database, functools.partial(call, backend))
        assert found, name
        for plan in found:
            assert "Seq Scan on sheppy_" not in plan, (name, plan)
            assert "SCAN sheppy_" not in plan, (name, plan)
            # Only what was made pending since the last look is sorted.
            sorts = plan.count("Sort Key: sheppy_tasks")
            assert sorts <= plan.count("using sheppy_tasks_pending_xid on"), (name, plan)


async def test_no_statement_of_the_hot_path_reads_a_whole_table(
    large: SqlBackend, database: TestDatabase
) -> None:
    await assert_nothing_is_read_whole(large, database)


MILLION = """
    WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1000000)
    INSERT INTO {into} FROM numbers
"""
MILLIONS = (
    "sheppy_tasks (queue, id, payload, state, position) SELECT 'q', n, '{}', 'pending', n",
    "sheppy_results (queue, id, payload, finished_at) SELECT 'q', 'r' || n, '{}', '2026-01-01'",
    "sheppy_scheduled_tasks (queue, task_id, run_at, kind) SELECT 'q', n, '2999-01-01', 'due'",
)


@pytest.mark.torture
@pytest.mark.timeout(300)
@pytest.mark.parametrize("analyzed", [False, True])
async def test_a_file_with_a_million_tasks_and_results_is_not_read_whole(
    sqlite_database: TestDatabase, analyzed: bool
) -> None:
    """On PostgreSQL it is counted what is read: see test_flatness.py."""
    for into in MILLIONS:
        await sqlite_database.execute(MILLION.format(into=into))
    if analyzed:
        await sqlite_database.execute("ANALYZE")
    backend = SqlBackend(sqlite_database.url)
    await backend.connect()
    await assert_nothing_is_read_whole(backend, sqlite_database)
    assert len(await backend.pop("q", 10)) == 10
    await backend.disconnect()


async def test_looking_for_stuck_workflows_does_not_read_the_finished_ones(
    large: SqlBackend, database: TestDatabase
) -> None:
    await database.execute(
        "INSERT INTO sheppy_workflows (queue, id, payload, finished, created_at)"
        " SELECT queue, id, payload, id < '019990', '2026-01-01 00:00:00' FROM sheppy_tasks"
    )
    await database.execute("ANALYZE")
    sweeper = large._connected.sweeper
    assert sweeper is not None
    look, *_ = await plans(large, database, functools.partial(sweeper._stalled, "q", ""))
    assert "sheppy_workflows_unfinished" in look
    assert "Seq Scan on sheppy_workflows" not in look
    assert "SCAN sheppy_" not in look
