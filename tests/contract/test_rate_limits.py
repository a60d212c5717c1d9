"""Rate limits: who may start now, how long the others wait, and never one too many."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

import pytest

from tests.contract.tasks import QUEUE, MakeBackend

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend

STRATEGIES = ("sliding_window", "fixed_window", "something else")
CLOCK_SLACK = 0.005  # seconds between the clock of the database and ours


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_tasks_over_the_limit_are_spread_out(backend: SqlBackend, strategy: str) -> None:
    began = time.monotonic()
    waits = [
        await backend.acquire_rate_limit(QUEUE, "key", 2, 60, f"task-{number}", strategy)
        for number in range(6)
    ]
    took = time.monotonic() - began
    assert waits[:2] == [None, None]
    for wait, expected in zip(waits[2:], (60, 90, 120, 150), strict=True):
        assert wait is not None
        assert expected - took - CLOCK_SLACK <= wait <= expected


async def test_limits_of_other_queues_and_keys_are_their_own(backend: SqlBackend) -> None:
    for queue, key in itertools.product(("one", "two", "one:k"), ("k", "k:k", "")):
        assert await backend.acquire_rate_limit(queue, key, 1, 60, "first") is None
        wait = await backend.acquire_rate_limit(queue, key, 1, 60, "second")
        assert wait is not None
        assert 50 < wait <= 60


async def test_the_two_strategies_have_windows_of_their_own(backend: SqlBackend) -> None:
    assert await backend.acquire_rate_limit(QUEUE, "key", 1, 60, "a", "sliding_window") is None
    assert await backend.acquire_rate_limit(QUEUE, "key", 1, 60, "b", "fixed_window") is None


async def test_the_two_strategies_share_the_next_slot(backend: SqlBackend) -> None:
    for strategy in ("sliding_window", "fixed_window"):
        await backend.acquire_rate_limit(QUEUE, "key", 1, 1000, "a", strategy)
    first = await backend.acquire_rate_limit(QUEUE, "key", 1, 1000, "b", "sliding_window")
    second = await backend.acquire_rate_limit(QUEUE, "key", 1, 1000, "c", "fixed_window")
    assert first is not None
    assert second is not None
    # As long as the calls took, the waits are shorter.
    assert first == pytest.approx(1000, abs=100)
    assert second == pytest.approx(2000, abs=100)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_wait_is_never_shorter_than_10_ms(backend: SqlBackend, strategy: str) -> None:
    waits = [
        await backend.acquire_rate_limit(QUEUE, "key", 1, 0.02, f"task-{number}", strategy)
        for number in range(30)
    ]
    assert all(wait is None or wait >= 0.01 for wait in waits)


async def test_cleared_queue_has_its_limits_back(backend: SqlBackend) -> None:
    for strategy in STRATEGIES:
        await backend.acquire_rate_limit(QUEUE, strategy, 1, 60, "a", strategy)
        assert await backend.acquire_rate_limit(QUEUE, strategy, 1, 60, "b", strategy)
        await backend.acquire_rate_limit("other", strategy, 1, 60, "a", strategy)
    await backend.clear(QUEUE)
    for strategy in STRATEGIES:
        assert await backend.acquire_rate_limit(QUEUE, strategy, 1, 60, "b", strategy) is None
        assert await backend.acquire_rate_limit("other", strategy, 1, 60, "b", strategy)


async def test_fixed_window_begins_with_its_first_start(backend: SqlBackend) -> None:
    began = time.monotonic()
    assert await backend.acquire_rate_limit(QUEUE, "key", 1, 60, "a", "fixed_window") is None
    wait = await backend.acquire_rate_limit(QUEUE, "key", 1, 60, "b", "fixed_window")
    took = time.monotonic() - began
    assert wait is not None
    assert 60 - took - CLOCK_SLACK <= wait <= 60


@pytest.mark.parametrize("strategy", ["sliding_window", "fixed_window"])
async def test_who_waits_as_told_may_start(backend: SqlBackend, strategy: str) -> None:
    period, wait = 0.1, None
    while wait is None:
        period *= 2  # where it is over before the second call, as the machine is busy
        key = f"every {period} s"
        assert await backend.acquire_rate_limit(QUEUE, key, 1, period, "a", strategy) is None
        wait = await backend.acquire_rate_limit(QUEUE, key, 1, period, "b", strategy)
    await asyncio.sleep(wait)
    assert await backend.acquire_rate_limit(QUEUE, key, 1, period, "b", strategy) is None


async def test_concurrent_backends_never_start_too_many(make_backend: MakeBackend) -> None:
    backends = [await make_backend() for _ in range(3)]
    max_rate, period = 5, 0.5
    starts: list[tuple[float, float]] = []  # when its call began and when it returned
    numbers = itertools.count()

    async def start_again_and_again(backend: SqlBackend) -> None:
        while len(starts) <= 3 * max_rate:
            began = time.monotonic()
            task_id = f"task-{next(numbers)}"
            if await backend.acquire_rate_limit(QUEUE, "key", max_rate, period, task_id) is None:
                starts.append((began, time.monotonic()))

    await asyncio.gather(*(start_again_and_again(b) for b in backends for _ in range(3)))
    for began, _ in starts:
        returned = sorted(after for before, after in starts if before >= began)
        # One too many of those that were surely decided within one period?
        assert len(returned) <= max_rate or returned[max_rate] - began >= period


async def test_task_that_runs_again_counts_against_the_limit(backend: SqlBackend) -> None:
    """Whatever ids they have: at most two starts in a period."""
    starts = 0
    for task_id in ("a", "b", "a", "c", "b", "d"):
        if await backend.acquire_rate_limit(QUEUE, "key", 2, 60, task_id) is None:
            starts += 1
    assert starts == 2


@pytest.mark.parametrize("max_rate", [0, -1, 1.5, True, None])
async def test_impossible_rate_is_refused(backend: SqlBackend, max_rate: int) -> None:
    with pytest.raises(ValueError, match="max_rate"):
        await backend.acquire_rate_limit(QUEUE, "key", max_rate, 1.0, "task")


@pytest.mark.parametrize("period", [0, -1, float("nan"), float("inf"), 1e300, None, True])
async def test_impossible_period_is_refused(backend: SqlBackend, period: float) -> None:
    with pytest.raises(ValueError, match="rate_period"):
        await backend.acquire_rate_limit(QUEUE, "key", 1, period, "task")
