"""Calls that come while others are under way go together in the next statement.

No timer: a lone call goes at once, and nobody waits for company.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ._database import CANCELLED_PATIENCE
from ._errors import LockedError, RejectedError

I = TypeVar("I")  # noqa: E741  # an item
R = TypeVar("R")

MOST_ITEMS = 500
MOST_BYTES = 4 * 1024 * 1024
"""Of one batch, unless it is told otherwise."""
SINGLES = 2
"""Connections on which items go singly that were held up, while the next batch goes on."""

Start = Callable[[Sequence[I], bool], "asyncio.Task[Sequence[R]]"]


@dataclass(frozen=True, slots=True)
class Call(Generic[I, R]):
    """One caller's item, and how he hears of it."""

    key: str
    item: I
    size: int
    answer: asyncio.Future[R]
    context: contextvars.Context


class Batcher(Generic[I, R]):
    """One batch at a time, in the order of the calls."""

    def __init__(
        self,
        start: Start[I, R],
        *,
        most_items: int = MOST_ITEMS,
        most_size: int = MOST_BYTES,
        patience: float = CANCELLED_PATIENCE,
    ) -> None:
        """`start(items, patient)` begins with a batch, and tells of each item how it ended.

        It must not wait for a lock for long, or if `patient` a little longer: LockedError,
        nothing being written. A batch has at most so many items and such a size, in all, as
        their callers gave. A cancelled caller waits `patience` seconds for his item's end.
        """
        self._start = start
        self._most_items = most_items
        self._most_size = most_size
        self._patience = patience
        self._waiting: deque[Call[I, R]] = deque()
        self._held_up: deque[Call[I, R]] = deque()
        self._batch: asyncio.Task[Sequence[R]] | None = None
        self._singles: set[asyncio.Task[Sequence[R]]] = set()

    async def submit(self, key: str, item: I, size: int) -> R:
        """How the item ended, once it is committed; `size` as the batch is to be limited by.

        No two of the same key are in one batch.
        It may end so although the caller was cancelled.
        """
        call: Call[I, R] = Call(
            key, item, size, asyncio.get_running_loop().create_future(), contextvars.copy_context()
        )
        self._waiting.append(call)
        self._go_on()
        try:
            return await asyncio.shield(call.answer)
        except asyncio.CancelledError:
            await asyncio.wait([call.answer], timeout=self._patience)
            raise

    def _go_on(self) -> None:
        while self._batch is None and self._waiting:
            batch = self._next_batch()
            self._batch = self._begin(batch, self._batch_ended, patient=False)
        while self._held_up and len(self._singles) < SINGLES:
            call = self._held_up.popleft()
            single = self._begin([call], self._single_ended, patient=True)
            if single is not None:
                self._singles.add(single)

    def _next_batch(self) -> list[Call[I, R]]:
        batch = [self._waiting.popleft()]
        size, keys = batch[0].size, {batch[0].key}
        while self._waiting and len(batch) < self._most_items:
            size += self._waiting[0].size
            if size > self._most_size or self._waiting[0].key in keys:
                break
            keys.add(self._waiting[0].key)
            batch.append(self._waiting.popleft())
        return batch

    def _begin(
        self, batch: list[Call[I, R]], ended: Callable[..., None], *, patient: bool
    ) -> asyncio.Task[Sequence[R]] | None:
        try:
            work = batch[0].context.run(self._start, [call.item for call in batch], patient)
        except Exception as error:  # noqa: BLE001  # it is the callers'
            for call in batch:
                _fail(call, copy.copy(error))
            return None
        work.add_done_callback(lambda work: ended(batch, work))
        return work

    def _batch_ended(self, batch: list[Call[I, R]], work: asyncio.Task[Sequence[R]]) -> None:
        self._batch = None
        error = None if work.cancelled() else work.exception()
        if isinstance(error, LockedError) or (isinstance(error, RejectedError) and len(batch) > 1):
            # Because of one of them; each is to end as it would have by itself.
            self._held_up += batch
        else:
            _tell(batch, work)
        self._go_on()

    def _single_ended(self, batch: list[Call[I, R]], work: asyncio.Task[Sequence[R]]) -> None:
        self._singles.discard(work)
        if not work.cancelled() and isinstance(work.exception(), LockedError):
            # Behind the others, of which none may wait for this one's lock.
            self._held_up += batch
        else:
            _tell(batch, work)
        self._go_on()


class Batchers(dict[str, Batcher[I, R]]):
    """One for each queue, made when it is needed."""

    def __init__(
        self,
        start: Callable[[str, Sequence[I], bool], asyncio.Task[Sequence[R]]],
        **limits: Any,
    ) -> None:
        """`start` is told the queue as well; `limits` are those of a Batcher."""
        super().__init__()
        self._start = start
        self._limits = limits

    def __missing__(self, queue: str) -> Batcher[I, R]:
        self[queue] = batcher = Batcher[I, R](partial(self._start, queue), **self._limits)
        return batcher


def _tell(batch: list[Call[Any, R]], work: asyncio.Task[Sequence[R]]) -> None:
    if work.cancelled():
        for call in batch:
            call.answer.cancel()
    elif (error := work.exception()) is not None:
        for call in batch:
            # Each raises it with a traceback of its own.
            _fail(call, copy.copy(error))
    else:
        for call, outcome in zip(batch, work.result(), strict=True):
            if not call.answer.done():
                call.answer.set_result(outcome)


def _fail(call: Call[Any, Any], error: BaseException) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)
        # Its caller may be gone.
        call.answer.exception()
