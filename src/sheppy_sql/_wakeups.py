"""Signals inside a process, and waiting that survives the loss of any of them.

A wake-up only saves time: whoever waits also looks for itself, more and more
rarely. Signals between processes (LISTEN) will arrive here as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import threading
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
Topic = tuple[str, ...]

FIRST_POLL = 0.005  # seconds
LOOK_SHARE = 10  # a look by itself takes at most a tenth of the time
JITTER = 0.25  # share of an interval, so that idle workers do not fall into step

_hubs: weakref.WeakValueDictionary[str, Wakeups] = weakref.WeakValueDictionary()
_hubs_lock = threading.Lock()


def hub(installation: str) -> Wakeups:
    """The signals of one installation, shared by every backend on it in this process."""
    with _hubs_lock:
        return _hubs.setdefault(installation, Wakeups())


def pending(queue: str) -> Topic:
    """A task can be taken from `queue`."""
    return ("pending", queue)


def finished(queue: str, task_id: str) -> Topic:
    """That task has ended."""
    return ("finished", queue, task_id)


def ended(queue: str, workflow_id: str) -> Topic:
    """That workflow has completed or failed."""
    return ("ended", queue, workflow_id)


class Signals(Protocol):
    """Where news goes."""

    def wake(self, topics: Iterable[Topic]) -> None: ...


class Wakeups:
    """Who waits for what. Waiters may live in different threads' event loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: defaultdict[Topic, set[Waiter]] = defaultdict(set)

    @contextmanager
    def waiting(self, topics: Iterable[Topic]) -> Iterator[Waiter]:
        """A waiter that any of `topics` wakes."""
        waiter, topics = Waiter(), list(topics)
        with self._lock:
            for topic in topics:
                self._waiters[topic].add(waiter)
        try:
            yield waiter
        finally:
            with self._lock:
                for topic in topics:
                    self._waiters[topic].discard(waiter)
                    if not self._waiters[topic]:
                        del self._waiters[topic]

    def wake(self, topics: Iterable[Topic]) -> None:
        """Wake whoever waits for any of `topics`."""
        with self._lock:
            woken = [(w, topic) for topic in topics for w in self._waiters.get(topic, ())]
        for waiter, topic in woken:
            waiter.wake(topic)


class Waiter:
    """One coroutine's place to sleep until a signal comes."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._signals: set[Topic] = set()

    def wake(self, topic: Topic) -> None:
        """Callable from any thread."""
        # RuntimeError: the loop is closed, and nobody waits any longer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._signal, topic)

    def take_signals(self) -> set[Topic]:
        """What came since the last call; empty where time brought the waiter here."""
        self._event.clear()
        signals, self._signals = self._signals, set()
        return signals

    async def wait(self, timeout: float) -> None:
        """Sleep until a signal or for `timeout` seconds."""
        await sleep_until(self._event, timeout)

    def _signal(self, topic: Topic) -> None:
        self._signals.add(topic)
        self._event.set()


async def poll(
    look: Callable[[set[Topic]], Awaitable[T | None]],
    waiter: Waiter,
    *,
    timeout: float,
    max_interval: float,
) -> T | None:
    """What `look` finds within `timeout` seconds (inf: however long it takes), else None.

    Looks at once, after every signal, by itself after 5 ms and then ever more
    rarely up to every `max_interval` seconds, and once more when time is up.
    `look` is told the signals that brought it; none means to look for all.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    interval, next_full = FIRST_POLL, clock()
    while True:
        # Before the look: a signal that comes during it must not be lost.
        signals = waiter.take_signals()
        started = clock()
        if started >= next_full or started >= deadline:
            signals = set()
        found = await look(signals)
        if found is not None:
            return found
        now = clock()
        if started >= deadline:
            return None
        if not signals:
            # A look that takes long, at thousands of results, is not to be all that happens.
            pause = max(min(interval, max_interval), LOOK_SHARE * (now - started))
            next_full = now + pause * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
            interval = min(interval * 2, max_interval)
        await waiter.wait(max(0.0, min(next_full, deadline) - now))


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


def _begin_anew() -> None:
    """Forget the parent's waiters: a child's copies would signal through the parent's sockets."""
    global _hubs_lock
    # A thread that the child does not have may have held it.
    _hubs_lock = threading.Lock()
    _hubs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
