"""Engines beside the one that an instance was given, and their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

if TYPE_CHECKING:
    from sqlalchemy import Pool
    from sqlalchemy.ext.asyncio import AsyncConnection

_abandoned: list[Pool] = []


def twin(engine: AsyncEngine) -> AsyncEngine:
    """An engine that connects as another does, outside its pool, for whatever event loop."""
    original = engine.sync_engine
    # The pool's own recipe, so that what the application does on connecting is done here too.
    return AsyncEngine(
        Engine(
            original.pool.recreate(),
            original.dialect,
            original.url,
            logging_name=original.logging_name,
            hide_parameters=True,
        )
    )


def abandon(engine: AsyncEngine) -> None:
    """Leave an engine's connections as they are: their event loop is closed, or the parent's."""
    # Kept: at its end a connection's transport would tell the selector, which a child shares with
    # its parent, and the parent would wait for ever.
    _abandoned.append(engine.sync_engine.pool)
    engine.sync_engine.dispose(close=False)


async def connect(engine: AsyncEngine) -> AsyncConnection:
    return await engine.connect()
