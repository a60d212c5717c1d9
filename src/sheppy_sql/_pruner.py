"""Deleting what has expired, a little at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from . import _chores
from ._stores import consumers as consumer_store
from ._stores import receipts as receipt_store
from ._stores import results as result_store

if TYPE_CHECKING:
    from ._database import Database
    from ._options import Options
    from ._transaction import Transaction

P = ParamSpec("P")

CHORE = "prune"
INTERVAL = 60.0  # seconds between two rounds, of all instances together
BATCH = 500  # rows, few enough that nobody waits for their locks
PAUSE = 0.02  # seconds between two batches, in which others write
LONGEST_ROUND = 50.0  # seconds, so that the next round is never another instance's meanwhile


RECEIPT_KEPT = 1200.0
"""Seconds beyond the longest outage; by then an earlier try is committed or will never be."""


class Pruner:
    """Of all instances, one at a time deletes."""

    def __init__(self, database: Database, options: Options) -> None:
        self._database = database
        self._receipt_kept = options.outage_grace + RECEIPT_KEPT

    async def prune(self) -> int:
        """Delete what has expired; how many results. 0 where another instance did so just now."""
        if not await _chores.take(self._database, "prune", CHORE, INTERVAL):
            return 0
        ends_at = asyncio.get_running_loop().time() + LONGEST_ROUND
        pruned = await self._repeat(ends_at, result_store.prune, BATCH)
        await self._repeat(ends_at, receipt_store.prune, self._receipt_kept, BATCH)
        await self._database.write_one("prune workers", consumer_store.prune)
        return pruned

    async def _repeat(
        self,
        ends_at: float,
        prune: Callable[Concatenate[Transaction, P], Awaitable[int]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> int:
        """Delete batches until nothing is left, or until a time; how many rows."""
        pruned, batch = 0, BATCH
        while batch == BATCH and asyncio.get_running_loop().time() < ends_at:
            batch = await self._database.write_one("prune", prune, *args, **kwargs)
            pruned += batch
            await asyncio.sleep(PAUSE)
        return pruned
