"""Operations in savepoints of one transaction, which belongs to somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from ._database import Database
from ._joined import JoinedTransaction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from ._dialects import Dialect
    from ._transaction import Transaction
    from .schema import Tables

T = TypeVar("T")


class SavepointDatabase(Database):
    """Like Database, but what is committed is a savepoint: all of it can still be rolled back."""

    def __init__(self, connection: AsyncConnection, tables: Tables, dialect: Dialect) -> None:
        super().__init__(connection.engine, tables, dialect, outage_grace=0.0, reached=True)
        self._connection = connection
        self._turn = asyncio.Lock()

    @property
    def is_in_memory(self) -> bool:
        """False: whoever binds a session of the same connection shares the transaction."""
        return False

    def _attempt(
        self,
        operation: Callable[[Transaction], Awaitable[T]],
        *,
        write: bool,
        single: bool = False,
        converses: bool = False,
    ) -> Callable[[bool], Awaitable[T]]:
        async def attempt(repeated: bool) -> T:
            async with self._turn, self._connection.begin_nested():
                transaction = JoinedTransaction(
                    self._connection, self.tables, self.dialect, repeated
                )
                return await operation(transaction)

        return attempt
