"""One transaction for the application and its queues, rolled back after the test."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sheppy import Queue
from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sheppy_sql import SqlBackend
from sheppy_sql.testing import RolledBack, assert_enqueued, assert_not_enqueued, drain, rolled_back
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.testing.shop import note
from tests.transactions.shop import EMAILS, Base, Order, send_receipt


@pytest.fixture
async def tables(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def test_nothing_stays_of_what_was_committed(
    database: TestDatabase, engine: AsyncEngine, tables: None
) -> None:
    for _ in range(2):
        async with rolled_back(engine) as inside:
            queue = Queue(inside.backend, EMAILS)
            async with inside.sessions() as session, session.begin():
                session.add(Order(id=1))
                await Queue(inside.backend.bind(session), EMAILS).add(send_receipt(1))
            await queue.schedule(send_receipt(2), timedelta(hours=1))
            await assert_enqueued(queue, send_receipt, count=2)
            async with inside.sessions() as session:
                assert await session.scalar(select(func.count()).select_from(Order)) == 1
            assert [task.result for task in await drain(queue)] == ["sent for 1"]
            await queue.add(send_receipt(3))
            await inside.backend.pop(EMAILS)
    assert await database.fetch("SELECT id FROM orders") == []
    tables_of_ours = ("tasks", "scheduled_tasks", "results", "queues", "consumers", "receipts")
    for table in tables_of_ours:
        assert await database.fetch(f"SELECT * FROM sheppy_{table}") == [], table


async def test_rollback_of_the_application_takes_its_tasks_along(
    tables: None, inside: RolledBack
) -> None:
    queue = Queue(inside.backend, EMAILS)
    await queue.add(send_receipt(1))
    async with inside.sessions() as session:
        await session.execute(insert(Order).values(id=2))
        await Queue(inside.backend.bind(session), EMAILS).add(send_receipt(2))
        await session.rollback()
    await assert_enqueued(queue, send_receipt, count=1)
    await assert_not_enqueued(queue, send_receipt(2))


async def test_worker_of_sheppy_runs_in_it_as_well(inside: RolledBack) -> None:
    queue, job = Queue(inside.backend, "shop"), note("a")
    await queue.add(job)
    waiting = asyncio.create_task(queue.wait_for(job, timeout=60))
    await run_worker(make_worker(inside.backend, "shop"), 1)
    done = await waiting
    assert done is not None
    assert done.result == "a"


async def test_two_of_them_do_not_wait_for_each_other(
    postgres_database: TestDatabase,
) -> None:
    engine = create_async_engine(postgres_database.url, isolation_level="AUTOCOMMIT")
    async with rolled_back(engine) as one, rolled_back(engine) as other:
        for inside in (one, other):
            queue = Queue(inside.backend, "shop")
            await asyncio.wait_for(queue.add(note("a")), 30)
            assert len(await asyncio.wait_for(drain(queue), 30)) == 1
    await engine.dispose()


async def test_error_in_the_block_rolls_back_too(engine: AsyncEngine, backend: SqlBackend) -> None:
    async def go_wrong() -> None:
        async with rolled_back(engine) as inside:
            await Queue(inside.backend, "shop").add(note("a"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await go_wrong()
    assert await backend.get_all_tasks("shop") == []


async def test_bad_options_and_missing_tables_are_told(
    empty_database: TestDatabase,
) -> None:
    engine = create_async_engine(empty_database.url)
    with pytest.raises(ValueError, match="ttl"):
        async with rolled_back(engine, ttl=-1):
            pass
    await engine.dispose()
