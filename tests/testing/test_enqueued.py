"""Assertions about what is enqueued."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sheppy import Queue

from sheppy_sql.testing import Clock, assert_enqueued, assert_not_enqueued, drain, enqueued
from tests.testing.shop import fail_twice, note, price, utc

DAY = timedelta(days=1)


async def test_task_is_found_however_it_was_called(queue: Queue) -> None:
    await queue.add([note("a"), price(amount=3)])
    for same in (note("a"), note(what="a"), note("a", False), note("a", urgent=False), note):
        [found] = await assert_enqueued(queue, same)
        assert found.spec.args == ("a",)
    await assert_enqueued(queue, price(3))
    await assert_not_enqueued(queue, note("a", urgent=True))
    await assert_not_enqueued(queue, note("b"))


async def test_missing_task_is_told_with_all_that_waits(queue: Queue, clock: Clock) -> None:
    await queue.add([note("a"), note("b", urgent=True)])
    await queue.schedule(price(3), DAY)
    with pytest.raises(AssertionError) as failure:
        await assert_enqueued(queue, note("c"))
    assert str(failure.value) == (
        "no tests.testing.shop:note('c') enqueued in 'shop'; there wait\n"
        "  pending   tests.testing.shop:note('a')\n"
        "  pending   tests.testing.shop:note('b', urgent=True)\n"
        "  scheduled tests.testing.shop:price(3), due at 2030-01-02 12:00:00.000+00:00 "
        "(in 1 day, 0:00:00)"
    )
    await queue.clear()
    with pytest.raises(AssertionError, match="nothing waits there"):
        await assert_enqueued(queue, note)


async def test_number_of_tasks_is_checked(queue: Queue) -> None:
    await queue.add([note("a"), note("a"), note("b")])
    assert len(await assert_enqueued(queue, note("a"), count=2)) == 2
    assert len(await assert_enqueued(queue, note, count=3)) == 3
    await assert_enqueued(queue, price, count=0)
    with pytest.raises(AssertionError, match=r"2 instead of 1 of .*note\('a'\)"):
        await assert_enqueued(queue, note("a"), count=1)


async def test_unwanted_task_is_told(queue: Queue) -> None:
    await assert_not_enqueued(queue)
    await queue.add(note("a"))
    await assert_not_enqueued(queue, price)
    for wanted in (None, note, note("a")):
        with pytest.raises(AssertionError, match=r"unwanted(.|\n)*note\('a'\)"):
            await assert_not_enqueued(queue, wanted)


async def test_time_of_a_scheduled_task_is_checked(queue: Queue, clock: Clock) -> None:
    await queue.schedule(note("a"), DAY)
    await queue.add(note("b"))
    await assert_enqueued(queue, note("a"), at=DAY, count=1)
    await assert_enqueued(queue, note, at=utc(2030, 1, 2, 12), count=1)
    await assert_not_enqueued(queue, note("a"), at=DAY + timedelta(seconds=0.5))
    await assert_enqueued(queue, note("a"), at=DAY * 2, within=DAY)
    await assert_not_enqueued(queue, note("b"), at=timedelta(0))
    with pytest.raises(AssertionError, match=r"note\('a'\) enqueued in 'shop' in 2:00:00"):
        await assert_enqueued(queue, note("a"), at=timedelta(hours=2))
    with pytest.raises(ValueError, match="aware"):
        await assert_enqueued(queue, note, at=utc(2030, 1, 2).replace(tzinfo=None))


async def test_without_a_clock_a_second_is_near_enough(queue: Queue) -> None:
    await queue.schedule(note("a"), DAY)
    await assert_enqueued(queue, note("a"), at=DAY + timedelta(seconds=0.1), within=DAY)
    await assert_not_enqueued(queue, note("a"), at=DAY + timedelta(hours=1))


async def test_tasks_that_are_to_be_retried_wait_too(queue: Queue, clock: Clock) -> None:
    await queue.add(fail_twice("job"))
    await drain(queue)
    [waiting] = await enqueued(queue)
    assert waiting.status == "retrying"
    await assert_enqueued(queue, fail_twice, at=timedelta(seconds=10))


async def test_clock_only_moves_forward(clock: Clock) -> None:
    assert clock.advance(DAY) == utc(2030, 1, 2, 12)
    with pytest.raises(ValueError, match="forward"):
        clock.advance(-DAY)
    naive = utc(2031, 1, 1).replace(tzinfo=None)
    for mistake in (clock.advance_to, Clock):
        with pytest.raises(ValueError, match="aware"):
            mistake(naive)


async def test_clocks_may_be_nested_and_leave_the_machines_time_behind(clock: Clock) -> None:
    with Clock(utc(2040, 1, 1)) as inner:
        assert note("a").created_at == inner.now() == utc(2040, 1, 1)
    assert note("b").created_at == clock.now()
    assert Clock.in_use() is clock
