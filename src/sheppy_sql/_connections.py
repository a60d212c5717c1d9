"""The connections of an engine, of which some are kept at hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.util.concurrency import greenlet_spawn

from ._errors import Fault, fault, is_driver_error

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


class Connections:
    """Lends the connections of an engine's pool, in greenlets.

    The way through the pool takes a fifth of the time of a short statement. So connections that
    were used stay out of it, unless somebody waits for one; `keeps`: if there may be any such, as
    of an engine that is ours alone.
    """

    def __init__(self, engine: AsyncEngine, *, keeps: bool) -> None:
        self._engine = engine
        self._keeps = keeps
        self._kept: list[Connection] = []
        self._waiting = 0

    @contextmanager
    def lend(self) -> Iterator[Connection]:
        """A connection, on which a transaction of SQLAlchemy's may be begun."""
        connection = self._borrow()
        try:
            yield connection
        except BaseException as error:
            # It may still answer, as a primary does that has become a standby.
            if is_driver_error(error) and fault(error) is Fault.OUTAGE:
                connection.invalidate()
                self._drop_kept()
            connection.close()
            raise
        if self._keeps and not self._waiting and _is_plain(connection):
            self._kept.append(connection)
        else:
            connection.close()

    @asynccontextmanager
    async def lend_whole(self) -> AsyncIterator[AsyncConnection]:
        """An AsyncConnection, for what is not carried out in a greenlet."""
        connecting = self._engine.connect()
        self._waiting += 1
        try:
            await self._release()
            await connecting.start()
        finally:
            self._waiting -= 1
        try:
            yield connecting
        finally:
            # Whoever is cancelled once may be so again.
            await asyncio.shield(asyncio.ensure_future(connecting.close()))

    async def close(self) -> None:
        """Keep nothing any more."""
        self._keeps = False
        await self._release()

    async def _release(self) -> None:
        kept, self._kept = self._kept, []
        for connection in kept:
            await greenlet_spawn(connection.close)

    def _borrow(self) -> Connection:
        if self._kept:
            # The one that was used last: what it holds is still in the caches.
            return self._kept.pop()
        self._waiting += 1
        try:
            return self._engine.sync_engine.connect()
        finally:
            self._waiting -= 1

    def _drop_kept(self) -> None:
        """Where one connection was lost, others may be."""
        kept, self._kept = self._kept, []
        for connection in kept:
            # Without a word, for which each of them would wait where the way is gone.
            driver: Any = connection.connection.driver_connection
            if hasattr(driver, "terminate"):  # a file's has no way to anywhere
                driver.terminate()
            connection.invalidate()
            connection.close()


def _is_plain(connection: Connection) -> bool:
    """Whether nothing was set on it; whatever transaction there was has ended."""
    return not connection.get_execution_options() and not connection.invalidated
