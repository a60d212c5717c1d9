"""SQLite through aiosqlite: for a laptop, a test, a small single machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import starmap
from typing import TYPE_CHECKING, Any

from sheppy import BackendError
from sqlalchemy import ColumnElement, Text, bindparam, event, func, literal, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, StaticPool
from sqlalchemy.util.concurrency import in_greenlet

from .._greenlets import await_
from .._prepared import is_watched, row_type
from ..schema import Timestamp, sqlite_timestamp
from . import logs
from .base import Dialect

if TYPE_CHECKING:
    from sqlalchemy import Connection, FromClause, Table
    from sqlalchemy.dialects.sqlite import Insert
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from .._prepared import Fetch, Prepared
    from .._urls import Target
    from .base import Columns, Listener

OLDEST_VERSION = (3, 35, 0)
BUSY_TIMEOUT = 5.0  # seconds
BUSY_TRIES = 12
"""How often whoever begins by himself waits so long for another program's transaction."""

BEGIN = "BEGIN IMMEDIATE"
CLOSED = frozenset({"no active connection", "connection closed"})

LOOK_OUT = 0.004
"""Seconds between two looks whether the file has changed; each takes microseconds, in a thread."""
LOOK_OUT_IDLY = 0.012  # seconds, where it has not for a while
IDLE_AFTER = 100  # looks


class SQLite(Dialect):
    embedded = True

    def __init__(self, *, prepared_statements: bool | None = None) -> None:
        super().__init__(prepared_statements=prepared_statements)
        self._is_ours = False

    def create_engine(
        self, target: Target, *, pool_size: int, connect_timeout: float, grows: bool = False
    ) -> AsyncEngine:
        logs.hide_rows()
        logs.hide_parameters()
        memory = is_memory(target)
        pool: dict[str, Any] = (
            # Every connection to :memory: is a database of its own.
            {"poolclass": StaticPool}
            if memory
            else {
                "poolclass": AsyncAdaptedQueuePool,
                "pool_size": pool_size,
                "max_overflow": -1 if grows else 0,
                "pool_timeout": None,
            }
        )
        self._is_ours = True
        engine = create_async_engine(
            target.url,
            connect_args={"timeout": BUSY_TIMEOUT, **target.connect_args},
            # The driver's own BEGIN would be a deferred one, whose upgrade to a write
            # lock fails at once where another writer came in between.
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            logging_name=logs.ENGINE,
            **pool,
        )
        event.listen(engine.sync_engine, "do_connect", _probe)
        event.listen(engine.sync_engine, "connect", _prepare)
        self.adopt(engine)
        return engine

    def adopt(self, engine: AsyncEngine) -> None:
        if not event.contains(engine.sync_engine, "invalidate", _roll_back):
            event.listen(engine.sync_engine, "invalidate", _roll_back)

    def check_server(self, connection: Connection) -> datetime | None:
        version = tuple(int(part) for part in sqlite3.sqlite_version.split("."))
        if version < OLDEST_VERSION:
            oldest = ".".join(map(str, OLDEST_VERSION))
            raise BackendError(
                f"Failed to connect: SQLite {sqlite3.sqlite_version} is too old, {oldest} or newer "
                "is needed; use a newer Python, which brings its own"
            )
        return None

    def begin(self, connection: Connection, *, write: bool, single: bool = False) -> bool:
        if not self._is_ours:
            connection.execution_options(isolation_level="AUTOCOMMIT", schema_translate_map=None)
        if not write:
            return False
        if not connection.in_transaction():
            connection.begin()  # of SQLAlchemy's, which sends nothing
        if self._is_ours and not is_watched(connection):
            await_(_execute(connection, BEGIN))
            return True
        raw = connection.connection.driver_connection
        if raw is not None and raw.in_transaction:
            # The application's engine has a listener that begins, as SQLAlchemy recommends.
            connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql(BEGIN)
        return True

    def fetcher(self, *, in_transaction: bool) -> Fetch | None:
        return _fetch if self._is_ours else None

    async def lend(self, connection: AsyncConnection) -> None:
        await connection.execution_options(isolation_level="AUTOCOMMIT")

    def begin_lent(self, connection: Connection) -> None:
        raw = connection.connection.driver_connection
        if raw is not None and raw.in_transaction:
            # As in `begin`.
            connection.exec_driver_sql("ROLLBACK")
        tries_left = BUSY_TRIES
        while not _has_begun(connection, is_last=tries_left == 1):
            tries_left -= 1

    async def hear(self, connection: AsyncConnection, channel: str, listener: Listener) -> None:
        # A connection that writes nothing hears of every commit, without looking at any table.
        driver: Any = (await connection.get_raw_connection()).driver_connection

        async def version() -> int:
            [[number]] = await driver.execute_fetchall("PRAGMA data_version")
            return int(number)

        known, unchanged = await version(), 0
        await listener.ready()
        while True:
            await listener.wanted()
            await asyncio.sleep(LOOK_OUT if unchanged < IDLE_AFTER else LOOK_OUT_IDLY)
            found = await version()
            unchanged += 1
            if found != known:
                known, unchanged = found, 0
                listener.heard(None)

    def now(self, plus: float = 0.0) -> ColumnElement[datetime]:
        # The same machine's clock, and finer than SQLite's own milliseconds. Looked at with each
        # execution, as a statement may be made once.
        return bindparam(None, type_=Now, unique=True, callable_=partial(_now, plus))

    def unnest(self, columns: Columns) -> FromClause:
        given = self.lists(columns)
        if all(values is None for _, values in columns.values()):
            [rows] = (bindparam(name, type_=Text) for name in given)
        else:
            [rows] = (literal(text, Text) for text in given.values())
        item = func.json_each(rows).table_valued("key", "value", name="entry")
        extracted = [
            func.json_extract(item.c.value, f"$[{index}]", type_=type_).label(name)
            for index, (name, (type_, _)) in enumerate(columns.items())
        ]
        ordinal = (item.c.key + 1).label("ordinal")
        return select(*extracted, ordinal).subquery("item")

    def lists(self, columns: Columns) -> dict[str, Any]:
        rows = [
            [sqlite_timestamp(value) if isinstance(value, datetime) else value for value in row]
            for row in zip(*(values or () for _, values in columns.values()), strict=True)
        ]
        # The first name tells it from others of the same statement.
        return {f"all_{next(iter(columns))}": json.dumps(rows)}

    def insert(self, table: Table) -> Insert:
        return insert(table)


def is_memory(target: Target) -> bool:
    database, mode = target.url.database or ":memory:", target.url.query.get("mode")
    return mode == "memory" or database in {":memory:", "file::memory:"}


class Now(Timestamp):
    """That of the clock's time.

    By its type SQLAlchemy's cache tells a statement that looks at the clock from one that is given
    a time: for the first it does not ask where it has compiled the second.
    """

    cache_ok = True


async def _execute(connection: Connection, sql: str, values: Sequence[Any] = ()) -> Any:
    """The rows of a statement. The driver's thread is asked once, which a cursor does thrice."""
    driver: Any = connection.connection.driver_connection
    try:
        return await driver.execute_fetchall(sql, values)
    except ValueError as error:
        # What the driver says of a connection that is closed.
        if str(error).lower() not in CLOSED:
            raise
        raise sqlite3.OperationalError(str(error)) from None


async def _fetch(connection: Connection, statement: Prepared, values: Sequence[Any]) -> Any:
    rows = await _execute(connection, statement.sql, values)
    return list(starmap(row_type(statement.columns), rows))


def _now(plus: float) -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=plus)


def _probe(_dialect: Any, _record: Any, arguments: Any, options: Any) -> None:
    """Open the file once, so that one that cannot be opened fails here.

    Where it fails in aiosqlite's thread, that thread may outlive the event loop.
    """
    understood = {name: options[name] for name in ("timeout", "uri") if name in options}
    try:
        sqlite3.connect(*arguments, **understood).close()
    except sqlite3.OperationalError as error:
        raise sqlite3.OperationalError(f"{error} ({arguments[0]})") from None


def _roll_back(connection: Any, _record: Any, _error: Any) -> None:
    """End the transaction of a connection that is given up, as when its event loop ends.

    Closing does not do it as long as a cursor is unfinished, which the traceback keeps alive.
    """
    if in_greenlet():
        with contextlib.suppress(sqlite3.Error):
            connection.rollback()


def _has_begun(connection: Connection, *, is_last: bool) -> bool:
    """Whether another program's transaction had ended in time, after waiting for it."""
    try:
        connection.exec_driver_sql(BEGIN)
    except OperationalError as error:
        if is_last or "is locked" not in str(error.orig):
            raise
        return False
    return True


def _prepare(connection: Any, _record: Any) -> None:
    # The driver has set the busy timeout before: switching to WAL needs a lock
    # that others may hold.
    cursor = connection.cursor()
    # A file that cannot be written keeps the journal it has.
    with contextlib.suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode = WAL")
    # In WAL mode this still survives the death of any process; only a power cut
    # may take the last commits, on a machine meant for development.
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()
