"""Waiting that survives the loss of any signal.

A wake-up only saves time: whoever waits also looks for itself, more and more rarely.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from ._wakeups import Topic, Waiter

T = TypeVar("T")

FIRST_POLL = 0.005  # seconds
LOOK_SHARE = 10  # a look by itself takes at most a tenth of the time
JITTER = 0.25  # share of an interval, so that idle workers do not fall into step


class Notice(NamedTuple):
    """A notification as it is sent."""

    channel: str
    text: str


class Pace:
    """How often whoever waits looks by himself: ever more rarely, where nothing else tells him."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    @property
    def is_told(self) -> bool:
        """Whether other processes' signals are known to come."""
        return False

    @property
    def longest(self) -> float:
        """Seconds between two looks, at most."""
        return self._longest

    def begin(self) -> None:
        """Somebody is about to wait."""

    async def check(self) -> None:
        """BackendError where signals are to come, and are known not to."""

    def carry(self, topics: Iterable[Topic]) -> Notice | None:
        """What a statement is to send with its commit, if anything."""
        return None

    def pauses(self) -> Iterator[float]:
        """Seconds to the next look, and to the next one after that, without end."""
        pause = FIRST_POLL
        while True:
            told = self.is_told
            yield self.longest if told else min(pause, self.longest)
            # Where signals were lost, looks begin anew to come soon after one another.
            pause = FIRST_POLL if told else min(2 * pause, self.longest)


async def poll(
    look: Callable[[set[Topic]], Awaitable[T | None]],
    waiter: Waiter,
    *,
    timeout: float,
    pace: Pace,
    look_first: bool = True,
) -> T | None:
    """What `look` finds within `timeout` seconds (inf: however long it takes), else None.

    Looks at once, unless told otherwise, after every signal, by itself as `pace` says, and once
    more when time is up, for which it leaves out one that would come just before. `look` is told
    the signals that brought it.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    pauses = pace.pauses()
    while True:
        # Before the look: a signal that comes during it must not be lost.
        signals = waiter.take_signals()
        started = clock()
        if look_first:
            found = await look(signals)
            if found is not None:
                return found
        look_first = True
        now = clock()
        if started >= deadline:
            return None
        pace.begin()
        pause, left = spread(next(pauses), now - started), deadline - now
        if pause < left < pause * (1 + JITTER):
            # Not twice within a moment: by itself, and as time is up.
            pause = left
        await waiter.wait(max(0.0, min(pause, left)))


def spread(pause: float, took: float) -> float:
    """Seconds to pause after a look that took so long, at random about `pause`."""
    # A look that takes long, at thousands of results, is not to be all that happens.
    return max(pause, LOOK_SHARE * took) * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311


async def sleep_until(event: asyncio.Event, timeout: float) -> None:
    """Sleep until the event or for `timeout` seconds."""
    # Not wait_for: before Python 3.12 it may swallow a cancellation.
    sleeper = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([sleeper], timeout=timeout)
    finally:
        sleeper.cancel()


def wait_seconds(timeout: float | None, *, zero_means_forever: bool) -> float:
    """The host's three meanings of a timeout, as seconds to wait.

    None or negative: look once. Positive: that long. Zero: look once where
    tasks are taken, wait for ever where results are awaited.
    """
    if timeout is None or timeout < 0:
        return 0.0
    if timeout == 0 and zero_means_forever:
        return math.inf
    return timeout
