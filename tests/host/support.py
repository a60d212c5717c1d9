"""Workers that run while a test looks on, and conditions to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from tests.support import POLL_INTERVAL

if TYPE_CHECKING:
    from sheppy import Queue, Task, Worker

    from sheppy_sql import SqlBackend

MakeBackend = Callable[..., Awaitable["SqlBackend"]]

PATIENCE = 30.0  # seconds for what takes milliseconds, unless the machine is busy


@asynccontextmanager
async def running(*workers: Worker) -> AsyncIterator[None]:
    """Let workers work; at the end they stop in order, having finished what they had begun."""
    work = [asyncio.create_task(w.work(register_signal_handlers=False)) for w in workers]
    try:
        yield
    finally:
        await asyncio.wait_for(asyncio.gather(*map(stop, workers), *work), PATIENCE)


async def stop(worker: Worker) -> None:
    """Ask a worker to stop, as a signal does."""
    worker._shutdown_event.set()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once the condition holds; TimeoutError where it never does."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition.__qualname__} did not hold within {PATIENCE} seconds")
        await asyncio.sleep(POLL_INTERVAL)


async def finished(queue: Queue, task: Task | UUID) -> Task:
    """The task once it has ended."""
    ended = await queue.wait_for(task, timeout=PATIENCE)
    assert ended is not None
    return ended


async def all_finished(queue: Queue, tasks: list[Task]) -> list[Task]:
    """The tasks, in this order, once all of them have ended."""
    ended = await queue.wait_for([*tasks], timeout=PATIENCE)
    return [ended[task.id] for task in tasks]


async def stored(queue: Queue, task: Task | UUID) -> Task:
    """The task as it is now."""
    found = await queue.get_task(task)
    assert found is not None
    return found
