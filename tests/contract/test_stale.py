"""heartbeat and get_stale_messages: the next sheppy's care for the tasks of dead workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from tests.contract.tasks import (
    FUTURE,
    QUEUE,
    STATES,
    MakeBackend,
    Payload,
    everything,
    finished,
    ids,
    make_task,
    make_tasks,
    retrying,
    store_claimed,
)
from tests.support.clock import from_now

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase
    from tests.support.next_host import MakeNextBackend

IDLE_MS = 60_000
PATIENCE = 30.0  # seconds


async def let_go_stale(database: TestDatabase, task_id: str = "%") -> None:
    """Have the claims' last sign of life be longer ago than IDLE_MS."""
    await database.execute(
        "UPDATE sheppy_tasks SET heartbeat_at = :then"
        " WHERE heartbeat_at IS NOT NULL AND id LIKE :task_id",
        then=from_now(database, -2 * IDLE_MS / 1000),
        task_id=task_id,
    )


async def test_stale_claim_is_taken_over(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    await store_claimed(dead, make_task())
    before = await everything(worker)
    assert await worker.get_stale_messages(QUEUE, IDLE_MS) == []
    await let_go_stale(database)
    assert await worker.get_stale_messages("other", IDLE_MS) == []
    assert await worker.get_stale_messages(QUEUE, IDLE_MS) == [make_task()]
    assert await worker.get_stale_messages(QUEUE, IDLE_MS) == []
    assert await everything(worker) == before
    crashed = finished(make_task(), status="crashed")
    assert await worker.store_result(QUEUE, crashed)
    assert await dead.get_results(QUEUE, ["task"]) == {"task": crashed}


async def test_claim_taken_over_is_as_fresh_as_a_new_one(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    backends = [await make_next_backend() for _ in range(3)]
    await store_claimed(backends[0], make_task())
    await let_go_stale(database)
    assert ids(await backends[1].get_stale_messages(QUEUE, IDLE_MS)) == ["task"]
    assert await backends[2].get_stale_messages(QUEUE, IDLE_MS) == []
    await let_go_stale(database)
    await backends[1].heartbeat(QUEUE, ["task"])
    assert await backends[2].get_stale_messages(QUEUE, IDLE_MS) == []
    await let_go_stale(database)
    assert ids(await backends[2].get_stale_messages(QUEUE, IDLE_MS)) == ["task"]
    assert await backends[1].store_result(QUEUE, finished(make_task())) is True
    assert await backends[0].get_all_tasks(QUEUE) == [make_task()]


async def test_claim_is_stale_after_the_milliseconds_given(
    make_next_backend: MakeNextBackend,
) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    started = time.monotonic()
    await store_claimed(dead, make_task())
    claimed = time.monotonic()
    assert await worker.get_stale_messages(QUEUE, 3_600_000) == []
    while not await worker.get_stale_messages(QUEUE, 200):
        assert time.monotonic() < claimed + PATIENCE
        await asyncio.sleep(0.01)
    assert time.monotonic() - started >= 0.2
    assert time.monotonic() - claimed < PATIENCE


async def test_no_idle_time_at_all_is_enough_for_zero_milliseconds(
    make_next_backend: MakeNextBackend,
) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    await store_claimed(dead, make_task())
    assert ids(await worker.get_stale_messages(QUEUE, 0)) == ["task"]


async def test_unlimited_patience_is_possible(make_next_backend: MakeNextBackend) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    await store_claimed(dead, make_task())
    assert await worker.get_stale_messages(QUEUE, 10**18) == []
    with pytest.raises(ValueError, match="min_idle_ms"):
        await worker.get_stale_messages(QUEUE, -1)


async def test_heartbeat_keeps_a_claim_from_being_stale(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    alive, worker = await make_next_backend(), await make_next_backend()
    await alive.append(QUEUE, make_tasks(3))
    await alive.pop(QUEUE, 3)
    await let_go_stale(database)
    before = await everything(worker)
    await alive.heartbeat(QUEUE, ["task-0", "unknown", "task-2", "task-2"])
    assert await everything(worker) == before
    assert ids(await worker.get_stale_messages(QUEUE, IDLE_MS)) == ["task-1"]
    await alive.heartbeat(QUEUE, [])


async def test_heartbeat_is_for_claims_of_its_own_instance_and_queue(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    holder, other = await make_next_backend(), await make_next_backend()
    await store_claimed(holder, make_task())
    await let_go_stale(database)
    await other.heartbeat(QUEUE, ["task"])
    await holder.heartbeat("other", ["task"])
    assert ids(await other.get_stale_messages(QUEUE, IDLE_MS)) == ["task"]


@pytest.mark.parametrize("state", ["pending", "claimed", "retrying", "finished"])
async def test_heartbeat_changes_no_task(make_next_backend: MakeNextBackend, state: str) -> None:
    backend = await make_next_backend()
    await STATES[state](backend, make_task())
    before = await everything(backend)
    await backend.heartbeat(QUEUE, ["task"])
    assert await everything(backend) == before
    assert await backend.pop(QUEUE) == before["pending"]


@pytest.mark.parametrize("state", [state for state in STATES if state != "claimed"])
async def test_only_claims_are_stale(
    make_next_backend: MakeNextBackend, database: TestDatabase, state: str
) -> None:
    holder, worker = await make_next_backend(), await make_next_backend()
    await STATES[state](holder, make_task())
    before = await everything(worker)
    await let_go_stale(database)
    assert await worker.get_stale_messages(QUEUE, 0) == []
    assert await everything(worker) == before


async def test_own_claims_are_never_stale(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    worker = await make_next_backend()
    await store_claimed(worker, make_task())
    await let_go_stale(database)
    assert await worker.get_stale_messages(QUEUE, 0) == []
    assert await worker.store_result(QUEUE, finished(make_task()))
    assert await worker.get_results(QUEUE, ["task"]) == {"task": finished(make_task())}


async def test_concurrent_callers_take_over_disjoint_tasks(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    dead = await make_next_backend()
    workers = [await make_next_backend() for _ in range(3)]
    await dead.append(QUEUE, make_tasks(20))
    await dead.pop(QUEUE, 20)
    await let_go_stale(database)
    answers = await asyncio.gather(
        *(worker.get_stale_messages(QUEUE, IDLE_MS) for worker in workers for _ in range(2))
    )
    answers.append(await workers[0].get_stale_messages(QUEUE, IDLE_MS))
    taken = [task_id for answer in answers for task_id in ids(answer)]
    assert sorted(taken) == sorted(ids(make_tasks(20)))


@pytest.mark.parametrize("outcome", [finished, retrying, dict])
async def test_old_owner_does_not_get_its_claim_back(
    make_next_backend: MakeNextBackend, database: TestDatabase, outcome: Callable[..., Payload]
) -> None:
    stalled, worker = await make_next_backend(), await make_next_backend()
    await store_claimed(stalled, make_task())
    await let_go_stale(database)
    assert ids(await worker.get_stale_messages(QUEUE, IDLE_MS)) == ["task"]
    before = await everything(worker)
    await let_go_stale(database)
    await stalled.heartbeat(QUEUE, ["task"])
    assert await stalled.store_result(QUEUE, outcome(make_task(result="late"))) is True
    assert await stalled.store_result(QUEUE, outcome(make_task(result="later"))) is True
    await stalled.acknowledge(QUEUE, ["task"])
    if outcome is retrying:
        again = datetime.fromisoformat(outcome(make_task())["next_retry_at"])
        await stalled.schedule(QUEUE, make_task(), again)
    assert await everything(worker) == before
    third = await make_next_backend()
    assert ids(await third.get_stale_messages(QUEUE, IDLE_MS)) == ["task"]


async def test_late_retry_of_the_old_owner_does_nothing(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    """Its store_result was dropped, and its schedule must be, too."""
    stalled, worker = await make_next_backend(), await make_next_backend()
    await store_claimed(stalled, make_task())
    await let_go_stale(database)
    await worker.get_stale_messages(QUEUE, IDLE_MS)
    done = finished(make_task(), status="crashed")
    await worker.store_result(QUEUE, done)
    late = retrying(make_task())
    await stalled.store_result(QUEUE, late)
    again = datetime.fromisoformat(late["next_retry_at"])
    assert await stalled.schedule(QUEUE, late, again, unique=False) is True
    assert await worker.get_all_tasks(QUEUE) == [done]
    assert await worker.get_scheduled(QUEUE) == []


async def test_crashed_task_is_retried_as_the_host_does_it(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    await dead.append(QUEUE, [make_task(), make_task("other")])
    await dead.pop(QUEUE)
    await let_go_stale(database)
    [stale] = await worker.get_stale_messages(QUEUE, IDLE_MS)
    again = retrying(stale, delay=-1)
    await worker.store_result(QUEUE, again)
    at = datetime.fromisoformat(again["next_retry_at"])
    assert await worker.schedule(QUEUE, again, at, unique=False) is True
    [due] = await worker.pop_scheduled(QUEUE)
    await worker.append(QUEUE, [{**due, "status": "pending"}], unique=False)
    # Alone, as it may do the same again, and without delay.
    assert ids(await worker.pop(QUEUE, 5)) == ["other"]
    assert await worker.pop(QUEUE, 5) == []
    await worker.store_result(QUEUE, finished(make_task("other")))
    assert await worker.pop(QUEUE, 5) == [{**due, "status": "pending"}]
    await worker.store_result(QUEUE, finished(make_task()))
    assert await worker.get_stats(QUEUE) == {"pending": 0, "completed": 2, "scheduled": 0}


async def test_pop_finds_a_crashed_task_at_once_where_nothing_else_waits(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """Whoever has seen it crash, and under whichever sheppy: a worker that finds nothing may go."""
    user, worker, other = [await make_backend() for _ in range(3)]
    await user.append(QUEUE, make_tasks(2))
    await database.execute("UPDATE sheppy_tasks SET crashes = 1")
    assert await worker.pop(QUEUE, 5) == [make_task("task-0")]
    assert await worker.pop(QUEUE, 5) == []
    assert await other.pop(QUEUE, 5) == [make_task("task-1")]


async def test_stale_claims_come_in_thousands(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    await dead.append(QUEUE, make_tasks(1005))
    await dead.pop(QUEUE, 1005)
    await dead.heartbeat(QUEUE, ids(make_tasks(1005)))
    await let_go_stale(database)
    first = await worker.get_stale_messages(QUEUE, IDLE_MS)
    second = await worker.get_stale_messages(QUEUE, IDLE_MS)
    assert [len(first), len(second)] == [1000, 5]
    assert sorted(ids(first + second)) == sorted(ids(make_tasks(1005)))
    assert await worker.get_stale_messages(QUEUE, IDLE_MS) == []


async def test_cancelled_caller_loses_no_task(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    dead, worker = await make_next_backend(), await make_next_backend()
    tasks = make_tasks(12)
    await dead.append(QUEUE, tasks)
    got: list[str] = []
    for turns, task in enumerate(tasks):
        await dead.pop(QUEUE)
        await let_go_stale(database, task["id"])
        asking = asyncio.create_task(worker.get_stale_messages(QUEUE, IDLE_MS))
        # At another await each time: between two turns of the loop.
        for _ in range(turns * 3):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        if not asking.cancelled():
            got += ids(asking.result())
    await let_go_stale(database)
    third = await make_next_backend()
    handed_back = ids(await third.get_pending(QUEUE, 100))
    stale = ids(await third.get_stale_messages(QUEUE, IDLE_MS))
    assert sorted(handed_back + stale) == sorted(ids(tasks))
    assert set(got) <= set(stale)


async def test_under_sheppy_0_0_7_claims_are_taken_over_all_the_same(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """Nobody calls these methods there, and who does gets what they say."""
    dead, worker = await make_backend(), await make_backend()
    await store_claimed(dead, make_task())
    await let_go_stale(database)
    await dead.heartbeat(QUEUE, ["task"])
    assert await worker.get_stale_messages(QUEUE, IDLE_MS) == []
    await let_go_stale(database)
    assert ids(await worker.get_stale_messages(QUEUE, IDLE_MS)) == ["task"]
    assert await worker.cancel(QUEUE, "task") is None
    assert await worker.schedule(QUEUE, make_task(), FUTURE, unique=True) is False
