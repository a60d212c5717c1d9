"""Tasks that a worker has no room for yet come with the end of those before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sheppy import BackendError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import SqlBackend, _finisher, _taker
from tests.contract.tasks import MakeBackend, finished, ids, make_task
from tests.support.databases import TestDatabase

QUEUE = "test"
FIRST = ["one", "two", "three"]
SOON = 20.0  # seconds


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits here waits for what it is to wait for."""
    monkeypatch.setattr(_taker, "MOST_DELAY", 3600.0)
    monkeypatch.setattr(_finisher, "LOCK_TIMEOUT", 3600.0)


@asynccontextmanager
async def results_held_up(backend: SqlBackend, database: TestDatabase) -> AsyncIterator[None]:
    """Those of three tasks are on their way, and stay there until the block ends."""
    await backend.append(QUEUE, [make_task(task_id) for task_id in FIRST])
    tasks = await backend.pop(QUEUE, len(FIRST))
    engine = create_async_engine(database.url)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1 FROM sheppy_tasks FOR UPDATE"))
        storing = asyncio.gather(*(backend.store_result(QUEUE, finished(task)) for task in tasks))
        await asyncio.sleep(0)
        assert backend._connected.storer.finisher.count(QUEUE) == len(FIRST)
        yield
        assert not storing.done()
    await engine.dispose()
    assert all(await asyncio.wait_for(storing, SOON))


async def test_as_many_as_were_asked_for_wait_for_the_end_of_those_before(
    backend: SqlBackend, make_backend: MakeBackend, database: TestDatabase
) -> None:
    other = await make_backend()
    async with results_held_up(backend, database):
        await other.append(QUEUE, [make_task("four"), make_task("five")])
        popping = asyncio.create_task(backend.pop(QUEUE, 2))
        while await other.size(QUEUE):  # noqa: ASYNC110  # of the server
            await asyncio.sleep(0.01)
        # Long enough for the answer, which the other one's look has followed.
        assert not (await asyncio.wait([popping], timeout=0.5))[0]
    assert ids(await asyncio.wait_for(popping, SOON)) == ["four", "five"]


async def test_fewer_than_were_asked_for_come_at_once(
    backend: SqlBackend, make_backend: MakeBackend, database: TestDatabase
) -> None:
    """There is room, or it would not have asked for more."""
    other = await make_backend()
    async with results_held_up(backend, database):
        await other.append(QUEUE, [make_task("four"), make_task("five")])
        assert ids(await asyncio.wait_for(backend.pop(QUEUE, 3), SOON)) == ["four", "five"]


async def test_more_than_are_about_to_end_come_at_once(
    backend: SqlBackend, make_backend: MakeBackend, database: TestDatabase
) -> None:
    other = await make_backend()
    async with results_held_up(backend, database):
        await other.append(QUEUE, [make_task(f"new {number}") for number in range(4)])
        assert len(await asyncio.wait_for(backend.pop(QUEUE, 4), SOON)) == 4


async def test_cancelled_meanwhile_they_are_handed_back(
    backend: SqlBackend, make_backend: MakeBackend, database: TestDatabase
) -> None:
    other = await make_backend()
    async with results_held_up(backend, database):
        await other.append(QUEUE, [make_task("four"), make_task("five")])
        popping = asyncio.create_task(backend.pop(QUEUE, 2))
        while await other.size(QUEUE):  # noqa: ASYNC110  # of the server
            await asyncio.sleep(0.01)
        popping.cancel()
        await asyncio.wait([popping], timeout=SOON)
        assert popping.cancelled()
        assert not any(work.done() for work in backend._connected.database._attempts._unwanted)
        assert ids(await other.pop(QUEUE, 2)) == ["four", "five"]
    assert await other.get_stats(QUEUE) == {"pending": 0, "completed": 3, "scheduled": 0}


async def test_disconnected_meanwhile_they_are_nobodys_who_was_told(
    backend: SqlBackend, make_backend: MakeBackend, database: TestDatabase
) -> None:
    other = await make_backend()
    async with results_held_up(backend, database):
        await other.append(QUEUE, [make_task("four")])
        popping = asyncio.create_task(backend.pop(QUEUE))
        while await other.size(QUEUE):  # noqa: ASYNC110  # of the server
            await asyncio.sleep(0.01)
        taker = backend._connected.consumer._taker
        leaving = asyncio.create_task(backend.disconnect())
        while not taker._closed:  # noqa: ASYNC110  # no event tells it
            await asyncio.sleep(0)
    with pytest.raises(BackendError, match="disconnected meanwhile"):
        await asyncio.wait_for(popping, SOON)
    await asyncio.wait_for(leaving, SOON)
    assert ids(await other.pop(QUEUE, 5)) == ["four"]


async def test_no_longer_than_a_moment(
    backend: SqlBackend,
    make_backend: MakeBackend,
    database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_taker, "MOST_DELAY", 0.01)
    other = await make_backend()
    async with results_held_up(backend, database):
        await other.append(QUEUE, [make_task("four")])
        assert ids(await asyncio.wait_for(backend.pop(QUEUE), SOON)) == ["four"]
