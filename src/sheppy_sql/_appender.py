"""Putting new tasks in line: those of many calls at once, where many come at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from . import _wakeups
from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, MOST_BYTES, MOST_KEYS, Batchers
from ._payloads import LateRow, TaskRow
from ._stores import appends as append_store
from ._stores import queues as queue_store
from ._stores import tasks as task_store
from ._transaction import new_token
from .schema import PENDING

if TYPE_CHECKING:
    from ._database import Database
    from ._transaction import Operations, Transaction
    from ._waiting import Notice
    from ._wakeups import Topic

R = TypeVar("R", TaskRow, LateRow)

ACTION = "append tasks"

PIECE = 250
"""Tasks that go to the server together, of many."""


class Added(NamedTuple):
    """What became of an append."""

    ids: Collection[str]
    """Of those that were new to the queue."""
    told: bool
    """Whether the other processes were told with it."""


Append = Callable[[str, Sequence[R], bool], Awaitable[Added]]
"""Append to a queue the rows, no id twice, that are new to it; True: make the queue known."""


class Offer(NamedTuple):
    """What one call wants in line."""

    rows: Sequence[TaskRow]
    registers: bool


class Appender:
    """Appends of one backend instance, which go together where one is under way."""

    def __init__(self, database: Database, carry: Callable[[list[Topic]], Notice | None]) -> None:
        """`carry` gives the notice that a statement is to send with its commit, if any."""
        self._database = database
        self._carry = carry
        self._batchers: Batchers[Offer, Added] = Batchers(self._append_all)

    async def append(self, queue: str, rows: Sequence[TaskRow], registers: bool) -> Added:
        """As Append says, once it is committed."""
        size = sum(len(row.payload) for row in rows)
        if len(rows) > MOST_KEYS or size > MOST_BYTES:
            # Of its own accord, as nobody should have to wait for as many.
            return await append_by_itself(self._database, queue, rows, registers)
        self._database.check_turn(ACTION)
        ids = [row.id for row in rows]
        return await self._batchers[queue].submit(ids, Offer(rows, registers), size)

    async def append_many(self, queue: str, rows: Sequence[LateRow], registers: bool) -> Added:
        """As Append says, for a server; the rows are made while it stores those before.

        ValueError where one cannot be, and then none is stored.
        """
        ids = await self._database.write(
            ACTION, _append_pieces, queue, rows, new_token(), registers
        )
        return Added(ids, told=False)

    def _append_all(
        self,
        queue: str,
        offers: Sequence[Offer],
        patient: bool,
        tell: Callable[[Sequence[Added] | BaseException], None],
    ) -> asyncio.Task[Sequence[Added]]:
        token = new_token()
        lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
        rows = list(chain.from_iterable(offer.rows for offer in offers))
        registers = any(offer.registers for offer in offers)
        notice = self._carry([_wakeups.pending(queue)]) if len(offers) == 1 else None

        async def append(tx: Transaction) -> Sequence[Added]:
            if tx.dialect.embedded:
                stored = await _add(tx, queue, rows, token, registers)
            else:
                stored = await append_store.append(
                    tx,
                    queue,
                    rows,
                    token,
                    registers=registers,
                    lock_timeout=lock_timeout,
                    notice=notice,
                )
            told = notice is not None
            return [Added({row.id for row in offer.rows} & stored, told) for offer in offers]

        return self._database.start_statement(ACTION, append, patient=False, ended=tell)


async def append_by_itself(
    database: Operations, queue: str, rows: Sequence[TaskRow], registers: bool
) -> Added:
    """As Append says, by a transaction of its own, or in the caller's."""
    ids = await database.write(ACTION, _add, queue, rows, new_token(), registers)
    return Added(ids, told=False)


async def _append_pieces(
    tx: Transaction, queue: str, rows: Sequence[LateRow], token: int, registers: bool
) -> set[str]:
    ids: set[str] = set()
    loop = asyncio.get_running_loop()
    start = 0
    while start < len(rows):
        piece = next(task_store.chunks([row.row() for row in rows[start : start + PIECE]]))
        start += len(piece)
        # Its turn comes when the statement is on its way.
        loop.call_soon(_make, rows[start : start + PIECE])
        # The queue last, as in _add.
        is_last = start == len(rows)
        ids |= await append_store.append(tx, queue, piece, token, registers=registers and is_last)
    return ids


def _make(rows: Sequence[LateRow]) -> None:
    # What is wrong with one is raised when it is asked for.
    with contextlib.suppress(ValueError):
        for row in rows:
            row.row()


async def _add(
    tx: Transaction, queue: str, rows: Sequence[TaskRow], token: int, registers: bool
) -> set[str]:
    added = await task_store.add(tx, queue, rows, token, PENDING)
    if registers:
        # Last: whoever has to wait for a task must not hold up all that are new to the queue.
        await queue_store.register(tx, queue)
    return added.now | added.before
