"""Putting tasks in, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from uuid import uuid4

import pytest
from sheppy import Queue

from tests.host.support import PATIENCE, MakeBackend, all_finished, finished, running, stored
from tests.host.tasks import add, fail, gates, journal, nothing, record, wait_at
from tests.support import make_worker, run_worker

MANY = 10_000


async def test_added_task_waits_until_a_worker_runs_it(queue: Queue) -> None:
    task = add(1, 2)
    assert await queue.add(task) is True
    assert await queue.add(task) is False
    assert await queue.size() == 1
    assert await queue.get_pending() == [task]
    assert (await stored(queue, task)).status == "new"
    await run_worker(make_worker(queue.backend), oneshot=True)
    done = await finished(queue, task)
    assert (done.status, done.result, done.error) == ("completed", 3, None)
    assert await queue.size() == 0
    assert await queue.add(task) is False


async def test_ten_thousand_tasks_are_added_at_once_and_run_in_their_order(queue: Queue) -> None:
    tasks = [nothing() for _ in range(MANY)]
    assert await queue.add(tasks) == [True] * MANY
    assert await queue.size() == MANY
    worker = make_worker(queue.backend, max_concurrent_tasks=100)
    await run_worker(worker, max_tasks=500)
    ended = await queue.wait_for([*tasks], timeout=-1)
    assert set(ended) == {task.id for task in tasks[:500]}
    assert await queue.size() == MANY - 500
    assert await queue.get_pending(3) == tasks[500:503]


async def test_every_task_of_concurrent_producers_and_workers_runs_once(
    make_backend: MakeBackend,
) -> None:
    producers = [Queue(await make_backend(), "test") for _ in range(3)]
    workers = [
        make_worker(await make_backend(), enable_scheduler=False, enable_cron_manager=False)
        for _ in range(3)
    ]
    tasks = [record(number) for number in range(60)]
    async with running(*workers):
        added = await asyncio.gather(
            *(queue.add(tasks[start::10]) for queue in producers for start in range(10))
        )
        await all_finished(producers[0], tasks)
    # Each of them was offered by three producers.
    assert sum(map(sum, added)) == 60
    assert sorted(run.value for run in journal) == list(range(60))


async def test_scheduled_task_runs_when_its_time_has_come(queue: Queue) -> None:
    soon, then = record(1), record(2)
    assert await queue.schedule(soon, timedelta(seconds=0.2)) is True
    assert await queue.schedule(then, datetime.now(timezone.utc) + timedelta(seconds=0.3)) is True
    assert await queue.schedule(record(3).model_copy(update={"id": soon.id}), timedelta()) is False
    assert await queue.get_scheduled() == [soon, then]
    assert await queue.size() == 0
    async with running(make_worker(queue.backend)):
        done = await all_finished(queue, [soon, then])
    assert [task.result for task in done] == [1, 2]
    assert [run.value for run in journal] == [1, 2]
    assert all(run.due_at and run.started_at >= run.due_at for run in journal)
    assert await queue.get_scheduled() == []


async def test_time_of_any_zone_is_the_same_moment(queue: Queue) -> None:
    india = timezone(timedelta(hours=5, minutes=30))
    due, later = record(1), record(2)
    await queue.schedule(due, datetime.now(india) - timedelta(seconds=1))
    await queue.schedule(later, datetime.now(india) + timedelta(minutes=1))
    async with running(make_worker(queue.backend)):
        await finished(queue, due)
    assert [run.value for run in journal] == [1]
    assert await queue.get_scheduled() == [later]


async def test_scheduled_task_runs_once_though_many_workers_look(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    tasks = [record(number) for number in range(30)]
    for task in tasks:
        await queue.schedule(task, timedelta(seconds=0.1))
    async with running(*[make_worker(await make_backend()) for _ in range(3)]):
        await all_finished(queue, tasks)
    assert sorted(run.value for run in journal) == list(range(30))


async def test_wait_for_several_gives_failed_ones_as_well(queue: Queue) -> None:
    good, bad = add(1, 2), fail("no paper")
    await queue.add([good, bad])
    async with running(make_worker(queue.backend)):
        done = await queue.wait_for([good, bad.id, str(good.id)], timeout=PATIENCE)
    assert done.keys() == {good.id, bad.id}
    assert done[good.id].result == 3
    assert (done[bad.id].status, done[bad.id].error) == ("failed", "RuntimeError: no paper")


async def test_wait_for_ends_with_its_timeout(queue: Queue) -> None:
    done, waiting = add(1, 2), add(3, 4)
    await queue.add(done)
    await run_worker(make_worker(queue.backend), oneshot=True)
    await queue.add(waiting)
    for wait in (
        queue.wait_for(waiting, timeout=0.02),
        queue.wait_for(uuid4(), timeout=0.02),
        queue.wait_for([done, waiting], timeout=0.02),
    ):
        with pytest.raises(TimeoutError, match=r"^Did not complete within 0.02 seconds$"):
            await wait
    assert await queue.wait_for(waiting, timeout=-1) is None
    assert (await queue.wait_for([done, waiting], timeout=-1)).keys() == {done.id}


async def test_another_backend_waits_for_a_task_that_is_not_yet_added(
    make_backend: MakeBackend,
) -> None:
    here, there = Queue(await make_backend(), "test"), Queue(await make_backend(), "test")
    task = wait_at("gate")
    waiting = asyncio.create_task(finished(here, task))
    async with running(make_worker(await make_backend())):
        await there.add(task)
        await gates["gate"].entered.wait()
        assert not waiting.done()
        gates["gate"].open.set()
        assert (await waiting).result == "gate"


async def test_fifty_wait_at_once_on_few_connections(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(pool_size=2), "test")
    common, others = wait_at("gate"), [add(number, 0) for number in range(25)]
    awaited = [common] * 25 + others
    # With no timeout, as an endless wait is the one that must end by itself.
    waiting = [asyncio.create_task(queue.wait_for(task)) for task in awaited]
    async with running(make_worker(await make_backend())):
        await queue.add([common, *others])
        await gates["gate"].entered.wait()
        waiting[0].cancel()
        gates["gate"].open.set()
        done = await asyncio.wait_for(asyncio.gather(*waiting[1:]), PATIENCE)
    assert [task.result for task in done if task] == ["gate"] * 24 + list(range(25))
