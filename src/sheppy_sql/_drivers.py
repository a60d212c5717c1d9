"""Plain DB-API connections that belong to the caller: our statements on them, and their state.

They are used through cursors of our own, so neither row factories nor adapters of the caller's
matter, and nothing is set on a connection. Drivers are recognised without importing them: who has
a connection has imported its driver.
"""

from __future__ import annotations

import sqlite3
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import psycopg as postgresql

from ._prepared import prepare, prepared_once, row_type

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.engine import Dialect

    from ._transaction import Result

LEGACY: Final = -1
"""sqlite3.LEGACY_TRANSACTION_CONTROL, which Python 3.11 does not have."""
IDLE: Final = 0  # libpq's states of a connection
UNKNOWN: Final = 4  # it is closed


class Link(ABC):
    """A caller's connection, as far as our statements need it."""

    @property
    @abstractmethod
    def embedded(self) -> bool:
        """Whether it is to SQLite."""

    @property
    @abstractmethod
    def begin(self) -> str:
        """What begins a transaction in which a later statement sees what committed meanwhile."""

    @property
    @abstractmethod
    def in_transaction(self) -> bool:
        """Whether one is open now."""

    @property
    @abstractmethod
    def autocommit(self) -> bool:
        """Whether the driver begins none by itself."""

    @property
    def always_in_transaction(self) -> bool:
        """Whether the driver begins the next one as soon as one ends."""
        return False

    @property
    @abstractmethod
    def database(self) -> Hashable | None:
        """What tells the database from others of this process; None where nothing does."""

    @abstractmethod
    def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Result:
        """Carry out a statement; `parameters` are of one that is made once."""

    @abstractmethod
    def command(self, sql: str) -> None:
        """BEGIN, COMMIT or ROLLBACK where the driver begins nothing by itself."""

    @abstractmethod
    def rollback(self) -> None:
        """End what the driver has begun."""


class RawLink(Link):
    """One without SQLAlchemy between it and us."""

    _dialect: ClassVar[Dialect]

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Result:
        if parameters is None:
            prepared = prepare(statement, self._dialect)
        else:
            prepared = prepared_once(statement, self._dialect)
        values = prepared.values(parameters or {})
        if self._dialect.positional:
            return self._run(prepared.sql, values)
        names = (parameter.name for parameter in prepared.parameters)
        return self._run(prepared.sql, dict(zip(names, values, strict=True)))

    def command(self, sql: str) -> None:
        self._run(sql, None)

    def rollback(self) -> None:
        self._raw.rollback()

    def _run(self, sql: str, parameters: Any) -> Result:
        cursor = self._cursor()
        try:
            self._execute(cursor, sql, parameters)
            return Fetched(cursor)
        finally:
            cursor.close()

    def _execute(self, cursor: Any, sql: str, parameters: Any) -> None:
        if parameters is None:
            cursor.execute(sql)
        else:
            cursor.execute(sql, parameters)

    @abstractmethod
    def _cursor(self) -> Any:
        """A cursor whose rows are tuples, whatever the connection is set to."""


class SQLiteLink(RawLink):
    """sqlite3."""

    embedded = True
    begin = "BEGIN IMMEDIATE"
    _dialect = sqlite.dialect()

    @property
    def in_transaction(self) -> bool:
        return bool(self._raw.in_transaction)

    @property
    def autocommit(self) -> bool:
        control = self._control
        return self._raw.isolation_level is None if control == LEGACY else bool(control)

    @property
    def always_in_transaction(self) -> bool:
        return self._control is False

    @property
    def database(self) -> Hashable | None:
        rows = self._run("PRAGMA database_list", None).all()
        # One in memory has no name, and is another for every connection.
        return next((row[2] for row in rows if row[1] == "main"), None) or None

    @property
    def _control(self) -> bool | int:
        """Python 3.12's attribute; legacy, the default: by isolation_level, and only for DML."""
        return cast("bool | int", getattr(self._raw, "autocommit", LEGACY))

    def _cursor(self) -> Any:
        return sqlite3.Cursor(self._raw)


class PostgreSQLLink(RawLink):
    """What the two drivers for PostgreSQL have in common."""

    embedded = False
    # Not what default_transaction_isolation says.
    begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
    # For psycopg2 as well, whose own leaves parameters without a type.
    _dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # not yet typed

    @property
    def in_transaction(self) -> bool:
        return int(self._raw.info.transaction_status) not in {IDLE, UNKNOWN}

    @property
    def autocommit(self) -> bool:
        return bool(self._raw.autocommit)

    @property
    def database(self) -> Hashable | None:
        info = self._raw.info
        return info.host, info.port, info.dbname


class PsycopgLink(PostgreSQLLink):
    def _cursor(self) -> Any:
        import psycopg
        from psycopg.rows import tuple_row

        return psycopg.Cursor(self._raw, row_factory=tuple_row)

    def _execute(self, cursor: Any, sql: str, parameters: Any) -> None:
        # Prepared statements would stay on the caller's connection, or break behind a pooler.
        cursor.execute(sql, parameters, prepare=False)


class Psycopg2Link(PostgreSQLLink):
    def _cursor(self) -> Any:
        from psycopg2.extensions import cursor

        return cursor(self._raw)


class Fetched:
    """A result whose cursor is closed already."""

    def __init__(self, cursor: Any) -> None:
        self._rows: list[Any] = []
        if cursor.description is not None:
            make = row_type(tuple(column[0] for column in cursor.description))
            self._rows = [make(*map(_text, row)) for row in cursor.fetchall()]
        self.rowcount: int = cursor.rowcount

    def all(self) -> Sequence[Any]:
        return self._rows

    def scalar(self) -> Any:
        return self._rows[0][0] if self._rows else None


_LINKS: tuple[tuple[str, str, type[RawLink]], ...] = (
    ("sqlite3", "Connection", SQLiteLink),
    ("psycopg", "Connection", PsycopgLink),
    ("psycopg2.extensions", "connection", Psycopg2Link),
)


def link_to(raw: object) -> RawLink | None:
    """The link to a connection; None where its driver is none of those above."""
    for module, name, link in _LINKS:
        if isinstance(raw, getattr(sys.modules.get(module), name, ())):
            return link(raw)
    return None


def _text(value: Any) -> Any:
    # As text_factory=bytes gives it, and psycopg where client_encoding is SQL_ASCII.
    return value.decode() if isinstance(value, bytes) else value
