"""Tasks that enqueue others, and a process that is killed before their result is stored.

Not `from __future__ import annotations`: the host reads the annotations as objects.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from sheppy import CURRENT_TASK, Queue, Task, Worker, task

from sheppy_sql import SqlBackend
from sheppy_sql.middleware import children_with_result
from tests.concurrency.jobs import trace
from tests.faults.dying import die_at

SELF: Any = CURRENT_TASK

queues: dict[str, Queue] = {}
"""Where tasks enqueue others, by name; as an application has its queues in a module."""
answers: list[Any] = []
left_running: list[asyncio.Task[Any]] = []
gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
actions: dict[str, Callable[[Queue], Awaitable[Any]]] = {}


@task
async def leaf(number: int) -> int:
    return number


@task
async def act(name: str) -> Any:
    """Does what the test says, with the queue of the application."""
    return await actions[name](queues["test"])


@task(retry=3, retry_delay=0)
async def fail_once(self: Task = SELF) -> None:
    await queues["test"].add(leaf(1))
    if self.retry_count == 0:
        raise RuntimeError("not yet")


@task(middleware=[children_with_result])
async def add_under_its_own_middleware(fails: bool) -> None:
    await queues["test"].add(leaf(1))
    if fails:
        raise RuntimeError("broken")


@task
async def add_and_wait(number: int, fails: bool) -> None:
    await queues["test"].add(leaf(number))
    gates[f"{number} has added"].set()
    await gates["go on"].wait()
    if fails:
        raise RuntimeError("broken")


@task
async def have_children() -> Task:
    """Two at once, one in time, and one as its result; each in its own way."""
    queue = queues["test"]
    await trace_now(0)
    await queue.add([trace(1), trace(2)])
    await queue.schedule(trace(3), timedelta(0))
    return trace(4)


async def trace_now(number: int) -> None:
    await trace.__wrapped__(number)  # type: ignore[attr-defined]  # the host's decorator has it


async def work_until_it_stores(url: str, *middleware: str) -> None:
    die_at("store_result", 1)
    backend = SqlBackend(url, lease=1)
    queues["test"] = Queue(SqlBackend(url), "test")
    used: Any = [children_with_result] if middleware else []
    # Its scheduler would put in line what is due.
    worker = Worker(
        "test", backend, enable_scheduler=False, max_concurrent_tasks=1, middleware=used
    )
    await worker.work()
