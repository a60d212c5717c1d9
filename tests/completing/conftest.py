"""The application's table, and what is in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from sheppy import Queue
from sqlalchemy.ext.asyncio import create_async_engine

from tests.completing import tasks
from tests.completing.tasks import Order
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase

if TYPE_CHECKING:
    from sheppy import Task

    from sheppy_sql import Completion, SqlBackend


Orders = Callable[[], Awaitable[list[int]]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for memory in (tasks.backends, tasks.actions):
        memory.clear()
    yield
    tasks.backends.clear()


@pytest.fixture
async def orders(database: TestDatabase) -> Orders:
    """The numbers of the orders that are committed."""
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        await connection.run_sync(tasks.Base.metadata.create_all)
    await engine.dispose()
    await database.let_worker_use_all()

    async def numbers() -> list[int]:
        return [number for (number,) in await database.fetch("SELECT id FROM orders ORDER BY id")]

    return numbers


@pytest.fixture
def app(backend: SqlBackend) -> Queue:
    """A queue of the application, whose tasks complete through the worker's own backend."""
    tasks.backends["app"] = backend
    return Queue(backend, "test")


async def run(queue: Queue, *to_run: Task) -> list[Task]:
    """The tasks once a worker has run each of them, once."""
    await queue.add(list(to_run))
    worker = make_worker(queue.backend, queue.name, enable_scheduler=False)
    await run_worker(worker, max_tasks=len(to_run))
    found = await queue.get_task([*to_run])
    return [found[task.id] for task in to_run]


async def complete(
    backend: SqlBackend,
    task: Task,
    *numbers: int,
    queue: str | None = None,
    then: Callable[[Completion], Awaitable[Any]] | None = None,
) -> None:
    """Complete a task with these orders, after whatever else is to happen in the block."""
    async with backend.complete(task, queue) as tx:
        tx.add_all(Order(id=number) for number in numbers)
        if then is not None:
            await then(tx)


async def fail(tx: Completion) -> None:
    await tx.flush()
    raise RuntimeError("broken")


def backend_of(queue: Queue) -> SqlBackend:
    from sheppy_sql import SqlBackend

    assert isinstance(queue.backend, SqlBackend)
    return queue.backend


async def begin(queue: Queue, name: str = "task") -> Task:
    """A task that a worker has just taken."""
    await queue.add(tasks.act(name))
    [popped] = await queue._pop_pending(limit=1)
    return popped
