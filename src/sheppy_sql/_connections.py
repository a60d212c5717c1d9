"""The connections of an engine, of which one is kept at hand."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class Connections:
    """Lends the connections of an engine's pool, one borrower each.

    The way through the pool takes a third of the time of a short statement. So the connection that
    was used last stays out of it, unless somebody waits for one; `keeps`: if there may be any such,
    as in an engine that is ours alone.
    """

    def __init__(self, engine: AsyncEngine, *, keeps: bool) -> None:
        self._engine = engine
        self._keeps = keeps
        self._kept: AsyncConnection | None = None
        self._waiting = 0

    async def borrow(self) -> AsyncConnection:
        """A connection, as it was made or as its last borrower has left it."""
        if self._kept is not None:
            connection, self._kept = self._kept, None
            return connection
        self._waiting += 1
        try:
            return await self._engine.connect()
        finally:
            self._waiting -= 1

    async def give_back(self, connection: AsyncConnection, *, as_it_was: bool) -> None:
        """`as_it_was`: nothing is set or open on it."""
        if self._keeps and as_it_was and not self._waiting and self._kept is None:
            self._kept = connection
        else:
            await connection.close()

    async def discard(self, connection: AsyncConnection, *, is_dead: bool) -> None:
        """Give back what something went wrong on; `is_dead`: and all others may be dead too."""
        # Whoever is cancelled once may be so again.
        await asyncio.shield(asyncio.ensure_future(self._discard(connection, is_dead=is_dead)))

    async def close(self) -> None:
        """Keep nothing any more."""
        self._keeps = False
        kept, self._kept = self._kept, None
        if kept is not None:
            await kept.close()

    async def _discard(self, connection: AsyncConnection, *, is_dead: bool) -> None:
        kept, self._kept = self._kept if is_dead else None, None if is_dead else self._kept
        for one in (connection, kept):
            if one is not None:
                if is_dead:
                    await one.invalidate()
                await one.close()
