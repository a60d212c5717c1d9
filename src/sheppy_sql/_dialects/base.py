"""What a database must offer; everything above asks these members, never for a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Connection, FromClause, Table
    from sqlalchemy.dialects.postgresql import Insert as PostgreSQLInsert
    from sqlalchemy.dialects.sqlite import Insert as SQLiteInsert
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.types import TypeEngine

    from .._prepared import Fetch
    from .._urls import Target

    Columns = Mapping[str, tuple[TypeEngine[Any], Sequence[Any] | None]]


class Listener(Protocol):
    """Who listens to what other processes have committed."""

    async def ready(self) -> None:
        """Called once it is listened."""

    def heard(self, text: str | None) -> None:
        """Called with each notification, or None where something changed and nobody says what."""

    async def wanted(self) -> None:
        """Awaited before what is done again and again, as long as nobody waits for anything."""


class Dialect(ABC):
    """Thirteen differences between PostgreSQL and SQLite."""

    embedded: ClassVar[bool]
    """A file of this machine: one transaction writes at a time, and nobody deploys its tables."""

    def __init__(self, *, prepared_statements: bool | None = None) -> None:
        """`prepared_statements` is SqlBackend's option; None to find out."""
        self._prepared_statements = prepared_statements

    @abstractmethod
    def create_engine(
        self, target: Target, *, pool_size: int, connect_timeout: float, grows: bool = False
    ) -> AsyncEngine:
        """An engine of our own; it opens nothing yet. `connect_timeout` is in seconds.

        `grows`: as many connections as are wanted at once; those that were kept idle are tried
        before they are given out.
        """

    @abstractmethod
    def adopt(self, engine: AsyncEngine) -> None:
        """Have an engine of the application's end the transactions of what it gives up."""

    @abstractmethod
    def check_server(self, connection: Connection) -> datetime | None:
        """The server's clock, None where it is this machine's; BackendError if it is unfit."""

    @abstractmethod
    def begin(self, connection: Connection, *, write: bool, single: bool = False) -> bool:
        """Begin a transaction in which a later statement sees what committed meanwhile.

        `single`: on a server one statement writes, and may be a transaction by itself; what goes
        to a file has one around it. Whether there is anything to commit in the end.
        """

    @abstractmethod
    def fetcher(self, *, in_transaction: bool) -> Fetch | None:
        """How the driver carries out statements on a connection of our own, past SQLAlchemy.

        None where that is not to be done. `in_transaction`: one that `begin` has begun.
        """

    @abstractmethod
    async def lend(self, connection: AsyncConnection) -> None:
        """Prepare a connection on which somebody else will begin a transaction that writes."""

    @abstractmethod
    def begin_lent(self, connection: Connection) -> None:
        """Make of a transaction that has just been begun there what `begin` makes of its own."""

    @abstractmethod
    async def hear(self, connection: AsyncConnection, channel: str, listener: Listener) -> None:
        """Listen to what other processes have committed, until the connection is lost.

        On a connection that is for nothing else.
        """

    @abstractmethod
    def now(self, plus: float = 0.0) -> ColumnElement[datetime]:
        """The database's clock, `plus` seconds later; an index can be searched by it."""

    @abstractmethod
    def unnest(self, columns: Columns) -> FromClause:
        """Rows from lists, with `ordinal` counting from 1.

        All lists may be None: they are then given by the parameters that `lists` makes of them. In
        one statement no two such may have the same first column, by which SQLite's has its name.
        """

    @abstractmethod
    def lists(self, columns: Columns) -> dict[str, Any]:
        """The parameters of what `unnest` has made of these columns without their lists."""

    @abstractmethod
    def insert(self, table: Table) -> PostgreSQLInsert | SQLiteInsert:
        """An INSERT that knows ON CONFLICT."""
