"""append: which tasks are put in line, in which order, and what stays as it was."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING

import pytest

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
    store_claimed,
    store_finished,
    store_scheduled,
)

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend


@pytest.mark.parametrize("unique", [True, False])
async def test_nothing_appended_is_an_empty_answer(backend: SqlBackend, unique: bool) -> None:
    assert await backend.append(QUEUE, [], unique=unique) == []
    assert await backend.size(QUEUE) == 0


async def test_new_tasks_are_put_in_line_in_the_order_given(backend: SqlBackend) -> None:
    tasks = [make_task(task_id) for task_id in ("b", "a", "c")]
    assert await backend.append(QUEUE, tasks) == [True, True, True]
    assert await backend.get_pending(QUEUE, 10) == tasks
    assert await backend.size(QUEUE) == 3


async def test_order_holds_across_calls_and_backends(make_backend: MakeBackend) -> None:
    one, other = await make_backend(), await make_backend()
    for number in range(10):
        backend = one if number % 2 else other
        await backend.append(QUEUE, [make_task(f"{number}-z"), make_task(f"{number}-a")])
    expected = [f"{number}-{letter}" for number in range(10) for letter in "za"]
    assert ids(await one.pop(QUEUE, limit=20)) == expected


@pytest.mark.parametrize("state", STATES)
async def test_taken_id_is_refused_and_changes_nothing(backend: SqlBackend, state: str) -> None:
    await STATES[state](backend, make_task())
    before = await everything(backend)
    assert await backend.append(QUEUE, [make_task(result="other")]) == [False]
    assert await everything(backend) == before


@pytest.mark.parametrize("state", STATES)
async def test_only_the_taken_ids_of_a_batch_are_refused(backend: SqlBackend, state: str) -> None:
    await STATES[state](backend, make_task("taken"))
    size = await backend.size(QUEUE)
    batch = [make_task(task_id) for task_id in ("one", "taken", "two")]
    assert await backend.append(QUEUE, batch) == [True, False, True]
    assert await backend.size(QUEUE) == size + 2


async def test_first_of_two_with_one_id_in_a_batch_counts(backend: SqlBackend) -> None:
    first, second = make_task(result="first"), make_task(result="second")
    assert await backend.append(QUEUE, [first, make_task("x"), second]) == [True, True, False]
    assert await backend.pop(QUEUE, limit=10) == [first, make_task("x")]


async def test_ids_are_unique_to_a_queue_only(backend: SqlBackend) -> None:
    here, there = make_task(result="here"), make_task(result="there")
    assert await backend.append("here", [here]) == [True]
    assert await backend.append("there", [there]) == [True]
    assert await backend.get_tasks("here", ["task"]) == {"task": here}
    assert await backend.pop("there") == [there]
    assert await backend.pop("here") == [here]


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("count", [1000, 10_001])
async def test_many_tasks_fit_in_one_call(backend: SqlBackend, count: int, unique: bool) -> None:
    tasks = make_tasks(count)
    assert await backend.append(QUEUE, tasks, unique=unique) == [True] * count
    assert await backend.size(QUEUE) == count
    assert ids(await backend.pop(QUEUE, limit=count + 1)) == ids(tasks)


async def test_cleared_ids_are_free_again(backend: SqlBackend) -> None:
    await backend.append(QUEUE, [make_task()])
    await backend.clear(QUEUE)
    assert await backend.append(QUEUE, [make_task()]) == [True]


@pytest.mark.parametrize("state", STATES)
async def test_append_again_stores_the_new_payload_and_queues_it(
    backend: SqlBackend, state: str
) -> None:
    await STATES[state](backend, make_task())
    again = make_task(result="again")
    assert await backend.append(QUEUE, [again], unique=False) == [True]
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": again}
    assert await backend.size(QUEUE) == 1
    assert await backend.get_scheduled(QUEUE) == []
    assert await backend.get_results(QUEUE, ["task"]) == {}
    assert await backend.pop(QUEUE, limit=10) == [again]
    assert await backend.pop(QUEUE, limit=10) == []


async def test_append_again_goes_to_the_tail(backend: SqlBackend) -> None:
    await store_scheduled(backend, make_task("scheduled"))
    await store_claimed(backend, make_task("claimed"))
    await store_finished(backend, make_task("finished"))
    await backend.append(QUEUE, [make_task("waiting")])
    again = [make_task(task_id) for task_id in ("scheduled", "finished", "unknown", "claimed")]
    assert await backend.append(QUEUE, again, unique=False) == [True] * 4
    assert ids(await backend.pop(QUEUE, limit=10)) == ["waiting", *ids(again)]


async def test_append_again_of_a_pending_task_keeps_one_entry(backend: SqlBackend) -> None:
    await backend.append(QUEUE, [make_task("first"), make_task("second")])
    latest = make_task("first", result="latest")
    assert await backend.append(QUEUE, [latest], unique=False) == [True]
    assert await backend.size(QUEUE) == 2
    assert await backend.pop(QUEUE, limit=10) == [latest, make_task("second")]


async def test_append_again_of_one_id_twice_keeps_the_last_payload(backend: SqlBackend) -> None:
    batch = [make_task(result=1), make_task("other"), make_task(result=2)]
    assert await backend.append(QUEUE, batch, unique=False) == [True] * 3
    assert await backend.size(QUEUE) == 2
    assert (await backend.get_tasks(QUEUE, ["task"]))["task"] == make_task(result=2)


async def test_append_again_takes_the_task_from_the_worker_that_ran_it(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    worker, user = await make_backend(), await make_backend()
    await store_claimed(worker, make_task())
    again = make_task(result="again")
    await user.append(QUEUE, [again], unique=False)
    assert await worker.store_result(QUEUE, finished(make_task())) is True
    assert await user.get_tasks(QUEUE, ["task"]) == {"task": again}
    assert await user.pop(QUEUE) == [again]
    assert any("taken over" in message for message in caplog.messages)


async def test_expired_id_is_free_again(make_backend: MakeBackend) -> None:
    backend = await make_backend(ttl=0.000001)
    await store_finished(backend, make_task())
    assert await backend.get_tasks(QUEUE, ["task"]) == {}
    assert await backend.append(QUEUE, [make_task()]) == [True]
    assert await backend.pop(QUEUE) == [make_task()]


async def test_append_again_of_a_finished_task_ends_its_expiry(make_backend: MakeBackend) -> None:
    backend = await make_backend(ttl=0.000001)
    await store_finished(backend, make_task())
    await backend.append(QUEUE, [make_task()], unique=False)
    assert await backend.get_tasks(QUEUE, ["task"]) == {"task": make_task()}


async def test_stored_task_is_a_copy(backend: SqlBackend) -> None:
    given = make_task()
    kept = copy.deepcopy(given)
    await backend.append(QUEUE, [given])
    given["spec"]["args"].append("changed")
    taken = (await backend.get_pending(QUEUE))[0]
    taken["spec"]["args"].append("changed")
    assert (await backend.get_tasks(QUEUE, ["task"])) == {"task": kept}
    assert await backend.pop(QUEUE) == [kept]


async def test_one_of_two_concurrent_adders_of_an_id_wins(make_backend: MakeBackend) -> None:
    one, other = await make_backend(), await make_backend()
    tasks = make_tasks(40)
    answers = await asyncio.gather(
        *(backend.append(QUEUE, [task]) for task in tasks for backend in (one, other)),
        one.append(QUEUE, tasks),
        other.append(QUEUE, tasks[::-1]),
    )
    pairs, forward, backward = answers[:-2], answers[-2], answers[-1][::-1]
    for number in range(len(tasks)):
        wins = [*pairs[2 * number], *pairs[2 * number + 1], forward[number], backward[number]]
        assert wins.count(True) == 1
    assert sorted(ids(await one.pop(QUEUE, limit=100))) == sorted(ids(tasks))


async def test_append_and_schedule_race_for_an_id_and_one_wins(make_backend: MakeBackend) -> None:
    one, other = await make_backend(), await make_backend()
    tasks = make_tasks(30)
    answers = await asyncio.gather(
        *(one.append(QUEUE, [task]) for task in tasks),
        *(other.schedule(QUEUE, task, FUTURE) for task in tasks),
    )
    appended = [answer == [True] for answer in answers[:30]]
    scheduled = [answer is True for answer in answers[30:]]
    assert [a + s for a, s in zip(appended, scheduled, strict=True)] == [1] * 30
    assert await one.size(QUEUE) == sum(appended)
    assert len(await one.get_scheduled(QUEUE)) == sum(scheduled)


async def test_id_that_is_just_finishing_is_still_taken(make_backend: MakeBackend) -> None:
    worker, user = await make_backend(), await make_backend()
    tasks = make_tasks(40)
    await worker.append(QUEUE, tasks)
    await worker.pop(QUEUE, limit=40)
    answers = await asyncio.gather(
        *(worker.store_result(QUEUE, finished(task)) for task in tasks),
        *(user.append(QUEUE, [task]) for task in tasks),
    )
    assert list(answers[40:]) == [[False]] * 40
    assert await user.size(QUEUE) == 0
    assert len(await user.get_all_tasks(QUEUE)) == 40
