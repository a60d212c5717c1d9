"""Rate limits: never too many starts in a period, and every task runs in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from sheppy import Queue, Task

from sheppy_sql import SqlBackend
from tests.host.support import MakeBackend, all_finished, running, until
from tests.host.tasks import (
    MAX_RATE,
    RATE_PERIOD,
    journal,
    keep_to_windows,
    one_of_two,
    other_of_two,
    record,
    slide,
)
from tests.support import make_worker

CLOCK_SLACK = 0.005  # seconds between the clock of the database and ours

Permission = tuple[float, float]
"""When a task was allowed to start: after the first, before the second."""


def record_permissions(backend: SqlBackend, permissions: list[Permission]) -> None:
    acquire = backend.acquire_rate_limit

    async def acquire_and_record(*args: Any, **kwargs: Any) -> float | None:
        before = time.monotonic()
        wait = await acquire(*args, **kwargs)
        if wait is None:
            permissions.append((before, time.monotonic()))
        return wait

    setattr(backend, "acquire_rate_limit", acquire_and_record)  # noqa: B010


@pytest.mark.parametrize(
    ("task", "at_most"),
    # Two windows may meet within a period.
    [(slide, MAX_RATE), (keep_to_windows, 2 * MAX_RATE)],
    ids=["sliding", "fixed"],
)
async def test_two_workers_together_keep_the_rate(
    make_backend: MakeBackend, task: Callable[[], Task], at_most: int
) -> None:
    queue = Queue(await make_backend(), "test")
    tasks = [task() for _ in range(2 * MAX_RATE + 1)]
    permissions: list[Permission] = []
    workers = []
    for _ in range(2):
        backend = await make_backend()
        record_permissions(backend, permissions)
        workers.append(make_worker(backend))
    await queue.add(tasks)
    async with running(*workers):
        await all_finished(queue, tasks)
    assert sorted(run.task_id for run in journal) == sorted(task.id for task in tasks)
    assert len(permissions) == len(tasks)
    spans = spans_of(permissions, at_most + 1) + spans_of(permissions[: MAX_RATE + 1], MAX_RATE + 1)
    assert min(spans) > RATE_PERIOD - CLOCK_SLACK


def spans_of(permissions: list[Permission], count: int) -> list[float]:
    """The longest that each `count` successive permissions can have been apart."""
    befores = sorted(before for before, _ in permissions)
    afters = sorted(after for _, after in permissions)
    return [last - first for first, last in zip(befores, afters[count - 1 :], strict=False)]


async def test_tasks_with_one_key_share_a_limit(queue: Queue) -> None:
    unlimited = record(1)
    await queue.add([one_of_two(), other_of_two(), unlimited])

    async def one_has_run_and_one_waits() -> bool:
        return len(journal) == 2 and len(await queue.get_scheduled()) == 1

    async with running(make_worker(queue.backend)):
        await until(one_has_run_and_one_waits)
    [waiting] = await queue.get_scheduled()
    assert waiting.status == "scheduled"
    assert waiting.id not in {run.task_id for run in journal}
    assert await queue.size() == 0


async def test_queues_do_not_share_a_limit(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    tasks = {name: one_of_two() for name in ("first", "second")}
    async with running(make_worker(backend, list(tasks))):
        for name, task in tasks.items():
            await Queue(backend, name).add(task)
        for name, task in tasks.items():
            await all_finished(Queue(backend, name), [task])
    assert len(journal) == 2
