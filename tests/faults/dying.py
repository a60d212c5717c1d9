"""Workflows whose steps leave traces, and processes that are killed between two calls.

Not `from __future__ import annotations`: the host reads the annotations as objects.
"""

import os
import signal
from collections.abc import Generator
from typing import Any

from sheppy import Queue, Task, Worker, workflow

from sheppy_sql import SqlBackend
from tests.concurrency.jobs import trace


@workflow
def two_steps() -> Generator[Task, Any, int]:
    first = yield trace(1)
    second = yield trace(first.result + 1)
    return int(second.result) * 10


def die_at(method: str, nth: int) -> None:
    """Have this process killed as it makes the nth call of a backend's method."""
    original = getattr(SqlBackend, method)
    calls = 0

    async def called(self: SqlBackend, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return await original(self, *args, **kwargs)

    setattr(SqlBackend, method, called)


async def work_until(url: str, queue: str, method: str, nth: str) -> None:
    die_at(method, int(nth))
    # Its scheduler would append as well.
    await Worker(queue, SqlBackend(url), enable_scheduler=False).work()


async def add_workflow_until(url: str, queue: str, method: str, nth: str) -> None:
    die_at(method, int(nth))
    await Queue(SqlBackend(url), queue).add_workflow(two_steps())
