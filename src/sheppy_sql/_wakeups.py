"""Signals inside a process. Those of other processes arrive here as well, through lines."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import math
import os
import secrets
import threading
import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
Topic = tuple[str, ...]

EVERYTHING: Topic = ()
"""The signal of something that nobody knows more of."""

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


def group(topic: Topic) -> Topic:
    """What is awaited of a queue, without saying which task or workflow."""
    return topic[:2]


@functools.lru_cache(maxsize=4096)
def mark(topic: Topic) -> str:
    """A topic as a notification names it: short, whatever its queue is called."""
    # No name has a NUL in it.
    digest = hashlib.blake2b("\0".join(topic).encode(), digest_size=8).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


class Signals(Protocol):
    """Where news goes."""

    def wake(self, topics: Iterable[Topic], *, told: bool = False) -> None:
        """`told`: other processes know already, by what was committed."""


class Line(Protocol):
    """A way to the other processes."""

    @property
    def place(self) -> Hashable:
        """The database; two lines of an installation may lead to copies of it."""

    @property
    def is_here(self) -> bool:
        """Whether it is the running event loop's."""

    def announce(self, topics: Iterable[Topic]) -> None:
        """Pass news on; callable from any thread, and nothing comes back."""


class Wakeups:
    """Who waits for what. Waiters may live in different threads' event loops."""

    def __init__(self) -> None:
        self.id = secrets.token_urlsafe(6)
        """By which a process knows its own notifications."""
        self.serial = 0
        """Changes with every signal, whether or not anybody waits for it."""
        self._lock = threading.Lock()
        # Dictionaries for their order: whoever has waited longest comes first.
        self._waiters: defaultdict[Topic, dict[Waiter, None]] = defaultdict(dict)
        self._marked: defaultdict[str, dict[Topic, None]] = defaultdict(dict)
        self.lines: tuple[Line, ...] = ()

    @contextmanager
    def waiting(self, topics: Iterable[Topic]) -> Iterator[Waiter]:
        """A waiter that any of `topics` wakes."""
        waiter = Waiter()
        self.watch(waiter, topics)
        try:
            yield waiter
        finally:
            self.unwatch(waiter, list(waiter.topics))

    def watch(self, waiter: Waiter, topics: Iterable[Topic]) -> None:
        """Have `topics` wake a waiter as well."""
        marked = [(topic, {mark(group(topic)), mark(topic)}) for topic in topics]
        with self._lock:
            for topic, marks in marked:
                waiter.topics.add(topic)
                self._waiters[topic][waiter] = None
                for one in marks:
                    self._marked[one][topic] = None

    def unwatch(self, waiter: Waiter, topics: Iterable[Topic]) -> None:
        """Have `topics` wake it no more."""
        with self._lock:
            for topic in topics:
                waiter.topics.discard(topic)
                self._waiters[topic].pop(waiter, None)
                if not self._waiters[topic]:
                    del self._waiters[topic]
                    for one in {mark(group(topic)), mark(topic)}:
                        self._marked[one].pop(topic, None)
                        if not self._marked[one]:
                            del self._marked[one]

    def count(self, topic: Topic) -> int:
        """How many wait for it here."""
        return len(self._waiters.get(topic, ()))

    @property
    def anybody(self) -> bool:
        """Whether anybody waits for anything here."""
        return bool(self._waiters)

    def wake(self, topics: Iterable[Topic], *, told: bool = False) -> None:
        """Wake whoever waits for any of `topics`, in other processes as well.

        `told`: those are notified already, by what was committed.
        """
        topics = list(topics)
        self.wake_here(topics)
        if told:
            return
        # One for each database, of this event loop if it has one.
        chosen: dict[Hashable, Line] = {}
        for line in self.lines:
            if line.is_here or line.place not in chosen:
                chosen[line.place] = line
        for line in chosen.values():
            line.announce(topics)

    def wake_here(self, topics: Iterable[Topic]) -> None:
        """Wake whoever waits for any of `topics` in this process."""
        with self._lock:
            self.serial += 1
            woken = [(w, topic) for topic in topics for w in self._waiters.get(topic, ())]
        for waiter, topic in woken:
            waiter.wake(topic)

    def wake_marked(self, marks: Iterable[str]) -> None:
        """Wake whoever waits here for what another process has named so."""
        with self._lock:
            topics = [topic for one in marks for topic in self._marked.get(one, ())]
        self.wake_here(dict.fromkeys(topics))

    def wake_all(self) -> None:
        """Wake whoever waits for anything in this process."""
        with self._lock:
            self.serial += 1
            woken = {waiter for waiters in self._waiters.values() for waiter in waiters}
        for waiter in woken:
            waiter.wake(EVERYTHING)

    def open(self, line: Line) -> None:
        """Announce news on this line from now on."""
        with self._lock:
            self.lines = (*self.lines, line)

    def shut(self, line: Line) -> None:
        """Do so no more; harmless where it is not open."""
        with self._lock:
            self.lines = tuple(other for other in self.lines if other is not line)


class Waiter:
    """One coroutine's place to sleep until a signal comes."""

    def __init__(self) -> None:
        self.topics: set[Topic] = set()
        self._loop = asyncio.get_running_loop()
        self._signals: set[Topic] = set()
        self._is_called = False
        self._sleep: asyncio.Future[None] | None = None

    def wake(self, topic: Topic) -> None:
        """Callable from any thread."""
        if is_running(self._loop):
            self._signal(topic)
            return
        # RuntimeError: the loop is closed, and nobody waits any longer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._signal, topic)

    def poke(self) -> None:
        """End the sleep, without a signal."""
        self._is_called = True
        if self._sleep is not None:
            _end(self._sleep)

    def take_signals(self) -> set[Topic]:
        """What came since the last call; empty where time brought the waiter here."""
        self._is_called = False
        signals, self._signals = self._signals, set()
        return signals

    async def wait(self, timeout: float) -> None:
        """Sleep until a signal or for `timeout` seconds."""
        if self._is_called:
            return
        # No task and no Event: every step between a signal and a look is time that a task waits.
        self._sleep = self._loop.create_future()
        timer = self._loop.call_later(timeout, _end, self._sleep) if timeout < math.inf else None
        try:
            await self._sleep
        finally:
            self._sleep = None
            if timer is not None:
                timer.cancel()

    def _signal(self, topic: Topic) -> None:
        self._signals.add(topic)
        self.poke()


def _end(sleep: asyncio.Future[None]) -> None:
    if not sleep.done():
        sleep.set_result(None)


def is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether an event loop is the one that runs here, in this thread."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _begin_anew() -> None:
    """Forget the parent's waiters: a child's copies would signal through the parent's sockets."""
    global _hubs_lock
    # A thread that the child does not have may have held it.
    _hubs_lock = threading.Lock()
    _hubs.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
