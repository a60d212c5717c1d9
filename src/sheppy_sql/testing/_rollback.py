"""A database on which nothing stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from .._backend import SqlBackend
from .._dialects import dialect_named
from .._savepoints import SavepointDatabase
from .._session import Session


@dataclass(frozen=True)
class RolledBack:
    """What the code under test works with; all of it is in one transaction."""

    connection: AsyncConnection
    backend: SqlBackend
    """All that a SqlBackend can, `bind` for a session of `sessions` included."""
    sessions: async_sessionmaker[AsyncSession]
    """Makes sessions whose commit ends a savepoint."""


@asynccontextmanager
async def rolled_back(engine: AsyncEngine, **options: Any) -> AsyncIterator[RolledBack]:
    """One transaction for the application and its queues, rolled back at the end of the block.

    The tables must be there. What is to use the database in the block must do so through what
    the block is given, and one at a time, as one connection can.

    Args:
        engine: The application's, on asyncpg or aiosqlite; it stays open.
        options: Of the SqlBackend, for example `schema`.
    """
    async with engine.connect() as connection:
        await _begin(connection)
        backend = _RolledBackBackend(connection, **options)
        sessions = async_sessionmaker(
            connection, expire_on_commit=False, join_transaction_mode="create_savepoint"
        )
        try:
            await backend.connect()
            yield RolledBack(connection, backend, sessions)
        finally:
            try:
                await backend.disconnect()
            finally:
                await connection.rollback()


class _RolledBackBackend(SqlBackend):
    """In the transaction of a connection, each call in a savepoint of its own."""

    def __init__(self, connection: AsyncConnection, **options: Any) -> None:
        super().__init__(connection.engine, **options)
        self._connection = connection

    async def connect(self) -> None:
        async with self._connect_lock():
            if self.is_connected:
                return
            dialect = dialect_named(self._connection.dialect.name)
            self._session = await Session.on(
                SavepointDatabase(self._connection, self._tables, dialect),
                self._claims,
                self._options,
                create_engine=None,
                host_decides=True,
                resume_workflow=self._resume_workflow,
                passing=True,
            )


async def _begin(connection: AsyncConnection) -> None:
    """Open a transaction in which savepoints hold, whatever the engine is set to."""
    raw = (await connection.get_raw_connection()).driver_connection
    if connection.dialect.name != "sqlite":
        await connection.execution_options(isolation_level="READ COMMITTED")
        await connection.begin()
        return
    await connection.begin()
    # The driver itself would begin only at the first write, and thus inside a savepoint.
    if raw is not None and not raw.in_transaction:
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
