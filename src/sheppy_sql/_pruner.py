"""Deleting what has expired, a little at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ._stores import chores as chore_store
from ._stores import consumers as consumer_store
from ._stores import receipts as receipt_store
from ._stores import results as result_store

if TYPE_CHECKING:
    from ._database import Database

CHORE = "prune"
INTERVAL = 60.0  # seconds between two rounds, of all instances together
BATCH = 500  # rows, few enough that nobody waits for their locks
PAUSE = 0.02  # seconds between two batches, in which others write
LONGEST_ROUND = 50.0  # seconds, so that the next round is never another instance's meanwhile


class Pruner:
    """Of all instances, one at a time deletes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def prune(self) -> int:
        """Delete expired results; how many. 0 where another instance has done so just now."""
        if not await self._database.write("prune", chore_store.take, CHORE, INTERVAL):
            return 0
        clock = asyncio.get_running_loop().time
        ends_at, pruned, batch = clock() + LONGEST_ROUND, 0, BATCH
        while batch == BATCH and clock() < ends_at:
            batch = await self._database.write("prune results", result_store.prune, BATCH)
            pruned += batch
            await asyncio.sleep(PAUSE)
        await self._database.write("prune receipts", receipt_store.prune)
        await self._database.write("prune workers", consumer_store.prune)
        return pruned
