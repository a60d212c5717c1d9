"""Middleware around tasks, and what tasks are given by their dependencies."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator

import pytest
from sheppy import Queue, Task

from tests.host.middleware import (
    Ended,
    add_and_double,
    add_in_between,
    add_under_broken,
    base,
    depend,
    fail_in_between,
    from_generator,
    inner,
    outer,
    seen,
)
from tests.host.support import all_finished, finished, stored
from tests.host.tasks import add, journal
from tests.support import make_worker, run_worker


async def test_middleware_of_a_task_surrounds_it(queue: Queue) -> None:
    await queue.add(add_in_between(1, 2))
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert seen == [
        "outer, before, in test",
        "inner, before, in test",
        "inner, after, completed, None",
        "outer, after, completed, None",
    ]


async def test_middleware_hears_of_an_error(queue: Queue) -> None:
    task = fail_in_between()
    await queue.add(task)
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert (await finished(queue, task)).error == "RuntimeError: broken"
    assert seen[2:] == [
        "inner, after, failed, RuntimeError('broken')",
        "outer, after, failed, RuntimeError('broken')",
    ]


async def test_middleware_of_a_worker_surrounds_every_task(queue: Queue) -> None:
    tasks = [add(1, 2), add_in_between(3, 4)]
    await queue.add(tasks)
    worker = make_worker(queue.backend, middleware=[inner, outer], max_concurrent_tasks=1)
    await run_worker(worker, oneshot=True)
    await all_finished(queue, tasks)
    before = [line.split(",")[0] for line in seen if "before" in line]
    after = [line.split(",")[0] for line in seen if "after" in line]
    assert before == ["inner", "outer", "inner", "outer", "outer", "inner"]
    assert after == ["outer", "inner", "inner", "outer", "outer", "inner"]


async def test_what_middleware_makes_of_a_result_is_stored(queue: Queue) -> None:
    task = add_and_double(1, 2)
    await queue.add(task)
    await run_worker(make_worker(queue.backend, ["test", "audit"]), max_tasks=2)
    assert (await finished(queue, task)).result == 6
    # It added a task to another queue of the same backend.
    assert [run.value for run in journal] == [6]


async def test_middleware_that_breaks_afterwards_does_not_undo_the_task(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [add_under_broken(1, 2), add(3, 4)]
    await queue.add(tasks)
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert [task.result for task in await all_finished(queue, tasks)] == [3, 7]
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert errors == ["Middleare exception!"]
    caplog.clear()


async def test_middleware_sees_the_task_as_it_is_stored(queue: Queue) -> None:
    task, found = add(1, 2), []

    async def look(running: Task, queue: Queue) -> AsyncGenerator[None, Ended]:
        found.append((await stored(queue, running)).status)
        await queue.backend.size(queue.name)
        yield

    await queue.add(task)
    await run_worker(make_worker(queue.backend, middleware=[look]), oneshot=True)
    assert found == ["new"]
    assert (await finished(queue, task)).result == 3


async def test_dependencies_are_given_to_a_task(queue: Queue) -> None:
    task = depend(1)  # type: ignore[call-arg]  # the worker gives the others
    await queue.add(task)
    await run_worker(make_worker(queue.backend), oneshot=True)
    done = await finished(queue, task)
    assert (done.error, done.result) == (None, [1, 41, "generated", "later"])


async def test_dependencies_may_be_replaced_in_a_worker(queue: Queue) -> None:
    task = depend(1)  # type: ignore[call-arg]  # the worker gives the others
    await queue.add(task)
    overrides = {base: lambda: 0, from_generator: lambda: "replaced"}
    await run_worker(make_worker(queue.backend, dependency_overrides=overrides), oneshot=True)
    assert (await finished(queue, task)).result == [1, 1, "replaced", "later"]
