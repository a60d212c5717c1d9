"""schedule, get_scheduled and pop_scheduled: tasks for later, and those whose time has come."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from tests.contract.tasks import (
    FUTURE,
    NOW,
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

BEGINNING = datetime(1, 1, 1, tzinfo=timezone.utc)
END = datetime.max.replace(tzinfo=timezone.utc)


async def test_scheduled_task_is_stored_and_not_in_line(backend: SqlBackend) -> None:
    task = make_task(status="scheduled")
    assert await backend.schedule(QUEUE, task, FUTURE) is True
    assert await backend.get_scheduled(QUEUE) == [task]
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": task}
    assert await backend.get_all_tasks(QUEUE) == [task]
    assert await backend.size(QUEUE) == 0
    assert await backend.get_pending(QUEUE) == []


@pytest.mark.parametrize("state", STATES)
async def test_taken_id_is_not_scheduled_and_nothing_changes(
    backend: SqlBackend, state: str
) -> None:
    await STATES[state](backend, make_task())
    before = await everything(backend)
    assert await backend.schedule(QUEUE, make_task(result="other"), PAST) is False
    assert await everything(backend) == before
    if state != "popped from the schedule":
        assert await backend.pop_scheduled(QUEUE) == []


@pytest.mark.parametrize("state", STATES)
async def test_schedule_again_moves_the_task_to_its_new_time(
    backend: SqlBackend, state: str
) -> None:
    await STATES[state](backend, make_task())
    again = make_task(result="again")
    assert await backend.schedule(QUEUE, again, NOW + timedelta(days=2), unique=False) is True
    assert await backend.get_scheduled(QUEUE) == [again]
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": again}
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 0, "scheduled": 1}
    assert await backend.pop(QUEUE) == []
    assert await backend.pop_scheduled(QUEUE, FUTURE) == []
    assert await backend.pop_scheduled(QUEUE, NOW + timedelta(days=2)) == [again]
    assert await backend.pop_scheduled(QUEUE, NOW + timedelta(days=3)) == []


async def test_schedule_again_makes_unknown_tasks(backend: SqlBackend) -> None:
    assert await backend.schedule(QUEUE, make_task(), FUTURE, unique=False) is True
    assert await backend.get_scheduled(QUEUE) == [make_task()]


async def test_rate_limited_task_moves_from_its_claim_to_the_schedule(
    make_backend: MakeBackend,
) -> None:
    """Schedule, then acknowledge, as the worker does; no copy of it is left anywhere."""
    worker, other = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    await worker.schedule(QUEUE, make_task(status="scheduled"), PAST, unique=False)
    await worker.acknowledge(QUEUE, ["task"])
    [due] = await other.pop_scheduled(QUEUE)
    await other.append(QUEUE, [{**due, "status": "pending"}], unique=False)
    assert ids(await other.pop(QUEUE, limit=5)) == ["task"]
    await other.store_result(QUEUE, finished(make_task()))
    assert await worker.get_all_tasks(QUEUE) == [finished(make_task())]


async def test_scheduled_tasks_are_shown_the_earliest_first(backend: SqlBackend) -> None:
    days = {"c": 3, "a": -1, "d": 400_000, "b": 2}
    for task_id, day in days.items():
        await backend.schedule(QUEUE, make_task(task_id), NOW + timedelta(days=day))
    assert ids(await backend.get_scheduled(QUEUE)) == ["a", "b", "c", "d"]
    assert await backend.get_scheduled("unknown") == []


async def test_due_tasks_are_popped_once_the_earliest_first(backend: SqlBackend) -> None:
    times = {"later": FUTURE, "b": PAST, "a": PAST - timedelta(days=1), "c": NOW}
    for task_id, at in times.items():
        await backend.schedule(QUEUE, make_task(task_id, status="scheduled"), at)
    due = await backend.pop_scheduled(QUEUE)
    assert due == [make_task(task_id, status="scheduled") for task_id in "abc"]
    assert await backend.pop_scheduled(QUEUE) == []
    assert ids(await backend.get_scheduled(QUEUE)) == ["later"]
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 0, "scheduled": 1}
    assert len(await backend.get_all_tasks(QUEUE)) == 4


async def test_due_tasks_are_in_line_only_when_appended(backend: SqlBackend) -> None:
    await backend.schedule(QUEUE, make_task(status="scheduled"), PAST)
    [due] = await backend.pop_scheduled(QUEUE)
    assert await backend.size(QUEUE) == 0
    assert await backend.pop(QUEUE) == []
    pending = {**due, "status": "pending"}
    assert await backend.append(QUEUE, [pending], unique=False) == [True]
    assert await backend.size(QUEUE) == 1
    assert await backend.pop(QUEUE) == [pending]


async def test_time_given_is_honoured_and_inclusive(backend: SqlBackend) -> None:
    at = FUTURE.replace(microsecond=123_456)
    await backend.schedule(QUEUE, make_task(), at)
    assert await backend.pop_scheduled(QUEUE, at - timedelta(microseconds=1)) == []
    assert await backend.pop_scheduled(QUEUE, at) == [make_task()]


async def test_time_may_be_given_in_any_zone(backend: SqlBackend) -> None:
    east, west = timezone(timedelta(hours=14)), timezone(-timedelta(hours=12))
    await backend.schedule(QUEUE, make_task(), FUTURE.astimezone(east))
    before, then = FUTURE - timedelta(seconds=1), FUTURE
    assert await backend.pop_scheduled(QUEUE, before.astimezone(west)) == []
    assert await backend.pop_scheduled(QUEUE, then.astimezone(west)) == [make_task()]


@pytest.mark.parametrize("zone", [timezone.utc, timezone(timedelta(hours=14))])
async def test_time_may_be_at_either_end_of_the_calendar(
    backend: SqlBackend, zone: timezone
) -> None:
    times = {
        "first": BEGINNING.replace(tzinfo=zone),
        "before 1970": datetime(1969, 12, 31, tzinfo=zone),
        "last": END.replace(tzinfo=zone),
    }
    for task_id, at in times.items():
        assert await backend.schedule(QUEUE, make_task(task_id), at)
    assert ids(await backend.get_scheduled(QUEUE)) == list(times)
    assert ids(await backend.pop_scheduled(QUEUE)) == ["first", "before 1970"]
    assert ids(await backend.pop_scheduled(QUEUE, END)) == ["last"]


async def test_time_without_a_zone_is_refused(backend: SqlBackend) -> None:
    naive = datetime(2030, 1, 1)  # noqa: DTZ001
    before = await everything(backend)
    with pytest.raises(ValueError, match="at must be timezone-aware"):
        await backend.schedule(QUEUE, make_task(), naive)
    with pytest.raises(ValueError, match="now must be timezone-aware"):
        await backend.pop_scheduled(QUEUE, naive)
    assert await everything(backend) == before


async def test_concurrent_schedulers_get_disjoint_tasks(make_backend: MakeBackend) -> None:
    backends = [await make_backend() for _ in range(3)]
    tasks = make_tasks(30)
    await asyncio.gather(*(backends[0].schedule(QUEUE, task, PAST) for task in tasks))
    popped = await asyncio.gather(
        *(backend.pop_scheduled(QUEUE) for _ in range(3) for backend in backends)
    )
    got = [task_id for batch in popped for task_id in ids(batch)]
    got += ids(await backends[0].pop_scheduled(QUEUE))
    assert sorted(got) == sorted(ids(tasks))


async def test_many_due_tasks_are_popped_at_once(backend: SqlBackend) -> None:
    await asyncio.gather(*(backend.schedule(QUEUE, task, PAST) for task in make_tasks(300)))
    due = await backend.pop_scheduled(QUEUE)
    assert len(due) == 300
    promoted = [{**task, "status": "pending"} for task in due]
    assert await backend.append(QUEUE, promoted, unique=False) == [True] * 300
    assert await backend.pop(QUEUE, limit=400) == promoted


async def test_late_append_of_a_popped_task_does_not_repeat_it(make_backend: MakeBackend) -> None:
    """The scheduler stalled, another has promoted the task and a worker finished it."""
    stalled, other = await make_backend(), await make_backend()
    await stalled.schedule(QUEUE, make_task(status="scheduled"), PAST)
    [due] = await stalled.pop_scheduled(QUEUE)
    pending = {**due, "status": "pending"}
    await other.append(QUEUE, [pending], unique=False)
    await other.pop(QUEUE)
    await other.store_result(QUEUE, finished(pending))
    assert await stalled.append(QUEUE, [pending], unique=False) == [True]
    assert await other.size(QUEUE) == 0
    assert await other.get_tasks(QUEUE, ["task"]) == {"task": finished(pending)}


async def test_cleared_tasks_do_not_come_back_from_the_schedule(backend: SqlBackend) -> None:
    await backend.schedule(QUEUE, make_task("waits", status="scheduled"), PAST)
    await backend.schedule(QUEUE, make_task("popped", status="scheduled"), PAST - timedelta(1))
    [popped, _] = await backend.pop_scheduled(QUEUE)
    await backend.clear(QUEUE)
    await backend.append(QUEUE, [{**popped, "status": "pending"}], unique=False)
    assert await backend.size(QUEUE) == 0
    assert await backend.pop_scheduled(QUEUE, END) == []
