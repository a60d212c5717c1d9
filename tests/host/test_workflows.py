"""Workflows: steps in a row, side by side, one inside another, and those that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sheppy import Queue, Workflow

from tests.host.support import MakeBackend, running, until
from tests.host.tasks import gates, journal
from tests.host.workflows import (
    behind_gates,
    fan_out,
    linear,
    nested,
    that_gives_up,
    with_failing_step,
)
from tests.support import make_worker, run_worker


async def ended(queue: Queue, workflow: Workflow) -> Workflow:
    """The workflow once it has completed or failed."""

    async def has_ended() -> bool:
        found = await queue.get_workflow(workflow)
        return found is not None and found.finished_at is not None

    await until(has_ended)
    found = await queue.get_workflow(workflow)
    assert found is not None
    return found


async def test_workflows_run_to_their_results(queue: Queue) -> None:
    expected: list[tuple[Workflow, Any]] = [
        (linear(0), 111),
        (fan_out(10), 90),
        (nested(3), 1006),
        (with_failing_step(), ["failed", "RuntimeError: no paper", 3]),
    ]
    async with running(make_worker(queue.backend)):
        for workflow, _ in expected:
            await queue.add_workflow(workflow)
        for workflow, result in expected:
            done = await ended(queue, workflow)
            assert (done.completed, done.error) == (True, None)
            assert done.final_result == result
            assert done.pending_task_ids == []
    assert len(await queue.get_all_tasks()) == 3 + 11 + 5 + 2
    assert await queue.get_pending_workflows() == []


async def test_workflow_that_raises_ends_with_its_error(queue: Queue) -> None:
    workflow = that_gives_up()
    async with running(make_worker(queue.backend)):
        await queue.add_workflow(workflow)
        done = await ended(queue, workflow)
    assert not done.completed
    assert done.error == "ValueError: cannot go on after RuntimeError: no paper"
    assert await queue.get_pending_workflows() == []


async def test_workflow_goes_on_once_though_workers_end_its_steps_at_once(
    make_backend: MakeBackend,
) -> None:
    queue = Queue(await make_backend(), "test")
    workflows = [fan_out(8) for _ in range(3)]
    workers = [
        make_worker(await make_backend(), enable_scheduler=False, enable_cron_manager=False)
        for _ in range(2)
    ]
    async with running(*workers):
        await asyncio.gather(*map(queue.add_workflow, workflows))
        done = [await ended(queue, workflow) for workflow in workflows]
    assert [workflow.final_result for workflow in done] == [56] * 3
    assert [run.value for run in journal] == [56] * 3
    assert len(await queue.get_all_tasks()) == 3 * 9


async def test_workflow_goes_on_only_when_all_its_steps_have_ended(queue: Queue) -> None:
    workflow = behind_gates("one", "two")
    async with running(make_worker(queue.backend)):
        await queue.add_workflow(workflow)
        gates["one"].open.set()
        await gates["two"].entered.wait()
        first = await queue.get_workflow(workflow)
        assert first is not None
        await queue.wait_for(first.pending_task_ids[0], timeout=30)
        assert [pending.id for pending in await queue.get_pending_workflows()] == [workflow.id]
        gates["two"].open.set()
        assert (await ended(queue, workflow)).final_result == ["one", "two"]


async def test_workflow_is_taken_up_by_a_worker_that_starts_later(
    make_backend: MakeBackend,
) -> None:
    queue, workflow = Queue(await make_backend(), "test"), linear(0)
    await queue.add_workflow(workflow)
    for _ in range(3):
        # A step each.
        await run_worker(make_worker(await make_backend()), max_tasks=1)
    assert (await ended(queue, workflow)).final_result == 111


async def test_workflows_are_listed_and_deleted(queue: Queue) -> None:
    kept, deleted = linear(1), linear(2)
    await queue.add_workflow(kept)
    await queue.add_workflow(deleted)
    ids = [workflow.id for workflow in await queue.get_all_workflows()]
    assert ids == [kept.id, deleted.id]
    assert (await queue.get_workflow([kept, deleted])).keys() == set(ids)
    assert await queue.delete_workflow(deleted) is True
    assert await queue.delete_workflow(deleted) is False
    assert await queue.get_workflow(deleted) is None
    async with running(make_worker(queue.backend)):
        assert (await ended(queue, kept)).final_result == 112
    with pytest.raises(ValueError, match="not found"):
        await queue.resume_workflow(deleted.id)
