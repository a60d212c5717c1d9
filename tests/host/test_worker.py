"""What a worker does with tasks of every kind, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sheppy import Queue

from tests.host.support import (
    PATIENCE,
    MakeBackend,
    all_finished,
    finished,
    running,
    stop,
    stored,
    until,
)
from tests.host.tasks import (
    Order,
    add,
    countdown,
    describe,
    echo,
    fail,
    gates,
    is_main_thread,
    journal,
    meet,
    never_end,
    record,
    ship,
    then_many,
    then_one,
    wait_at,
)
from tests.support import make_worker, run_worker


async def test_task_of_a_broken_function_ends_with_its_error(queue: Queue) -> None:
    tasks = [fail("no paper"), never_end()]
    await queue.add(tasks)
    worker = make_worker(queue.backend)
    await run_worker(worker, oneshot=True)
    errors = [(task.status, task.error) for task in await all_finished(queue, tasks)]
    assert errors == [
        ("failed", "RuntimeError: no paper"),
        ("failed", "TaskTimeoutError: Task exceeded timeout of 0.05 seconds"),
    ]


async def test_arguments_and_results_come_back_equal(queue: Queue) -> None:
    values: list[Any] = [
        {"b": 1, "a": [None, True, 0.1, {"z": {}, "y": []}]},
        "nul \0, half a pair \ud800, a whole one \U0001f600",
        [2**64, -(2**200), 1e308],
        "x" * 1_000_000,
    ]
    tasks = [echo(value) for value in values]
    await queue.add(tasks)
    await run_worker(make_worker(queue.backend), oneshot=True)
    for value, done in zip(values, await all_finished(queue, tasks), strict=True):
        assert (done.status, done.error) == ("completed", None)
        # Their text, in which 1 is not 1.0 and the order of keys shows.
        assert repr(done.result) == repr(value)
        assert repr(done.spec.args) == repr((value,))


async def test_models_are_models_again_in_the_task_and_in_its_result(queue: Queue) -> None:
    order = Order(number=7, items=["ink"], at=datetime.now(timezone.utc))
    task = ship(order, express=True)
    await queue.add(task)
    await run_worker(make_worker(queue.backend), oneshot=True)
    expected = order.model_copy(update={"items": ["ink", "fast"]})
    assert (await finished(queue, task)).result == expected


async def test_task_is_given_itself(queue: Queue) -> None:
    task = describe()
    await queue.add(task)
    await run_worker(make_worker(queue.backend), oneshot=True)
    expected = {"id": str(task.id), "func": "tests.host.tasks:describe", "args": []}
    assert (await finished(queue, task)).result == expected


async def test_plain_functions_run_in_threads_side_by_side(queue: Queue) -> None:
    tasks = [is_main_thread(), meet(), meet()]
    await queue.add(tasks)
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert [task.result for task in await all_finished(queue, tasks)] == [False, True, True]


async def test_tasks_that_a_task_returns_are_run_as_well(queue: Queue) -> None:
    await queue.add([then_one(100), then_many(3), countdown(4)])
    await run_worker(make_worker(queue.backend), max_tasks=11)
    assert sorted(run.value for run in journal) == [0, 0, 1, 1, 2, 2, 3, 4, 100]
    done = await queue.get_all_tasks()
    assert len(done) == 11
    assert {task.status for task in done} == {"completed"}


async def test_worker_serves_several_queues(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    queues = [Queue(backend, name) for name in ("first", "second", "third")]
    task = record(1)
    for queue in queues:
        # One task in three queues is three tasks.
        assert await queue.add(task) is True
    await run_worker(make_worker(backend, ["first", "second"]), oneshot=True)
    assert [(await stored(queue, task)).status for queue in queues] == [
        "completed",
        "completed",
        "new",
    ]
    assert await backend.list_queues() == {"first": 0, "second": 0, "third": 1}


async def test_tasks_of_one_queue_do_not_hold_up_those_of_another(
    make_backend: MakeBackend,
) -> None:
    backend = await make_backend()
    slow, quick = Queue(backend, "slow"), Queue(backend, "quick")
    blocked, task = wait_at("gate"), add(1, 2)
    await slow.add(blocked)
    async with running(make_worker(backend, ["slow", "quick"], max_concurrent_tasks=2)):
        await gates["gate"].entered.wait()
        await quick.add(task)
        assert (await finished(quick, task)).result == 3
        assert (await stored(slow, blocked)).status == "new"
        gates["gate"].open.set()
        assert (await finished(slow, blocked)).result == "gate"


async def test_oneshot_ends_where_there_is_nothing_left(queue: Queue) -> None:
    await queue.add([record(number) for number in range(25)])
    await run_worker(make_worker(queue.backend, max_concurrent_tasks=2), oneshot=True)
    assert [run.value for run in journal] == list(range(25))
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert len(journal) == 25


async def test_worker_takes_no_more_than_max_tasks(queue: Queue) -> None:
    tasks = [record(number) for number in range(7)]
    await queue.add(tasks)
    worker = make_worker(queue.backend)
    for processed in (3, 6):
        await run_worker(worker, max_tasks=3)
        assert [run.value for run in journal] == list(range(processed))
        assert await queue.size() == 7 - processed
    assert await queue.get_pending(5) == tasks[6:]


async def test_stopped_worker_finishes_what_it_took_and_leaves_the_rest(queue: Queue) -> None:
    gated = [wait_at("one"), wait_at("two")]
    rest = [record(number) for number in range(20)]
    await queue.add(gated)
    worker = make_worker(queue.backend, max_concurrent_tasks=2)
    async with running(worker):
        for gate in ("one", "two"):
            await gates[gate].entered.wait()
        await queue.add(rest)
        await stop(worker)
        for gate in ("one", "two"):
            gates[gate].open.set()
    done = await queue.wait_for([*gated], timeout=-1)
    assert {task.result for task in done.values()} == {"one", "two"}

    async def each_has_run_or_waits() -> bool:
        return len(journal) + await queue.size() == len(gated + rest)

    await until(each_has_run_or_waits)
    # It takes at most one task ahead for each that runs.
    assert await queue.size() >= len(rest) - 2


async def test_stopped_worker_runs_what_it_had_taken_but_not_begun(
    make_backend: MakeBackend,
) -> None:
    backend = await make_backend()
    queues = [Queue(backend, name) for name in ("first", "second")]
    for queue in queues:
        await queue.add(wait_at(queue.name))
    # One slot, and each queue takes a task for it.
    worker = make_worker(backend, ["first", "second"], max_concurrent_tasks=1)

    async def both_are_taken() -> bool:
        return [await queue.size() for queue in queues] == [0, 0]

    async with running(worker):
        await until(both_are_taken)
        await stop(worker)
        assert len(journal) == 1
        for queue in queues:
            gates[queue.name].open.set()
    assert sorted(run.value for run in journal) == ["first", "second"]
    statuses = [task.status for queue in queues for task in await queue.get_all_tasks()]
    assert statuses == ["completed", "completed"]


@pytest.mark.posix
async def test_signal_stops_a_worker_in_order(queue: Queue) -> None:
    task = wait_at("gate")
    await queue.add(task)
    worker = make_worker(queue.backend)
    work = asyncio.create_task(worker.work())
    await gates["gate"].entered.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(worker._shutdown_event.wait(), PATIENCE)
    gates["gate"].open.set()
    await asyncio.wait_for(work, PATIENCE)
    assert (await stored(queue, task)).status == "completed"


@pytest.mark.concurrency
@pytest.mark.parametrize("disconnects", [False, True], ids=["stays connected", "disconnects"])
async def test_worker_that_stops_while_tasks_arrive_loses_none(
    make_backend: MakeBackend, disconnects: bool
) -> None:
    producer, tasks = Queue(await make_backend(), "test"), [record(number) for number in range(20)]
    for number, task in enumerate(tasks):
        backend = await make_backend()
        async with running(make_worker(backend)):
            adding = asyncio.create_task(producer.add(task))
            # Stops at another moment each time, some of them in the middle of taking the task.
            for _ in range(3 * number):
                await asyncio.sleep(0)
        if disconnects:
            await backend.disconnect()
        await adding
    async with running(make_worker(producer.backend)):
        await all_finished(producer, tasks)
    assert sorted(run.value for run in journal) == list(range(20))


async def test_clear_while_a_task_runs_drops_its_result(
    queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    cleared, later = wait_at("gate"), add(1, 2)
    await queue.add(cleared)
    async with running(make_worker(queue.backend)):
        await gates["gate"].entered.wait()
        for number in range(3):
            await queue.schedule(record(number), timedelta(days=1))
        assert await queue.clear() == 4
        assert await queue.clear() == 0
        gates["gate"].open.set()
        await queue.add(later)
        await finished(queue, later)
    assert await queue.get_all_tasks() == [await stored(queue, later)]
    assert [run.value for run in journal] == ["gate"]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"Task {cleared.id} was taken over or cleared: its result is dropped"]


async def test_clear_between_adding_and_running_leaves_a_worker_that_works(queue: Queue) -> None:
    async with running(make_worker(queue.backend)):
        for number in range(10):
            await queue.add([record(number) for _ in range(5)])
            await queue.clear()
        last = add(1, 2)
        await queue.add(last)
        assert (await finished(queue, last)).result == 3
    assert await queue.size() == 0
