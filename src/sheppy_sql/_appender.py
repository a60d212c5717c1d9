"""Putting new tasks in line: those of many calls at once, where many come at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, MOST_BYTES, MOST_KEYS, Batchers
from ._database import new_token
from ._stores import appends as append_store
from ._stores import queues as queue_store
from ._stores import tasks as task_store
from .schema import PENDING

if TYPE_CHECKING:
    import asyncio

    from ._database import Database, Operations, Transaction
    from ._payloads import TaskRow

ACTION = "append tasks"

AppendNew = Callable[[str, Sequence["TaskRow"], bool], Awaitable[Collection[str]]]
"""Of a queue the rows, no id twice, that were new to it, by id; True: make the queue known."""


class Offer(NamedTuple):
    """What one call wants in line."""

    rows: Sequence[TaskRow]
    registers: bool


class Appender:
    """Appends of one backend instance, which go together where one is under way."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._batchers: Batchers[Offer, Collection[str]] = Batchers(self._append_all)

    async def append(self, queue: str, rows: Sequence[TaskRow], registers: bool) -> Collection[str]:
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
        tell: Callable[[Sequence[Collection[str]] | BaseException], None],
    ) -> asyncio.Task[Sequence[Collection[str]]]:
        token = new_token()
        lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
        rows = list(chain.from_iterable(offer.rows for offer in offers))
        registers = any(offer.registers for offer in offers)

        async def append(tx: Transaction) -> Sequence[Collection[str]]:
            if tx.dialect.embedded:
                stored = await _add(tx, queue, rows, token, registers)
            else:
                stored = await append_store.append(
                    tx, queue, rows, token, registers=registers, lock_timeout=lock_timeout
                )
            return [{row.id for row in offer.rows} & stored for offer in offers]

        return self._database.start_statement(ACTION, append, patient=False, ended=tell)


async def append_by_itself(
    database: Operations, queue: str, rows: Sequence[TaskRow], registers: bool
) -> Collection[str]:
    """As AppendNew says, by a transaction of its own, or in the caller's."""
    return await database.write(ACTION, _add, queue, rows, new_token(), registers)


async def _add(
    tx: Transaction, queue: str, rows: Sequence[TaskRow], token: int, registers: bool
) -> set[str]:
    added = await task_store.add(tx, queue, rows, token, PENDING)
    if registers:
        # Last: whoever has to wait for a task must not hold up all that are new to the queue.
        await queue_store.register(tx, queue)
    return added.now | added.before
