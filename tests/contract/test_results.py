"""store_result and get_results: what became of tasks, and waiting for it."""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from typing import TYPE_CHECKING

import pytest
from sheppy import BackendError

from tests.contract.tasks import (
    FUTURE,
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
    store_finished,
    store_scheduled,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend

SOON = 5.0  # seconds; far more than an answer takes


@pytest.mark.parametrize("status", ["completed", "failed", "crashed", "cancelled"])
async def test_finished_task_has_a_result_whatever_its_status(
    backend: SqlBackend, status: str
) -> None:
    await store_claimed(backend, make_task())
    done = finished(make_task(), status=status)
    assert await backend.store_result(QUEUE, done) is True
    for timeout in (None, -1, 0, 0.001, 10):
        assert await backend.get_results(QUEUE, ["task"], timeout) == {"task": done}
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": done}
    assert await backend.get_all_tasks(QUEUE) == [done]
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 1, "scheduled": 0}
    assert await backend.size(QUEUE) == 0
    assert await backend.pop(QUEUE) == []


async def test_result_of_an_unknown_task_is_stored(backend: SqlBackend) -> None:
    assert await backend.store_result(QUEUE, finished(make_task())) is True
    assert await backend.get_results(QUEUE, ["task"]) == {"task": finished(make_task())}


async def test_unfinished_unknown_task_is_stored_in_no_queue(backend: SqlBackend) -> None:
    assert await backend.store_result(QUEUE, make_task()) is True
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": make_task()}
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.pop(QUEUE) == []
    assert await backend.get_scheduled(QUEUE) == []
    assert await backend.append(QUEUE, [make_task()]) == [False]


async def test_result_may_be_stored_again(backend: SqlBackend) -> None:
    await store_claimed(backend, make_task())
    for result in (1, 2, 3):
        assert await backend.store_result(QUEUE, finished(make_task(), result=result)) is True
    latest = finished(make_task(), result=3)
    assert await backend.get_results(QUEUE, ["task"]) == {"task": latest}
    assert await backend.get_all_tasks(QUEUE) == [latest]
    assert (await backend.get_stats(QUEUE))["completed"] == 1


@pytest.mark.parametrize("state", STATES)
async def test_result_by_who_never_claimed_the_task_ends_it(
    make_backend: MakeBackend, state: str
) -> None:
    holder, other = await make_backend(), await make_backend()
    await STATES[state](holder, make_task())
    done = finished(make_task(), result="by another")
    assert await other.store_result(QUEUE, done) is True
    assert await holder.get_all_tasks(QUEUE) == [done]
    assert await holder.get_results(QUEUE, ["task"]) == {"task": done}
    assert await holder.pop(QUEUE) == []
    assert await holder.get_scheduled(QUEUE) == []
    assert await holder.get_stats(QUEUE) == {"pending": 0, "completed": 1, "scheduled": 0}


async def test_retrying_task_is_in_no_queue_and_has_no_result(backend: SqlBackend) -> None:
    await store_claimed(backend, make_task())
    again = retrying(make_task())
    assert await backend.store_result(QUEUE, again) is True
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": again}
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.get_scheduled(QUEUE) == []
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 0, "scheduled": 0}
    assert await backend.pop(QUEUE) == []
    assert await backend.pop_scheduled(QUEUE) == []


async def test_retry_that_nobody_schedules_comes_by_itself(backend: SqlBackend) -> None:
    """sheppy 0.0.7 does not schedule the last retry."""
    await store_claimed(backend, make_task())
    last = {**retrying(make_task(), delay=0), "retry_count": 3}
    await backend.store_result(QUEUE, last)
    assert await backend.pop_scheduled(QUEUE) == [last]


async def test_finished_task_that_is_stored_unfinished_has_no_result(backend: SqlBackend) -> None:
    await store_finished(backend, make_task())
    assert await backend.store_result(QUEUE, make_task(result="again")) is True
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.get_all_tasks(QUEUE) == [make_task(result="again")]
    with pytest.raises(TimeoutError):
        await backend.get_results(QUEUE, ["task"], 0.01)


async def test_result_in_another_queue_than_the_claim_is_refused(backend: SqlBackend) -> None:
    await store_claimed(backend, make_task())
    with pytest.raises(BackendError, match="queue name mismatch"):
        await backend.store_result("other", finished(make_task()))
    assert await backend.get_all_tasks("other") == []
    assert await backend.store_result(QUEUE, finished(make_task())) is True
    assert await backend.get_results(QUEUE, ["task"]) == {"task": finished(make_task())}


@pytest.mark.parametrize("outcome", [finished, retrying, dict])
async def test_result_of_a_cleared_task_does_not_bring_it_back(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture, outcome: type[dict[str, object]]
) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    await user.clear(QUEUE)
    assert await worker.store_result(QUEUE, outcome(make_task())) is True
    assert await user.get_all_tasks(QUEUE) == []
    assert [record.levelname for record in caplog.records if "dropped" in record.message] == [
        "WARNING"
    ]


@pytest.mark.parametrize("outcome", [finished, retrying])
async def test_result_by_a_worker_that_lost_its_claim_is_dropped(
    make_backend: MakeBackend, outcome: type[dict[str, object]]
) -> None:
    slow, user, quick = await make_backend(), await make_backend(), await make_backend()
    await store_claimed(slow, make_task())
    await user.append(QUEUE, [make_task(result="again")], unique=False)
    assert ids(await quick.pop(QUEUE)) == ["task"]
    before = await everything(user)
    assert await slow.store_result(QUEUE, outcome(make_task())) is True
    assert await everything(user) == before
    done = finished(make_task(), result="by the quick one")
    await quick.store_result(QUEUE, done)
    assert await slow.store_result(QUEUE, outcome(make_task())) is True
    assert await user.get_all_tasks(QUEUE) == [done]


@pytest.mark.parametrize("timeout", [None, -1, 0, 0.5])
async def test_no_ids_is_an_empty_answer(backend: SqlBackend, timeout: float | None) -> None:
    waiting = backend.get_results(QUEUE, [], timeout)
    assert await asyncio.wait_for(waiting, SOON) == {}


@pytest.mark.parametrize("timeout", [None, -1, -0.001])
async def test_without_waiting_what_is_finished_comes(
    backend: SqlBackend, timeout: float | None
) -> None:
    await store_finished(backend, make_task("done"))
    await store_claimed(backend, make_task("running"))
    await store_scheduled(backend, make_task("scheduled"))
    wanted = ["running", "done", "unknown", "scheduled", "done"]
    answer = await asyncio.wait_for(backend.get_results(QUEUE, wanted, timeout), SOON)
    assert answer == {"done": finished(make_task("done"))}
    assert await backend.get_results("unknown", wanted, timeout) == {}


@pytest.mark.parametrize("timeout", [0.1, 0.001, 1e-9])
async def test_timeout_says_how_long_it_waited(backend: SqlBackend, timeout: float) -> None:
    await store_finished(backend, make_task("done"))
    message = re.escape(f"Did not complete within {timeout} seconds")
    with pytest.raises(TimeoutError, match=f"^{message}$"):
        await asyncio.wait_for(backend.get_results(QUEUE, ["done", "unknown"], timeout), SOON)


async def test_message_names_the_timeout_as_it_was_given(backend: SqlBackend) -> None:
    with pytest.raises(TimeoutError, match=r"^Did not complete within 1 seconds$"):
        await backend.get_results(QUEUE, ["unknown"], 1)


async def test_timeout_zero_waits_for_all_without_end(make_backend: MakeBackend) -> None:
    user, worker = await make_backend(), await make_backend()
    tasks = make_tasks(2)
    await worker.append(QUEUE, tasks)
    await worker.pop(QUEUE, limit=2)
    waiting = asyncio.create_task(user.get_results(QUEUE, ids(tasks), 0))
    await worker.store_result(QUEUE, finished(tasks[0]))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    await worker.store_result(QUEUE, finished(tasks[1]))
    expected = {task["id"]: finished(task) for task in tasks}
    assert await asyncio.wait_for(waiting, SOON) == expected


async def test_cancelled_wait_ends(backend: SqlBackend) -> None:
    waiting = asyncio.create_task(backend.get_results(QUEUE, ["unknown"], 0))
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    waiting.cancel()
    await asyncio.wait([waiting], timeout=SOON)
    assert waiting.cancelled()


async def test_positive_timeout_waits_for_all(make_backend: MakeBackend) -> None:
    user, worker = await make_backend(), await make_backend()
    tasks = make_tasks(5)
    await worker.append(QUEUE, tasks)
    await worker.pop(QUEUE, limit=5)
    waiting = asyncio.create_task(user.get_results(QUEUE, [*ids(tasks), "task-0"], 60))
    for task in tasks[::-1]:
        await worker.store_result(QUEUE, finished(task))
    expected = {task["id"]: finished(task) for task in tasks}
    assert await asyncio.wait_for(waiting, SOON) == expected


async def test_waiter_is_woken_at_once(make_backend: MakeBackend) -> None:
    """By a backend of the same process, however rarely the waiting one looks by itself."""
    user, worker = await make_backend(max_poll_interval=60), await make_backend()
    tasks = make_tasks(7)
    await worker.append(QUEUE, tasks)
    await worker.pop(QUEUE, limit=7)
    waiting = [
        asyncio.create_task(user.get_results(QUEUE, [task["id"]], number * 60))
        for number, task in enumerate(tasks)
    ]
    done, _ = await asyncio.wait(waiting, timeout=1.3)
    assert not done
    latencies = []
    for task, waiter in zip(tasks, waiting, strict=True):
        await worker.store_result(QUEUE, finished(task))
        stored = time.monotonic()
        await asyncio.wait_for(waiter, SOON)
        latencies.append(time.monotonic() - stored)
    # By itself it would look once in a minute.
    assert statistics.median(latencies) < 1


async def test_retry_does_not_end_a_wait(make_backend: MakeBackend) -> None:
    user, worker = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    waiting = asyncio.create_task(user.get_results(QUEUE, ["task"], 60))
    await worker.store_result(QUEUE, retrying(make_task()))
    await worker.schedule(QUEUE, make_task(), FUTURE, unique=False)
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    await worker.store_result(QUEUE, finished(make_task()))
    assert await asyncio.wait_for(waiting, SOON) == {"task": finished(make_task())}


async def test_task_retried_by_a_user_has_to_finish_again(backend: SqlBackend) -> None:
    await store_finished(backend, make_task())
    await backend.append(QUEUE, [make_task()], unique=False)
    with pytest.raises(TimeoutError):
        await backend.get_results(QUEUE, ["task"], 0.01)


async def test_get_tasks_finds_every_state_and_leaves_out_the_unknown(
    backend: SqlBackend,
) -> None:
    assert await backend.get_tasks(QUEUE, []) == {}
    assert await backend.get_tasks(QUEUE, ["unknown", "None"]) == {}
    for state, store in STATES.items():
        await store(backend, make_task(state))
        if state == "pending":
            await backend.pop(QUEUE)
    found = await backend.get_tasks(QUEUE, [*STATES, *STATES, "unknown"])
    assert found.keys() == STATES.keys()
    assert all(task["id"] == task_id for task_id, task in found.items())
    assert sorted(ids(await backend.get_all_tasks(QUEUE))) == sorted(STATES)
    assert await backend.get_tasks("other", list(STATES)) == {}


@pytest.mark.torture
async def test_thousands_of_ids_may_be_asked_for(backend: SqlBackend) -> None:
    tasks = make_tasks(3000)
    await backend.append(QUEUE, tasks)
    for task in await backend.pop(QUEUE, limit=20):
        await backend.store_result(QUEUE, finished(task))
    wanted = [f"task-{number}" for number in range(0, 70_000, 2)]
    found = await asyncio.wait_for(backend.get_tasks(QUEUE, wanted), SOON)
    assert list(found) == [task_id for task_id in found if task_id in set(wanted)]
    assert len(found) == 1500
    assert len(await asyncio.wait_for(backend.get_results(QUEUE, wanted), SOON)) == 10


async def test_expired_results_are_gone_at_once(make_backend: MakeBackend) -> None:
    backend = await make_backend(ttl=0.000001)
    await store_finished(backend, make_task())
    assert await backend.get_tasks(QUEUE, ["task"]) == {}
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.get_all_tasks(QUEUE) == []
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 0, "scheduled": 0}
    assert await backend.clear(QUEUE) == 0


@pytest.mark.parametrize("status", ["failed", "crashed", "cancelled", "completed"])
async def test_failures_may_be_kept_for_another_time(
    make_backend: MakeBackend, status: str
) -> None:
    briefly = await make_backend(ttl=None, error_ttl=0.000001)
    long = await make_backend(ttl=0.000001, error_ttl=None)
    await briefly.store_result(QUEUE, finished(make_task("briefly"), status=status))
    await long.store_result(QUEUE, finished(make_task("long"), status=status))
    kept = ids(await long.get_all_tasks(QUEUE))
    assert kept == (["briefly"] if status == "completed" else ["long"])


async def test_unfinished_tasks_never_expire(make_backend: MakeBackend) -> None:
    backend = await make_backend(ttl=0.000001)
    for state in ("scheduled", "claimed", "acknowledged", "retrying", "pending"):
        await STATES[state](backend, make_task(state))
    assert len(await backend.get_all_tasks(QUEUE)) == 5
