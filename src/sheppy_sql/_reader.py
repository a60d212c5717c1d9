"""Reading by ids: what several ask for at a time is found by one statement."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ._batcher import Batchers

if TYPE_CHECKING:
    from ._database import Database
    from ._transaction import Operation, Operations, Transaction

Texts: TypeAlias = dict[str, str]
"""Payloads by id."""
Find: TypeAlias = Callable[[str, Sequence[str]], Awaitable[Texts]]
"""Those of a queue's ids that are there."""

MOST_IDS = 5000
"""In one statement, unless a single caller asks for more."""


class Reader:
    """Each call by itself, as in a caller's transaction, where one follows another anyway."""

    def __init__(self, database: Operations) -> None:
        self._operations = database

    def finding(self, action: str, operation: Operation[[str, Sequence[str]], Texts]) -> Find:
        """What finds by a store's operation."""

        async def find(queue: str, ids: Sequence[str]) -> Texts:
            return await self._operations.read(action, operation, queue, ids)

        return find


class SharedReader(Reader):
    """Calls that come while one is under way go together in the next statement."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._database = database
        self._numbers = itertools.count()

    def finding(self, action: str, operation: Operation[[str, Sequence[str]], Texts]) -> Find:
        async def find_all(
            tx: Transaction, queue: str, calls: Sequence[Sequence[str]]
        ) -> list[Texts]:
            found = await operation(tx, queue, list(dict.fromkeys(itertools.chain(*calls))))
            return [{one: found[one] for one in ids if one in found} for ids in calls]

        def start(
            queue: str, calls: Sequence[Sequence[str]], _patient: bool, _ended: object
        ) -> asyncio.Task[list[Texts]]:
            return self._database.start_read(action, find_all, queue, calls)

        batchers: Batchers[Sequence[str], Texts] = Batchers(start, most_size=MOST_IDS, patience=0.0)

        async def find(queue: str, ids: Sequence[str]) -> Texts:
            # Two calls for one id may share a statement.
            key = str(next(self._numbers))
            return await batchers[queue].submit([key], ids, len(ids))

        return find


def in_parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """As many ids at a time as one statement looks for."""
    return (ids[start : start + MOST_IDS] for start in range(0, len(ids), MOST_IDS))
