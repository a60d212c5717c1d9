"""drain: what is due runs inline, as a worker runs it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from datetime import timedelta

import pytest
from sheppy import Queue, Task

from sheppy_sql.middleware import children_with_result
from sheppy_sql.testing import Clock, assert_enqueued, assert_not_enqueued, drain
from tests.testing import shop
from tests.testing.shop import (
    add_up,
    again,
    every_hour,
    fail,
    fail_at_once,
    fail_twice,
    journal,
    note,
    note_twice,
    price,
    rarely,
    then_note,
    utc,
)

HOUR = timedelta(hours=1)


async def test_due_tasks_run_in_order_with_those_that_they_enqueue(queue: Queue) -> None:
    await queue.add([note("first"), note_twice("second"), then_note("third"), note("last")])
    ran = await drain(queue)
    assert journal == ["first", "second", "last", "second.1", "second.2", "third"]
    assert [task.status for task in ran] == ["completed"] * 7
    assert [task.result for task in ran if task.spec.args == ("last",)] == ["last"]
    stored = await queue.get_task(ran[0])
    assert stored == ran[0]
    assert await drain(queue) == []
    assert shop.context.get() == "the test's"


async def test_error_of_a_task_is_raised_and_the_next_tasks_stay(queue: Queue) -> None:
    await queue.add([failing := fail("no paper"), note("next")])
    with pytest.raises(LookupError, match="no paper"):
        await drain(queue)
    await assert_enqueued(queue, note("next"), count=1)
    stored = await queue.get_task(failing)
    assert stored is not None
    assert (stored.status, stored.error) == ("failed", "LookupError: no paper")


async def test_errors_are_told_where_they_are_not_to_be_raised(queue: Queue) -> None:
    await queue.add([fail("no paper"), note("next")])
    ran = await drain(queue, raise_errors=False)
    assert [(task.status, task.error) for task in ran] == [
        ("failed", "LookupError: no paper"),
        ("completed", None),
    ]


async def broken(task: Task, queue: Queue) -> AsyncGenerator[None, tuple[Task, Exception | None]]:
    raise ZeroDivisionError
    yield


async def test_error_of_a_middleware_is_raised(queue: Queue) -> None:
    await queue.add(note("never"))
    with pytest.raises(ZeroDivisionError):
        await drain(queue, middleware=[broken])
    assert journal == []


async def test_retries_run_as_the_clock_is_moved(queue: Queue, clock: Clock) -> None:
    await queue.add(fail_twice("job"))
    [first] = await drain(queue)
    assert (first.status, first.error) == ("retrying", "LookupError: job")
    clock.advance(timedelta(seconds=9.999))
    assert await drain(queue) == []
    clock.advance(timedelta(seconds=0.001))
    [second] = await drain(queue)
    assert second.status == "retrying"
    await assert_enqueued(queue, fail_twice, at=timedelta(seconds=60))
    clock.advance(timedelta(seconds=60))
    [third] = await drain(queue)
    assert (third.id, third.status, third.result) == (first.id, "completed", "job")


async def test_time_passes_from_one_due_task_to_the_next(queue: Queue, clock: Clock) -> None:
    start = clock.now()
    await queue.schedule(note("later"), timedelta(seconds=30))
    await queue.schedule(note("much later"), HOUR + timedelta(seconds=1))
    await queue.add(fail_twice("job"))
    ran = await drain(queue, until=HOUR)
    assert journal == ["job", "job", "later", "job"]
    assert [(task.finished_at or start) - start for task in ran if task.result] == [
        timedelta(seconds=30),
        timedelta(seconds=70),
    ]
    assert clock.now() == start + HOUR
    await assert_enqueued(queue, note("much later"), at=timedelta(seconds=1))


async def test_tasks_that_schedule_themselves_run_as_often_as_time_passes(
    queue: Queue, clock: Clock
) -> None:
    await queue.add(every_hour())
    await drain(queue, until=timedelta(hours=3, minutes=30))
    assert journal == ["hour"] * 4
    clock.advance(timedelta(hours=5))
    assert len(await drain(queue)) == 1
    await assert_enqueued(queue, every_hour, at=HOUR, count=1)


async def test_crons_run_while_time_passes(queue: Queue, clock: Clock) -> None:
    await queue.add_cron(note("night"), "0 3 * * *")
    assert await drain(queue) == []
    ran = await drain(queue, until=timedelta(days=2))
    assert [task.finished_at for task in ran] == [utc(2030, 1, 2, 3), utc(2030, 1, 3, 3)]
    await assert_not_enqueued(queue)
    assert clock.now() == utc(2030, 1, 3, 12)


async def test_without_a_clock_the_machines_time_decides(queue: Queue) -> None:
    await queue.add(fail_at_once("at once"))
    await queue.schedule(note("past"), -HOUR)
    await queue.schedule(note("later"), HOUR)
    await drain(queue, raise_errors=False)
    # Retries without a delay are due at once, and the last one counts.
    assert journal.count("at once") == 6
    assert journal.count("past") == 1
    assert [task.result for task in await drain(queue, until=HOUR * 2)] == ["later"]


async def test_task_that_enqueues_itself_is_stopped(queue: Queue) -> None:
    await queue.add(again())
    with pytest.raises(RuntimeError, match="max_tasks"):
        await drain(queue, max_tasks=5)
    assert journal == ["again"] * 5
    await assert_enqueued(queue, again, count=1)


async def test_workflows_go_on_step_by_step(queue: Queue) -> None:
    added = await queue.add_workflow(add_up("one"))
    await drain(queue)
    workflow = await queue.get_workflow(added.workflow)
    assert workflow is not None
    assert workflow.final_result == "one!"


async def test_dependencies_are_overridden_and_middleware_works(queue: Queue) -> None:
    await queue.add([price(3), note_twice("parent")])
    ran = await drain(
        queue,
        middleware=[children_with_result],
        dependency_overrides={shop.currency: lambda: "USD"},
    )
    assert ran[0].result == "3 USD"
    assert journal == ["parent", "parent.1", "parent.2"]


async def test_rate_limits_hold_nothing_back(queue: Queue) -> None:
    await queue.add([rarely(number) for number in range(3)])
    assert [task.result for task in await drain(queue)] == [0, 1, 2]


async def test_several_queues_are_drained_together(queue: Queue) -> None:
    emails = Queue(queue.backend, "emails")
    shop.queues.append(emails)
    await queue.add(note_twice("order"))
    ran = await drain([queue, emails])
    assert [task.spec.args[0] for task in ran] == ["order", "order.1", "order.2"]


async def test_hundred_tasks_are_drained_in_no_time(queue: Queue) -> None:
    await queue.add([note(str(number)) for number in range(100)])
    start = time.perf_counter()
    assert len(await drain(queue)) == 100
    took = time.perf_counter() - start
    print(f"100 tasks: {took:.2f} s")
    # A ceiling for slow machines; a fifth to a half of a second is usual.
    assert took < 20
