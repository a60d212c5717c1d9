"""What an application has in its hand in synchronous code, and how it lends us its connection."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.orm import Session, scoped_session

from ._drivers import Link, RawLink, link_to
from ._errors import is_driver_error
from ._joined import AS_WRITTEN

if TYPE_CHECKING:
    from sqlalchemy import Executable

    from ._transaction import Result

ACCEPTED = (
    "a SQLAlchemy Session or Connection, Django's connection, or a connection of psycopg "
    '(pip install "sheppy-sql[sync]"), psycopg2 or sqlite3'
)
ASYNCHRONOUS = ("asyncpg", "aiosqlite", "sqlalchemy.ext.asyncio")
DJANGO = (
    ("django.db.backends.base.base", "BaseDatabaseWrapper"),
    ("django.utils.connection", "ConnectionProxy"),
)


class Look(NamedTuple):
    """A connection lent for one look."""

    link: Link
    joined: bool
    """Whether the look is part of a transaction that was open before and stays so."""


class Caller(ABC):
    """Whose transaction it is."""

    session: Session | None = None
    """Where there is one, it tells when it has committed."""

    @property
    @abstractmethod
    def embedded(self) -> bool: ...

    @abstractmethod
    def link(self) -> Link:
        """The connection, to write on; the caller ends what it begins."""

    @abstractmethod
    def looking(self) -> AbstractContextManager[Look]:
        """The connection, for a look that leaves no transaction open that was not open before."""

    def failed(self) -> None:  # noqa: B027  # only Django wants to know
        """Hear that the database has refused something."""


class DbapiCaller(Caller):
    """A connection of one of the drivers."""

    def __init__(self, link: RawLink) -> None:
        self._link = link

    @property
    def embedded(self) -> bool:
        return self._link.embedded

    def link(self) -> Link:
        return self._link

    @contextmanager
    def looking(self) -> Iterator[Look]:
        link = self._link
        joined = link.in_transaction
        try:
            yield Look(link, joined)
        finally:
            if not joined and link.in_transaction:
                give_up(link.rollback)


class DjangoCaller(DbapiCaller):
    """`django.db.connection`, or one of `django.db.connections`."""

    def __init__(self, wrapper: Any) -> None:
        wrapper.validate_thread_sharing()
        wrapper.ensure_connection()
        link = link_to(wrapper.connection)
        if link is None:
            raise ValueError(
                f"Django's connection is to {wrapper.vendor}; use PostgreSQL or SQLite"
            )
        super().__init__(link)
        self._wrapper = wrapper

    def link(self) -> Link:
        # An atomic block that is to be rolled back anyway refuses Django's own queries too.
        self._wrapper.validate_no_broken_transaction()
        return super().link()

    def failed(self) -> None:
        # As after an error of a query of Django's own: the connection is looked at before its
        # next use, and the atomic block, if somebody goes on in it, is not committed half.
        self._wrapper.errors_occurred = True
        if self._wrapper.in_atomic_block:
            self._wrapper.needs_rollback = True


class ConnectionCaller(Caller):
    """A SQLAlchemy Connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def embedded(self) -> bool:
        return self._connection.dialect.name == "sqlite"

    def link(self) -> Link:
        return SqlalchemyLink(self._connection)

    @contextmanager
    def looking(self) -> Iterator[Look]:
        was_begun = self._connection.in_transaction()
        link = SqlalchemyLink(self._connection)
        # SQLAlchemy's transaction becomes one of the server's with its first statement.
        begins = was_begun and not link.embedded and not link.autocommit
        try:
            yield Look(link, link.in_transaction or begins)
        finally:
            if not was_begun:
                give_up(link.rollback)


class SessionCaller(Caller):
    """A SQLAlchemy Session."""

    def __init__(self, session: Session) -> None:
        self.session: Session = session

    @property
    def embedded(self) -> bool:
        return self.session.get_bind().dialect.name == "sqlite"

    def link(self) -> Link:
        return SqlalchemyLink(self.session.connection())

    @contextmanager
    def looking(self) -> Iterator[Look]:
        with ExitStack() as stack:
            # Not one of the session's own: its end would expire the application's objects.
            in_transaction = self.session.in_transaction()
            bind = self.session.connection() if in_transaction else self.session.get_bind()
            if isinstance(bind, Connection):
                connection = bind
            else:
                connection = stack.enter_context(bind.connect())
            yield stack.enter_context(ConnectionCaller(connection).looking())


class SqlalchemyLink(Link):
    """A SQLAlchemy Connection, whose events and options are the application's."""

    def __init__(self, connection: Connection) -> None:
        raw = link_to(connection.connection.driver_connection)
        if raw is None:
            raise ValueError(
                f"The driver {connection.dialect.driver} is not supported: use psycopg, psycopg2 "
                "or sqlite3; for asyncpg and aiosqlite there is backend.bind()"
            )
        self._connection = connection
        self._raw = raw

    @property
    def embedded(self) -> bool:
        return self._raw.embedded

    @property
    def begin(self) -> str:
        return self._raw.begin

    @property
    def in_transaction(self) -> bool:
        return self._raw.in_transaction

    @property
    def autocommit(self) -> bool:
        return self._raw.autocommit

    @property
    def always_in_transaction(self) -> bool:
        return self._raw.always_in_transaction

    @property
    def database(self) -> Hashable | None:
        return self._raw.database

    def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Result:
        return self._connection.execute(statement, parameters, execution_options=AS_WRITTEN)

    def command(self, sql: str) -> None:
        self._raw.command(sql)

    def rollback(self) -> None:
        self._connection.rollback()


def caller_of(connection: object) -> Caller:
    """Whoever has this connection; ValueError says what is accepted."""
    if isinstance(connection, scoped_session):
        connection = connection()
    if isinstance(connection, Session):
        return SessionCaller(connection)
    if isinstance(connection, Connection):
        return ConnectionCaller(connection)
    for module, name in DJANGO:
        if isinstance(connection, getattr(sys.modules.get(module), name, ())):
            return DjangoCaller(connection)
    if (link := link_to(connection)) is not None:
        return DbapiCaller(link)
    kind = type(connection)
    hint = (
        "; in asynchronous code use backend.bind()"
        if kind.__module__.startswith(ASYNCHRONOUS) or kind.__name__.startswith("Async")
        else ""
    )
    raise ValueError(f"connection must be {ACCEPTED}, not {kind.__name__}{hint}")


def give_up(rollback: Callable[[], None]) -> None:
    """Roll back; on a connection that is lost there is nothing to do."""
    try:
        rollback()
    except Exception as error:
        if not is_driver_error(error):
            raise
