"""Calls that come while others are under way go together in the next statement.

No timer: a lone call goes at once, and nobody waits for company.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ._database import CANCELLED_PATIENCE
from ._errors import LockedError, RejectedError

I = TypeVar("I")  # noqa: E741  # an item
R = TypeVar("R")

MOST_KEYS = 1000
MOST_BYTES = 4 * 1024 * 1024
"""Of one batch, unless it is told otherwise."""
LOCK_TIMEOUT = 0.05
"""Seconds for which items that go together wait for a row that somebody else has locked."""
LONE_LOCK_TIMEOUT = 0.2
"""Seconds for which an item that goes singly does, before it is the next one's turn."""
SINGLES = 2
"""Connections on which items go singly that were held up, while the next batch goes on."""

Outcome = Sequence[R] | BaseException
Ended = Callable[[Outcome[R]], None]
Start = Callable[[Sequence[I], bool, Ended[R]], "asyncio.Task[Any]"]


@dataclass(slots=True)
class Call(Generic[I, R]):
    """One caller's item, and how he hears of it."""

    keys: Collection[str]
    item: I
    size: int
    answer: asyncio.Future[R]
    context: contextvars.Context
    is_told: bool = False


class Batcher(Generic[I, R]):
    """One batch at a time, in the order of the calls."""

    def __init__(
        self,
        start: Start[I, R],
        *,
        most_keys: int = MOST_KEYS,
        most_size: int = MOST_BYTES,
        patience: float = CANCELLED_PATIENCE,
    ) -> None:
        """`start(items, patient, ended)` begins with a batch; its outcome is how each item ended.

        It must not wait for a lock for long, or if `patient` a little longer: LockedError,
        nothing being written. A batch has at most so many keys and such a size, in all, as
        their callers gave. A cancelled caller waits `patience` seconds for his item's end. It may
        tell `ended` of the outcome a moment before it is done.
        """
        self._start = start
        self._most_keys = most_keys
        self._most_size = most_size
        self._patience = patience
        self._waiting: deque[Call[I, R]] = deque()
        self._held_up: deque[Call[I, R]] = deque()
        self._in_flight = 0  # calls
        self._until_ended: list[asyncio.Future[None]] = []
        self._singles = 0
        self._has_company = False
        """Whether the last batch had more than one call: then others are likely to come."""
        self._is_about_to_go_on = False

    async def submit(self, keys: Collection[str], item: I, size: int) -> R:
        """How the item ended, once it is committed; `size` as the batch is to be limited by.

        No two with a key in common are in one batch.
        It may end so although the caller was cancelled.
        """
        loop = asyncio.get_running_loop()
        call: Call[I, R] = Call(keys, item, size, loop.create_future(), contextvars.copy_context())
        self._waiting.append(call)
        self._go_on_soon(loop)
        try:
            return await call.answer
        except asyncio.CancelledError:
            if not call.is_told:
                # The first one was cancelled with its caller.
                call.answer = loop.create_future()
                await asyncio.wait([call.answer], timeout=self._patience)
            raise

    @property
    def size(self) -> int:
        """How many calls are under way, or about to be, but those that go singly."""
        return self._in_flight + len(self._waiting)

    async def until_ended(self, timeout: float) -> None:
        """Wait for the end of a batch, or for so many seconds."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        self._until_ended.append(ended)
        timer = loop.call_later(timeout, _end, ended)
        try:
            await ended
        finally:
            timer.cancel()

    def _go_on_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """At once for a lone caller; else when all have come that are about to in this turn."""
        if not self._has_company:
            self._go_on()
        elif not self._is_about_to_go_on:
            self._is_about_to_go_on = True
            loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._is_about_to_go_on = False
        while not self._in_flight and self._waiting:
            batch = self._next_batch()
            self._has_company = len(batch) > 1
            if self._begin(batch, self._batch_ended, patient=False):
                self._in_flight = len(batch)
        while self._held_up and self._singles < SINGLES:
            single = [self._held_up.popleft()]
            self._singles += self._begin(single, self._single_ended, patient=True)

    def _next_batch(self) -> list[Call[I, R]]:
        batch = [self._waiting.popleft()]
        size, keys = batch[0].size, set(batch[0].keys)
        while self._waiting:
            call = self._waiting[0]
            size += call.size
            too_much = size > self._most_size or len(keys) + len(call.keys) > self._most_keys
            if too_much or not keys.isdisjoint(call.keys):
                break
            keys.update(call.keys)
            batch.append(self._waiting.popleft())
        return batch

    def _begin(self, batch: list[Call[I, R]], ended: Callable[..., None], *, patient: bool) -> bool:
        told = False

        def tell(outcome: Outcome[R]) -> None:
            nonlocal told
            if not told:
                told = True
                ended(batch, outcome)

        items = [call.item for call in batch]
        try:
            work = batch[0].context.run(self._start, items, patient, tell)
        except Exception as error:  # noqa: BLE001  # it is the callers'
            _tell(batch, error)
            return False
        # If the work has not told it itself, for which one turn of the event loop less is needed.
        work.add_done_callback(lambda work: tell(_outcome(work)))
        return True

    def _batch_ended(self, batch: list[Call[I, R]], outcome: Outcome[R]) -> None:
        self._in_flight = 0
        is_rejected = isinstance(outcome, RejectedError) and len(batch) > 1
        if is_rejected or isinstance(outcome, LockedError):
            # Because of one of them; each is to end as it would have by itself.
            self._held_up += batch
        else:
            _tell(batch, outcome)
        until_ended, self._until_ended = self._until_ended, []
        for future in until_ended:
            _end(future)
        # Those who are told may have more to say, in the very turn that wakes them.
        self._go_on_soon(asyncio.get_running_loop())

    def _single_ended(self, batch: list[Call[I, R]], outcome: Outcome[R]) -> None:
        self._singles -= 1
        if isinstance(outcome, LockedError):
            # Behind the others, of which none may wait for this one's lock.
            self._held_up += batch
        else:
            _tell(batch, outcome)
        self._go_on()


class Batchers(dict[str, Batcher[I, R]]):
    """One for each queue, made when it is needed."""

    def __init__(
        self,
        start: Callable[[str, Sequence[I], bool, Ended[R]], asyncio.Task[Any]],
        **limits: Any,
    ) -> None:
        """`start` is told the queue as well; `limits` are those of a Batcher."""
        super().__init__()
        self._start = start
        self._limits = limits

    def __missing__(self, queue: str) -> Batcher[I, R]:
        self[queue] = batcher = Batcher[I, R](partial(self._start, queue), **self._limits)
        return batcher


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _outcome(work: asyncio.Task[Sequence[R]]) -> Outcome[R]:
    if work.cancelled():
        return asyncio.CancelledError()
    return work.exception() or work.result()


def _tell(batch: list[Call[Any, R]], outcome: Outcome[R]) -> None:
    if isinstance(outcome, asyncio.CancelledError):
        for call in batch:
            call.is_told = True
            call.answer.cancel()
    elif isinstance(outcome, BaseException):
        for call in batch:
            # Each raises it with a traceback of its own.
            _fail(call, copy.copy(outcome))
    else:
        for call, one in zip(batch, outcome, strict=True):
            call.is_told = True
            if not call.answer.done():
                call.answer.set_result(one)


def _fail(call: Call[Any, Any], error: BaseException) -> None:
    call.is_told = True
    if not call.answer.done():
        call.answer.set_exception(error)
        # Its caller may be gone.
        call.answer.exception()
