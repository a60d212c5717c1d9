"""Middleware for sheppy's workers and tasks."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from sheppy import Queue, Task

from ._backend import SqlBackend


async def children_with_result(
    task: Task, queue: Queue
) -> AsyncGenerator[None, tuple[Task, Exception | None]]:
    """Enqueue what a task enqueues if and only if its result is stored.

    For `Worker(..., middleware=[children_with_result])` or `@task(middleware=[..])`. What the
    task function, and sheppy for a task that it returns, hands to `queue.add` or
    `queue.schedule` is held in memory and written in the transaction that stores the result
    of the completed task. A task that fails, is to be retried, is taken over by another worker
    or dies with its worker enqueues nothing. Without this, one that runs again enqueues again.

    Both answer as ever, by what is stored at that moment: False for an id that is taken. But
    nobody sees the new tasks before the task has ended, so one that waits for the result of its
    own child waits for ever. Not held back: `queue.retry`, workflows and crons that are added,
    what goes to another installation or another kind of backend, and what asyncio tasks enqueue
    that are left running when the task has ended.
    """
    backend = queue.backend
    if isinstance(backend, SqlBackend):
        backend._begin_unit(queue.name, str(task.id))
    yield
