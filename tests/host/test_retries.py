"""Tasks that fail and run again: by themselves, and because somebody asks for it."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from uuid import uuid4

import pytest
from sheppy import Queue

from tests.host import tasks
from tests.host.support import MakeBackend, all_finished, finished, running, stored, until
from tests.host.tasks import (
    add,
    end_at_second_attempt,
    fail_for_long,
    fail_until_mended,
    fail_with_delays,
    gates,
    journal,
    succeed_after,
    wait_at,
)
from tests.support import make_worker, run_worker


async def test_tasks_are_tried_until_they_succeed(queue: Queue) -> None:
    failures = [0, 1, 3]
    many = [succeed_after(count) for count in failures]
    await queue.add(many)
    async with running(make_worker(queue.backend)):
        done = await all_finished(queue, many)
    assert [(task.status, task.error) for task in done] == [("completed", None)] * 3
    assert [task.result for task in done] == failures
    runs = [[run.task_id for run in journal].count(task.id) for task in many]
    assert runs == [1, 2, 4]


async def test_task_that_never_succeeds_is_retried_in_time_and_ends_failed(queue: Queue) -> None:
    task = fail_with_delays()
    await queue.add(task)
    async with running(make_worker(queue.backend)):
        done = await finished(queue, task)
    assert (done.status, done.error) == ("failed", "RuntimeError: still broken")
    assert done.retry_count == 3
    # The host leaves the last attempt out; our backend sees to it.
    assert len(journal) == 4
    assert await queue.size() == 0
    assert await queue.get_scheduled() == []
    first, *retries = journal
    assert first.due_at is None
    assert all(run.due_at and run.started_at >= run.due_at for run in retries)
    starts = [run.started_at for run in journal]
    pauses = [(later - earlier).total_seconds() for earlier, later in pairwise(starts)]
    assert pauses[0] >= min(tasks.RETRY_DELAYS)
    assert pauses[-1] >= max(tasks.RETRY_DELAYS)


async def test_task_is_retried_after_a_timeout_where_it_says_so(queue: Queue) -> None:
    task = end_at_second_attempt()
    await queue.add(task)
    async with running(make_worker(queue.backend)):
        assert (await finished(queue, task)).result == 1
    assert len(journal) == 2


async def test_task_that_waits_for_its_retry_has_not_ended(queue: Queue) -> None:
    task = fail_for_long()
    await queue.add(task)

    async def is_scheduled() -> bool:
        return bool(await queue.get_scheduled())

    async with running(make_worker(queue.backend)):
        await until(is_scheduled)
    with pytest.raises(TimeoutError):
        await queue.wait_for(task, timeout=0.02)
    waiting = await stored(queue, task)
    assert (waiting.status, waiting.retry_count) == ("retrying", 1)
    assert waiting.finished_at is None
    assert await queue.get_scheduled() == [waiting]
    assert await queue.size() == 0
    assert len(journal) == 1


async def test_retries_are_shared_among_workers_and_each_happens_once(
    make_backend: MakeBackend,
) -> None:
    queue = Queue(await make_backend(), "test")
    many = [succeed_after(3) for _ in range(5)]
    await queue.add(many)
    workers = [make_worker(await make_backend(), enable_cron_manager=False) for _ in range(3)]
    async with running(*workers):
        for task in many:
            assert (await finished(queue, task)).result == 3
    assert sorted(run.task_id for run in journal) == sorted(task.id for task in many * 4)


async def test_failed_task_runs_again_when_asked(queue: Queue) -> None:
    task = fail_until_mended("printer")
    await queue.add(task)
    async with running(make_worker(queue.backend)):
        failed = await finished(queue, task)
        assert failed.status == "failed"
        tasks.mended.add("printer")
        assert await queue.retry(task) is True
        done = await finished(queue, task)
    assert (done.status, done.result, done.error) == ("completed", "printer", None)
    assert done.finished_at is not None
    assert failed.finished_at is not None
    assert done.finished_at > failed.finished_at
    assert done.created_at == failed.created_at
    assert len(await queue.get_all_tasks()) == 1


async def test_completed_task_runs_again_only_by_force(queue: Queue) -> None:
    task = succeed_after(0)
    await queue.add(task)
    async with running(make_worker(queue.backend)):
        await finished(queue, task)
        with pytest.raises(ValueError, match="already completed"):
            await queue.retry(task)
        assert len(journal) == 1
        assert await queue.retry(task, force=True) is True
        await finished(queue, task)
    assert len(journal) == 2


async def test_retry_may_be_put_off(queue: Queue) -> None:
    soon, later = succeed_after(0), add(1, 2)
    await queue.add([soon, later])
    worker = make_worker(queue.backend)
    await run_worker(worker, oneshot=True)
    await queue.retry(soon, at=timedelta(seconds=0.2), force=True)
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    await queue.retry(later.id, at=tomorrow, force=True)
    assert [task.id for task in await queue.get_scheduled()] == [soon.id, later.id]
    # Neither has an end while it waits.
    assert await queue.wait_for([soon, later], timeout=-1) == {}
    async with running(worker):
        await finished(queue, soon)
    again = journal[1]
    assert again.due_at is not None
    assert again.started_at >= again.due_at
    assert (await stored(queue, later)).scheduled_at == tomorrow


async def test_retry_of_what_is_not_there_or_has_no_time_zone_changes_nothing(
    queue: Queue,
) -> None:
    task = add(1, 2)
    assert await queue.retry(task) is False
    assert await queue.retry(uuid4(), at=timedelta(seconds=1)) is False
    await queue.add(task)
    await run_worker(make_worker(queue.backend), oneshot=True)
    with pytest.raises(TypeError, match="offset-aware"):
        await queue.retry(task, at=datetime(2030, 1, 1), force=True)  # noqa: DTZ001
    assert (await stored(queue, task)).status == "completed"
    assert await queue.size() == 0


async def test_retry_of_a_running_task_runs_it_once_more(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    task = wait_at("gate")
    await queue.add(task)
    async with running(make_worker(await make_backend(), max_concurrent_tasks=1)):
        await gates["gate"].entered.wait()
        assert await queue.retry(task) is True
        waiting = asyncio.create_task(finished(queue, task))
        gates["gate"].open.set()
        assert (await waiting).result == "gate"
    assert len(journal) == 2
    assert await queue.size() == 0


async def test_retry_of_a_pending_task_does_not_make_it_two(queue: Queue) -> None:
    task = succeed_after(0)
    await queue.add(task)
    assert await queue.retry(task) is True
    assert await queue.size() == 1
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert len(journal) == 1
