"""Putting new tasks in line: those of many calls at once, where many come at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from . import _wakeups
from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, MOST_BYTES, MOST_KEYS, Batchers
from ._stores import appends as append_store
from ._stores import queues as queue_store
from ._stores import tasks as task_store
from ._transaction import new_token

if TYPE_CHECKING:
    import asyncio

    from ._database import Database
    from ._payloads import TaskRow
    from ._transaction import Operations, Transaction
    from ._waiting import Notice
    from ._wakeups import Topic

ACTION = "append tasks"


class Added(NamedTuple):
    """What became of an append."""

    ids: Collection[str]
    """Of those that were new to the queue."""
    told: bool
    """Whether the other processes were told with it."""


AppendNew = Callable[[str, Sequence["TaskRow"], bool], Awaitable[Added]]
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
        """As AppendNew says, once it is committed."""
        size = sum(len(row.payload) for row in rows)
        if len(rows) > MOST_KEYS or size > MOST_BYTES:
            # Of its own accord, as nobody should have to wait for as many.
            return await append_by_itself(self._database, queue, rows, registers)
        self._database.check_turn(ACTION)
        ids = [row.id for row in rows]
        return await self._batchers[queue].submit(ids, Offer(rows, registers), size)

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
    """As AppendNew says, by a transaction of its own, or in the caller's."""
    ids = await database.write(ACTION, _add, queue, rows, new_token(), registers)
    return Added(ids, told=False)


async def _add(
    tx: Transaction, queue: str, rows: Sequence[TaskRow], token: int, registers: bool
) -> set[str]:
    added = await task_store.add(tx, queue, rows, token, pending=True)
    if registers:
        # Last: whoever has to wait for a task must not hold up all that are new to the queue.
        await queue_store.register(tx, queue)
    return added.now | added.before
