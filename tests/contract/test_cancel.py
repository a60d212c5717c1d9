"""cancel: ending a task that nobody has begun."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from sheppy_sql import _waiting
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
    retrying,
    store_claimed,
    store_pending,
    store_retrying,
    store_scheduled,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend
    from tests.support.databases import TestDatabase

SOON = 5.0  # seconds; far more than an answer takes
BRIEFLY = 0.000001  # seconds
WAITING = ("pending", "scheduled", "popped from the schedule", "retrying")
LATER = FUTURE + timedelta(days=1)


@pytest.mark.parametrize("state", WAITING)
async def test_waiting_task_is_cancelled(make_backend: MakeBackend, state: str) -> None:
    holder, user = await make_backend(), await make_backend()
    await STATES[state](holder, make_task())
    [stored] = await user.get_all_tasks(QUEUE)
    before = datetime.now(timezone.utc)
    cancelled = await user.cancel(QUEUE, "task")
    assert cancelled is not None
    assert before <= datetime.fromisoformat(cancelled["finished_at"]) <= datetime.now(timezone.utc)
    at = cancelled["finished_at"]
    assert cancelled == {**stored, "status": "cancelled", "finished_at": at}
    assert list(cancelled) == list(stored)
    assert await everything(holder) == {
        "tasks": [cancelled],
        "pending": [],
        "size": 0,
        "scheduled": [],
        "stats": {"pending": 0, "completed": 1, "scheduled": 0},
        "crons": [],
        "workflows": [],
        "queues": {QUEUE: 0},
    }
    assert await holder.get_tasks(QUEUE, ["task"]) == {"task": cancelled}
    assert await holder.get_results(QUEUE, ["task"]) == {"task": cancelled}
    assert await holder.pop(QUEUE) == []
    assert await holder.pop_scheduled(QUEUE, LATER) == []


@pytest.mark.parametrize("state", ["claimed", "acknowledged", "finished"])
async def test_task_that_waits_for_nothing_is_not_cancelled(
    make_backend: MakeBackend, state: str
) -> None:
    holder, user = await make_backend(), await make_backend()
    await STATES[state](holder, make_task())
    before = await everything(user)
    assert await user.cancel(QUEUE, "task") is None
    assert await holder.cancel(QUEUE, "task") is None
    assert await everything(user) == before


async def test_unknown_task_is_not_cancelled(backend: SqlBackend) -> None:
    await store_pending(backend, make_task())
    before = await everything(backend)
    assert await backend.cancel(QUEUE, "unknown") is None
    assert await backend.cancel("other", "task") is None
    assert await everything(backend) == before


async def test_cancelled_task_is_not_cancelled_again(backend: SqlBackend) -> None:
    await store_pending(backend, make_task())
    cancelled = await backend.cancel(QUEUE, "task")
    assert await backend.cancel(QUEUE, "task") is None
    assert await backend.get_all_tasks(QUEUE) == [cancelled]


async def test_running_task_stays_its_workers_after_a_cancel(make_backend: MakeBackend) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    assert await user.cancel(QUEUE, "task") is None
    assert await worker.store_result(QUEUE, finished(make_task()))
    assert await user.get_results(QUEUE, ["task"]) == {"task": finished(make_task())}


@pytest.mark.parametrize("state", ["pending", "retrying"])
async def test_one_of_concurrent_callers_cancels(make_backend: MakeBackend, state: str) -> None:
    backends = [await make_backend() for _ in range(3)]
    await STATES[state](backends[0], make_task())
    answers = await asyncio.gather(
        *(backend.cancel(QUEUE, "task") for backend in backends for _ in range(3))
    )
    [cancelled] = [answer for answer in answers if answer is not None]
    assert await backends[0].get_all_tasks(QUEUE) == [cancelled]


async def test_task_is_cancelled_or_taken_and_never_both(make_backend: MakeBackend) -> None:
    worker, user = await make_backend(), await make_backend()
    tasks = make_tasks(30)
    await user.append(QUEUE, tasks)
    popping = [asyncio.create_task(worker.pop(QUEUE, 2)) for _ in range(8)]
    answers = await asyncio.gather(*(user.cancel(QUEUE, task["id"]) for task in tasks))
    taken = [task_id for pop in popping for task_id in ids(await pop)]
    taken += ids(await worker.pop(QUEUE, 30))
    cancelled = [answer["id"] for answer in answers if answer is not None]
    assert sorted(taken + cancelled) == sorted(ids(tasks))


@pytest.mark.parametrize("timeout", [0, 60])
async def test_cancel_wakes_who_waits_for_the_result(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    """However rarely they look by themselves."""
    monkeypatch.setattr(_waiting, "FIRST_POLL", 60.0)
    waiter, user = await make_backend(max_poll_interval=60), await make_backend()
    await store_scheduled(user, make_task())
    waiting = asyncio.create_task(waiter.get_results(QUEUE, ["task"], timeout))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    cancelled = await user.cancel(QUEUE, "task")
    assert await asyncio.wait_for(waiting, SOON) == {"task": cancelled}


async def test_late_append_of_a_task_cancelled_meanwhile_does_nothing(
    make_backend: MakeBackend,
) -> None:
    scheduler, user = await make_backend(), await make_backend()
    await scheduler.schedule(QUEUE, make_task(status="scheduled"), PAST)
    [due] = await scheduler.pop_scheduled(QUEUE)
    cancelled = await user.cancel(QUEUE, "task")
    assert cancelled is not None
    pending = {**due, "status": "pending"}
    assert await scheduler.append(QUEUE, [pending], unique=False) == [True]
    assert await user.size(QUEUE) == 0
    assert await user.get_all_tasks(QUEUE) == [cancelled]


async def test_late_schedule_of_a_retry_cancelled_meanwhile_does_nothing(
    make_backend: MakeBackend,
) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_retrying(worker, make_task())
    [parked] = await user.get_all_tasks(QUEUE)
    cancelled = await user.cancel(QUEUE, "task")
    again = datetime.fromisoformat(parked["next_retry_at"])
    assert await worker.schedule(QUEUE, parked, again, unique=False) is True
    assert await user.get_scheduled(QUEUE) == []
    assert await user.get_all_tasks(QUEUE) == [cancelled]


async def test_scheduled_retry_is_cancelled(backend: SqlBackend) -> None:
    await store_claimed(backend, make_task())
    parked = retrying(make_task())
    await backend.store_result(QUEUE, parked)
    again = datetime.fromisoformat(parked["next_retry_at"])
    await backend.schedule(QUEUE, parked, again, unique=False)
    cancelled = await backend.cancel(QUEUE, "task")
    assert cancelled is not None
    assert cancelled["retry_count"] == 1
    assert await backend.get_scheduled(QUEUE) == []
    assert await backend.pop_scheduled(QUEUE, FUTURE) == []


async def test_cancelled_task_is_kept_as_failures_are(make_backend: MakeBackend) -> None:
    briefly = await make_backend(ttl=None, error_ttl=BRIEFLY)
    long = await make_backend(ttl=BRIEFLY, error_ttl=None)
    await store_pending(briefly, make_task("brief"))
    await store_pending(briefly, make_task("long"))
    assert await briefly.cancel(QUEUE, "brief") is not None
    cancelled = await long.cancel(QUEUE, "long")
    assert await long.get_all_tasks(QUEUE) == [cancelled]
    assert await long.append(QUEUE, [make_task("brief"), make_task("long")]) == [True, False]


async def test_cancelled_task_may_be_appended_anew(backend: SqlBackend) -> None:
    """As a user's retry does."""
    await store_scheduled(backend, make_task())
    await backend.cancel(QUEUE, "task")
    assert await backend.append(QUEUE, [make_task()]) == [False]
    assert await backend.append(QUEUE, [make_task()], unique=False) == [True]
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.pop(QUEUE, 5) == [make_task()]


async def test_what_is_stored_is_cancelled_whatever_its_size(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    long = await make_backend()
    await store_pending(long, make_task(result="x" * 10_000))
    short = await make_backend(max_payload_bytes=1000)
    assert await short.cancel(QUEUE, "task") is not None
    assert await database.fetch("SELECT count(*) FROM sheppy_tasks") == [(0,)]
