"""Waiting for what is to end: all who wait in one queue are answered by the same looks."""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sheppy import BackendError

from . import _waiting, _wakeups
from ._reader import Texts, in_parts

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ._waiting import Pace
    from ._wakeups import Topic, Waiter, Wakeups


class Want:
    """What one caller waits for, and what was found of it."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.missing = set(ids)
        self.found: Texts = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            # Its caller may be gone.
            self.done.exception()


class Lookout:
    """Looks for what is awaited in one queue, as long as anybody waits."""

    def __init__(
        self,
        find: Callable[[Sequence[str]], Awaitable[Texts]],
        topic_of: Callable[[str], Topic],
        wakeups: Wakeups,
        pace: Pace,
    ) -> None:
        """`find` finds those of the ids that have ended; `topic_of` one tells of its end."""
        self._find = find
        self._topic_of = topic_of
        self._wakeups = wakeups
        self._pace = pace
        self._wants: defaultdict[str, set[Want]] = defaultdict(set)
        self._new: set[str] = set()
        self._pauses: Iterator[float] = pace.pauses()
        self._waiter: Waiter | None = None
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, ids: Sequence[str], timeout: float) -> Texts:
        """Those that have ended when all have, or after so many seconds."""
        want = Want(ids)
        self._add(want)
        try:
            await asyncio.wait([want.done], timeout=None if timeout == float("inf") else timeout)
        finally:
            self._drop(want)
        if want.done.done():
            want.done.result()
        else:
            # Once more, as all waiting ends with a look.
            want.found |= await self._find(sorted(want.missing))
        return want.found

    def close(self, error: BackendError) -> None:
        """Have all who wait get an error."""
        for want in {want for wants in self._wants.values() for want in wants}:
            want.fail(copy.copy(error))
        if self._looking is not None:
            self._looking.cancel()

    def _add(self, want: Want) -> None:
        for one in want.missing:
            self._wants[one].add(want)
        self._new |= want.missing
        # A newcomer's is likely to end soon.
        self._pauses = self._pace.pauses()
        if self._waiter is not None:
            self._waiter.poke()
        if self._looking is None:
            loop = asyncio.get_running_loop()
            # In a context of its own: it outlives whoever happens to start it.
            self._looking = contextvars.Context().run(loop.create_task, self._look())

    def _drop(self, want: Want) -> None:
        gone = []
        for one in want.missing | want.found.keys():
            if wants := self._wants.get(one):
                wants.discard(want)
                if not wants:
                    del self._wants[one]
                    gone.append(one)
        if self._waiter is not None:
            self._wakeups.unwatch(self._waiter, [self._topic_of(one) for one in gone])
            if not self._wants:
                self._waiter.poke()

    async def _look(self) -> None:
        try:
            with self._wakeups.waiting(()) as self._waiter:
                await self._look_while_wanted(self._waiter)
        finally:
            self._waiter = self._looking = None

    async def _look_while_wanted(self, waiter: Waiter) -> None:
        clock = asyncio.get_running_loop().time
        rests_until = 0.0  # no look for all before
        next_full = clock()
        while self._wants:
            new, self._new = self._new & self._wants.keys(), set()
            # Before the look: a signal that comes during it must not be lost.
            self._wakeups.watch(waiter, [self._topic_of(one) for one in new])
            signals = waiter.take_signals()
            if _wakeups.EVERYTHING in signals:
                next_full = min(next_full, rests_until)
            started = clock()
            is_full = started >= next_full
            wanted = set(self._wants) if is_full else new | self._ended(signals)
            await self._look_for(sorted(wanted))
            now = clock()
            if is_full:
                next_full = now + _waiting.spread(next(self._pauses), now - started)
                rests_until = now + _waiting.LOOK_SHARE * (now - started)
            elif new:
                next_full = min(next_full, now + _waiting.spread(next(self._pauses), now - started))
            if self._wants:
                self._pace.begin()
                await waiter.wait(max(0.0, next_full - clock()))

    def _ended(self, signals: set[Topic]) -> set[str]:
        return {topic[-1] for topic in signals if topic and topic[-1] in self._wants}

    async def _look_for(self, ids: Sequence[str]) -> None:
        try:
            for part in in_parts(ids):
                for one, text in (await self._find(part)).items():
                    self._tell(one, text)
        except Exception as error:  # noqa: BLE001  # it is the callers'
            for want in {want for one in ids for want in self._wants.get(one, ())}:
                want.fail(copy.copy(error))
                self._drop(want)

    def _tell(self, task_id: str, text: str) -> None:
        for want in self._wants.pop(task_id, set()):
            want.found[task_id] = text
            want.missing.discard(task_id)
            if not want.missing and not want.done.done():
                want.done.set_result(None)
        if self._waiter is not None:
            self._wakeups.unwatch(self._waiter, [self._topic_of(task_id)])
