"""Completions through an application's own engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from sheppy import Queue
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sheppy_sql import Completion, SqlBackend
from tests.completing.conftest import Orders, backend_of, begin, complete
from tests.support.databases import TestDatabase

Make = Callable[..., Queue]


@pytest.fixture
async def make_queue(database: TestDatabase) -> AsyncIterator[Make]:
    queues: list[Queue] = []
    engines: list[AsyncEngine] = []

    def make(**options: str) -> Queue:
        engines.append(create_async_engine(database.url, **options))
        queues.append(Queue(SqlBackend(engines[-1]), "test"))
        return queues[-1]

    yield make
    for queue in queues:
        await queue.backend.disconnect()
    for engine in engines:
        await engine.dispose()


@pytest.mark.parametrize("level", [None, "SERIALIZABLE", "AUTOCOMMIT"])
async def test_engines_own_isolation_level_does_not_matter(
    make_queue: Make, orders: Orders, level: str | None
) -> None:
    queue = make_queue(**({} if level is None else {"isolation_level": level}))
    first, second = await begin(queue), await begin(queue)
    seen = []

    async def look(tx: Completion) -> None:
        await tx.flush()
        seen.append(await orders())

    await complete(backend_of(queue), first, 1, then=look)
    with pytest.raises(RuntimeError):
        await complete(backend_of(queue), second, 2, then=_raise)
    assert seen == [[]]
    assert await orders() == [1]
    assert (await queue.get_task(first) or first).status == "completed"
    assert (await queue.get_task(second) or second).status == "new"


async def _raise(tx: Completion) -> None:
    await tx.flush()
    raise RuntimeError


async def test_engine_that_begins_by_itself_is_begun_as_ours(
    make_queue: Make, orders: Orders, database: TestDatabase
) -> None:
    queue = make_queue()
    engine = backend_of(queue)._url_or_engine
    assert isinstance(engine, AsyncEngine)
    if database.dialect == "sqlite":

        @event.listens_for(engine.sync_engine, "begin")
        def _begin(connection: object) -> None:
            connection.exec_driver_sql("BEGIN")  # type: ignore[attr-defined]  # as SQLAlchemy says

    await complete(backend_of(queue), await begin(queue), 1)
    assert await orders() == [1]


async def test_tasks_complete_at_once(make_queue: Make, orders: Orders) -> None:
    """On SQLite they take turns, without waiting for the file's lock."""
    queue = make_queue()
    tasks = [await begin(queue) for _ in range(10)]

    async def stay(tx: Completion) -> None:
        await tx.flush()
        await asyncio.sleep(0.01)

    await asyncio.gather(
        *(complete(backend_of(queue), task, number, then=stay) for number, task in enumerate(tasks))
    )
    assert await orders() == list(range(10))
