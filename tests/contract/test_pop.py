"""pop, get_pending, size and acknowledge: taking tasks, waiting for them, giving them up."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING

import pytest

from tests.contract.tasks import (
    FUTURE,
    PAST,
    QUEUE,
    STATES,
    MakeBackend,
    everything,
    finished,
    ids,
    make_task,
    make_tasks,
    store_claimed,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend

SOON = 5.0  # seconds; far more than an answer takes


@pytest.mark.parametrize("timeout", [None, 0, -1, -0.5, 0.001, 0.01, 1e-9])
async def test_empty_queue_gives_nothing(backend: SqlBackend, timeout: float | None) -> None:
    assert await asyncio.wait_for(backend.pop(QUEUE, timeout=timeout), SOON) == []
    assert await asyncio.wait_for(backend.pop("unknown", 3, timeout), SOON) == []


async def test_pop_waits_its_timeout_out(backend: SqlBackend) -> None:
    started = time.monotonic()
    assert await backend.pop(QUEUE, timeout=0.2) == []
    assert 0.2 <= time.monotonic() - started + 0.001 < SOON


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize("timeout", [None, 10])
async def test_limit_below_one_takes_nothing_at_once(
    backend: SqlBackend, limit: int, timeout: float | None
) -> None:
    await backend.append(QUEUE, [make_task()])
    assert await asyncio.wait_for(backend.pop(QUEUE, limit, timeout), SOON) == []
    assert await backend.size(QUEUE) == 1


@pytest.mark.parametrize("timeout", [None, 0, -1, 0.001, 60])
async def test_pop_takes_what_there_is_and_does_not_wait_for_more(
    backend: SqlBackend, timeout: float | None
) -> None:
    await backend.append(QUEUE, make_tasks(2))
    taken = await asyncio.wait_for(backend.pop(QUEUE, 3, timeout), SOON)
    assert ids(taken) == ["task-0", "task-1"]


async def test_pop_takes_one_unless_told_otherwise(backend: SqlBackend) -> None:
    tasks = make_tasks(5)
    await backend.append(QUEUE, tasks)
    assert await backend.pop(QUEUE) == tasks[:1]
    assert await backend.pop(QUEUE, limit=2) == tasks[1:3]
    assert await backend.pop(QUEUE, limit=2**31) == tasks[3:]


async def test_pop_changes_no_payload(backend: SqlBackend) -> None:
    task = make_task(extra={"z": 1, "a": 2})
    await backend.append(QUEUE, [task])
    assert await backend.pop(QUEUE) == [task]
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": task}
    assert await backend.get_all_tasks(QUEUE) == [task]


async def test_claimed_tasks_are_pending_no_longer(backend: SqlBackend) -> None:
    tasks = make_tasks(3)
    await backend.append(QUEUE, tasks)
    await backend.pop(QUEUE, limit=2)
    assert await backend.size(QUEUE) == 1
    assert await backend.get_pending(QUEUE, 10) == tasks[2:]
    assert (await backend.get_stats(QUEUE))["pending"] == 1
    assert len(await backend.get_all_tasks(QUEUE)) == 3


async def test_scheduled_tasks_are_not_popped_even_when_due(backend: SqlBackend) -> None:
    await backend.schedule(QUEUE, make_task("due"), PAST)
    await backend.schedule(QUEUE, make_task("later"), FUTURE)
    assert await backend.pop(QUEUE, limit=10, timeout=0.05) == []


@pytest.mark.parametrize("count", [0, -1])
async def test_count_below_one_shows_nothing(backend: SqlBackend, count: int) -> None:
    await backend.append(QUEUE, make_tasks(2))
    assert await backend.get_pending(QUEUE, count) == []


async def test_get_pending_shows_what_pop_takes_next(backend: SqlBackend) -> None:
    tasks = make_tasks(4)
    await backend.append(QUEUE, tasks)
    assert await backend.get_pending(QUEUE) == tasks[:1]
    assert await backend.get_pending(QUEUE, 3) == tasks[:3]
    assert await backend.get_pending(QUEUE, 10) == tasks
    assert await backend.get_pending("unknown", 10) == []
    assert await backend.pop(QUEUE, limit=10) == tasks


async def test_unknown_queue_has_no_size(backend: SqlBackend) -> None:
    assert await backend.size("unknown") == 0


async def test_waiting_pop_gets_the_task_that_comes(make_backend: MakeBackend) -> None:
    worker, user = await make_backend(), await make_backend()
    waiting = asyncio.create_task(worker.pop(QUEUE, limit=5, timeout=60))
    await user.append(QUEUE, [make_task()])
    assert await asyncio.wait_for(waiting, SOON) == [make_task()]


async def test_waiting_pop_is_woken_at_once(make_backend: MakeBackend) -> None:
    """By a backend of the same process, however rarely the waiting one looks by itself."""
    worker, user = await make_backend(max_poll_interval=60), await make_backend()
    queues = [f"queue-{number}" for number in range(9)]
    for queue in queues:
        await user.schedule(queue, make_task(), PAST)
        await user.pop_scheduled(queue)
    waiting = {queue: asyncio.create_task(worker.pop(queue, timeout=60)) for queue in queues}
    done, _ = await asyncio.wait(waiting.values(), timeout=1.3)
    assert not done
    latencies = []
    for number, queue in enumerate(queues):
        task = (make_task("new"), make_task("again"), make_task(status="pending"))[number % 3]
        await user.append(queue, [task], unique=number % 3 == 0)
        appended = time.monotonic()
        assert await asyncio.wait_for(waiting[queue], SOON) == [task]
        latencies.append(time.monotonic() - appended)
    # By itself it would look once in a minute.
    assert statistics.median(latencies) < 1


async def test_concurrent_pops_get_disjoint_tasks(make_backend: MakeBackend) -> None:
    backends = [await make_backend() for _ in range(3)]
    tasks = make_tasks(90)
    await backends[0].append(QUEUE, tasks)
    taken = await asyncio.gather(
        *(backend.pop(QUEUE, limit=4) for _ in range(10) for backend in backends)
    )
    got = [task_id for batch in taken for task_id in ids(batch)]
    got += ids(await backends[0].pop(QUEUE, limit=90))
    assert sorted(got) == sorted(ids(tasks))


async def test_cancelled_pop_hands_its_tasks_back(make_backend: MakeBackend) -> None:
    """However far the claim has come: after every number of event loop steps up to the last."""
    worker, other = await make_backend(), await make_backend()
    tasks = make_tasks(3)
    await other.append(QUEUE, tasks)
    steps, ended = 0, False
    while not ended:
        popping = asyncio.create_task(worker.pop(QUEUE, limit=2, timeout=60))
        for _ in range(steps):
            await asyncio.sleep(0)
        ended = popping.done()
        popping.cancel()
        try:
            taken = await popping
        except asyncio.CancelledError:
            assert await other.get_pending(QUEUE, 10) == tasks
        else:
            assert taken == tasks[:2]
        steps = steps + 1 if steps < 50 else steps * 2
    assert await other.size(QUEUE) == 1


async def test_pop_cancelled_twice_hands_its_tasks_back(make_backend: MakeBackend) -> None:
    worker, other = await make_backend(), await make_backend()
    tasks = make_tasks(3)
    await other.append(QUEUE, tasks)
    for steps in range(60):
        popping = asyncio.create_task(worker.pop(QUEUE, limit=3, timeout=60))
        for _ in range(steps):
            await asyncio.sleep(0)
        popping.cancel()
        await asyncio.sleep(0)
        popping.cancel()
        await asyncio.wait([popping])
        if not popping.cancelled():
            assert popping.result() == tasks
            break
        deadline = time.monotonic() + SOON
        while await other.get_pending(QUEUE, 10) != tasks:
            assert time.monotonic() < deadline, f"lost after {steps} steps"
            await asyncio.sleep(0.01)


async def test_cancelled_waiting_pop_takes_nothing_later(make_backend: MakeBackend) -> None:
    worker, other = await make_backend(), await make_backend()
    waiting = asyncio.create_task(worker.pop(QUEUE, timeout=60))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await other.append(QUEUE, [make_task()])
    assert await other.pop(QUEUE) == [make_task()]


async def test_acknowledge_ends_the_claim_and_touches_nothing_else(backend: SqlBackend) -> None:
    await store_claimed(backend, make_task())
    await backend.append(QUEUE, [make_task("other")])
    before = await everything(backend)
    await backend.acknowledge(QUEUE, ["task", "unknown", "other", "task"])
    assert await everything(backend) == before
    assert await backend.pop(QUEUE, limit=10) == [make_task("other")]


@pytest.mark.parametrize("state", STATES)
async def test_acknowledge_leaves_what_another_instance_holds(
    make_backend: MakeBackend, state: str
) -> None:
    holder, other = await make_backend(), await make_backend()
    await STATES[state](holder, make_task())
    before = await everything(holder)
    await other.acknowledge(QUEUE, ["task"])
    assert await everything(holder) == before
    if state == "claimed":
        await holder.store_result(QUEUE, finished(make_task()))
        assert await other.get_results(QUEUE, ["task"]) == {"task": finished(make_task())}


async def test_acknowledge_of_nothing_is_harmless(backend: SqlBackend) -> None:
    await backend.acknowledge(QUEUE, [])
    await backend.acknowledge("unknown", ["unknown"])
    assert await backend.get_all_tasks("unknown") == []
