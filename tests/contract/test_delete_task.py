"""delete_task: forgetting a task, whatever its state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.contract.tasks import (
    FUTURE,
    PAST,
    QUEUE,
    STATES,
    MakeBackend,
    Payload,
    everything,
    finished,
    make_task,
    retrying,
    store_claimed,
    store_finished,
    store_pending,
    store_retrying,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend

LATER = FUTURE + timedelta(days=1)


@pytest.mark.parametrize("state", STATES)
async def test_task_in_any_state_is_deleted(make_backend: MakeBackend, state: str) -> None:
    holder, user = await make_backend(), await make_backend()
    await STATES[state](holder, make_task())
    await user.append(QUEUE, [make_task("other")])
    assert await user.delete_task(QUEUE, "task") is True
    assert await user.delete_task(QUEUE, "task") is False
    assert await everything(holder) == {
        "tasks": [make_task("other")],
        "pending": [make_task("other")],
        "size": 1,
        "scheduled": [],
        "stats": {"pending": 1, "completed": 0, "scheduled": 0},
        "crons": [],
        "workflows": [],
        "queues": {QUEUE: 1},
    }
    assert await user.get_results(QUEUE, ["task"]) == {}
    assert await user.pop(QUEUE, 5) == [make_task("other")]
    assert await user.pop_scheduled(QUEUE, LATER) == []


async def test_unknown_task_is_not_deleted(backend: SqlBackend) -> None:
    await store_pending(backend, make_task())
    before = await everything(backend)
    assert await backend.delete_task(QUEUE, "unknown") is False
    assert await backend.delete_task("other", "task") is False
    assert await everything(backend) == before


async def test_expired_task_is_not_there_to_be_deleted(make_backend: MakeBackend) -> None:
    backend = await make_backend(ttl=0.000001)
    await store_finished(backend, make_task())
    assert await backend.delete_task(QUEUE, "task") is False


@pytest.mark.parametrize("state", ["scheduled", "retrying", "claimed", "finished"])
async def test_id_of_a_deleted_task_is_free(backend: SqlBackend, state: str) -> None:
    await STATES[state](backend, make_task(result="first"))
    await backend.delete_task(QUEUE, "task")
    assert await backend.append(QUEUE, [make_task(result="second")]) == [True]
    assert await backend.pop(QUEUE, 5) == [make_task(result="second")]
    done = finished(make_task(result="second"))
    assert await backend.store_result(QUEUE, done)
    assert await backend.get_all_tasks(QUEUE) == [done]


@pytest.mark.parametrize("state", ["pending", "retrying", "claimed", "finished"])
async def test_one_of_concurrent_callers_deletes(make_backend: MakeBackend, state: str) -> None:
    backends = [await make_backend() for _ in range(3)]
    await STATES[state](backends[0], make_task())
    answers = await asyncio.gather(
        *(backend.delete_task(QUEUE, "task") for backend in backends for _ in range(3))
    )
    assert answers.count(True) == 1


@pytest.mark.parametrize("outcome", [finished, retrying, dict])
async def test_late_result_of_a_deleted_task_is_dropped(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture, outcome: Callable[..., Payload]
) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    await user.delete_task(QUEUE, "task")
    assert await worker.store_result(QUEUE, outcome(make_task())) is True
    assert await user.get_all_tasks(QUEUE) == []
    assert "result is dropped" in caplog.text
    assert await user.append(QUEUE, [make_task(result="new")]) == [True]
    assert await worker.store_result(QUEUE, outcome(make_task())) is True
    assert await user.get_all_tasks(QUEUE) == [make_task(result="new")]


async def test_worker_acknowledges_what_was_deleted(make_backend: MakeBackend) -> None:
    """As the next sheppy's does, where it finds the task gone before it runs it."""
    worker, user = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    await user.delete_task(QUEUE, "task")
    assert await worker.get_tasks(QUEUE, ["task"]) == {}
    await worker.acknowledge(QUEUE, ["task"])
    assert await user.append(QUEUE, [make_task()]) == [True]
    await worker.acknowledge(QUEUE, ["task"])
    assert await user.size(QUEUE) == 1


async def test_late_append_of_a_deleted_task_does_nothing(make_backend: MakeBackend) -> None:
    scheduler, user = await make_backend(), await make_backend()
    await scheduler.schedule(QUEUE, make_task(status="scheduled"), PAST)
    [due] = await scheduler.pop_scheduled(QUEUE)
    await user.delete_task(QUEUE, "task")
    assert await scheduler.append(QUEUE, [{**due, "status": "pending"}], unique=False) == [True]
    assert await user.get_all_tasks(QUEUE) == []


async def test_late_schedule_of_a_deleted_retry_does_nothing(make_backend: MakeBackend) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_retrying(worker, make_task())
    [parked] = await user.get_all_tasks(QUEUE)
    await user.delete_task(QUEUE, "task")
    again = datetime.fromisoformat(parked["next_retry_at"])
    assert await worker.schedule(QUEUE, parked, again, unique=False) is True
    assert await user.get_all_tasks(QUEUE) == []
    assert await user.get_scheduled(QUEUE) == []


async def test_rate_limited_task_that_was_deleted_does_not_come_back(
    make_backend: MakeBackend,
) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    assert await worker.acquire_rate_limit(QUEUE, "key", 1, 60, "other") is None
    assert await worker.acquire_rate_limit(QUEUE, "key", 1, 60, "task") is not None
    await user.delete_task(QUEUE, "task")
    await worker.schedule(QUEUE, make_task(status="scheduled"), FUTURE, unique=False)
    assert await user.get_all_tasks(QUEUE) == []
