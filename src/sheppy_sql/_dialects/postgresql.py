"""PostgreSQL through asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
from sheppy import BackendError
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Interval,
    bindparam,
    column,
    event,
    func,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import create_async_engine

from .._waiting import sleep_until
from . import logs, poolers
from .base import Dialect

if TYPE_CHECKING:
    from sqlalchemy import Connection, FromClause, Table
    from sqlalchemy.dialects.postgresql import Insert
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from .._prepared import Fetch, Prepared
    from .._urls import Target
    from .base import Columns, Listener

OLDEST_VERSION = 14
MOVING_SNAPSHOTS = frozenset({"read committed", "read uncommitted"})
"""The defaults of a server at which a statement that commits by itself waits, and does not fail."""

# Seconds, and milliseconds for the last: a peer that is gone without a word, behind a firewall or
# with its machine, shows within about a minute and not after hours.
KEEP_ALIVE = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 60_000,
}

LOOK_AFTER = 30.0  # seconds between two looks whether a silent connection is still there
ANSWER = 10.0  # seconds for the answer


class PostgreSQL(Dialect):
    embedded = False

    def __init__(self, *, prepared_statements: bool | None = None) -> None:
        super().__init__(prepared_statements=prepared_statements)
        # Until an application's engine has shown what it is.
        self._reads_in_transactions = prepared_statements is not True
        # Until the server has told its default.
        self._writes_in_transactions = True
        self._is_ours = False
        self._statements: poolers.Statements | None = None

    def create_engine(
        self, target: Target, *, pool_size: int, connect_timeout: float, grows: bool = False
    ) -> AsyncEngine:
        logs.hide_rows()
        # Behind a pooler too: a lone statement of ours needs nothing of an earlier one there.
        self._reads_in_transactions = False
        self._is_ours = True
        given = {"timeout": connect_timeout, **target.connect_args}
        statements = poolers.Statements(self._prepared_statements, given, ours_alone=not grows)
        if not grows:
            self._statements = statements
        engine = create_async_engine(
            target.url,
            connect_args=statements.connect_args,
            pool_size=pool_size,
            max_overflow=-1 if grows else 0,
            pool_pre_ping=grows,
            # The one that was used last has the statements that are wanted next.
            pool_use_lifo=True,
            # A caller waits for its turn; the host's worker would end on an error.
            pool_timeout=None,
            # What nearly all statements want; to set it each time costs as much as they do.
            isolation_level="AUTOCOMMIT",
            # A message of SQLAlchemy's would otherwise quote payloads.
            hide_parameters=True,
            logging_name=logs.ENGINE,
        )
        event.listen(engine.sync_engine, "connect", _keep_alive)
        return engine

    def adopt(self, engine: AsyncEngine) -> None:
        # A server does that by itself.
        pass

    def check_server(self, connection: Connection) -> datetime | None:
        version, standby, read_only, encoding, isolation, pid, now = connection.execute(
            select(
                func.current_setting("server_version_num"),
                func.pg_is_in_recovery(),
                func.current_setting("transaction_read_only"),
                func.current_setting("server_encoding"),
                func.current_setting("default_transaction_isolation"),
                func.pg_backend_pid(),
                func.clock_timestamp(type_=None),
            )
        ).one()
        major = int(version) // 10_000
        if major < OLDEST_VERSION:
            raise BackendError(
                f"Failed to connect: PostgreSQL {major} is too old; "
                f"upgrade it to {OLDEST_VERSION} or newer"
            )
        if standby or read_only == "on":
            what = "a standby" if standby else "set to default_transaction_read_only"
            raise BackendError(
                f"Failed to connect: the server is read-only ({what}); connect to the primary, "
                "for example with all hosts in the URL and ?target_session_attrs=read-write"
            )
        if encoding != "UTF8":
            raise BackendError(
                f"Failed to connect: the database's encoding is {encoding}; "
                "create one with ENCODING 'UTF8'"
            )
        self._writes_in_transactions = isolation not in MOVING_SNAPSHOTS
        if self._reads_in_transactions:
            self._check_pooler(connection, pid)
        moment: datetime = now
        return moment

    def begin(self, connection: Connection, *, write: bool, single: bool = False) -> bool:
        # The engine may belong to the application, whose default may be stricter,
        # AUTOCOMMIT, or another schema. A lone statement needs no BEGIN and COMMIT, unless the
        # server's own default is stricter: it would fail where another one came in between.
        lone = not write or (single and not self._writes_in_transactions)
        commits = not lone or self._reads_in_transactions
        if commits or not self._is_ours:
            if connection.in_transaction():
                # SQLAlchemy's, of a statement that has committed by itself.
                connection.rollback()
            connection.execution_options(
                isolation_level="READ COMMITTED" if commits else "AUTOCOMMIT",
                schema_translate_map=None,
            )
        return commits

    def fetcher(self, *, in_transaction: bool) -> Fetch | None:
        statements = self._statements
        # SQLAlchemy begins a transaction with its first statement, and a pooler changes what is
        # behind a connection.
        if statements is None or not statements.kept or in_transaction:
            return None
        return partial(_fetch, statements.name)

    async def lend(self, connection: AsyncConnection) -> None:
        await connection.execution_options(isolation_level="READ COMMITTED")

    def begin_lent(self, connection: Connection) -> None:
        pass

    async def hear(self, connection: AsyncConnection, channel: str, listener: Listener) -> None:
        # The driver's own calls: they are in no transaction, which would hold notifications back.
        driver: Any = (await connection.get_raw_connection()).driver_connection
        lost = asyncio.Event()

        def tell(_connection: object, _pid: int, _channel: str, payload: str) -> None:
            listener.heard(payload)

        driver.add_termination_listener(lambda _: lost.set())
        await driver.add_listener(channel, tell)
        try:
            await listener.ready()
            while not lost.is_set():
                await sleep_until(lost, LOOK_AFTER)
                if not lost.is_set():
                    await driver.execute("SELECT 1", timeout=ANSWER)
        finally:
            # A pooler may give the server's side to somebody else.
            if not driver.is_closed():
                await driver.remove_listener(channel, tell)

    def now(self, plus: float = 0.0) -> ColumnElement[datetime]:
        # Not clock_timestamp(): it is volatile, and no index is searched by it.
        now: ColumnElement[Any] = func.statement_timestamp()
        return now + literal(timedelta(seconds=plus), Interval) if plus else now

    def unnest(self, columns: Columns) -> FromClause:
        arrays = [
            bindparam(_list_of(name), type_=ARRAY(type_))
            if values is None
            else bindparam(None, list(values), type_=ARRAY(type_))
            for name, (type_, values) in columns.items()
        ]
        names = [column(name, type_) for name, (type_, _) in columns.items()]
        return (
            func.unnest(*arrays)
            .table_valued(*names, with_ordinality="ordinal", name="item")
            .render_derived()
        )

    def lists(self, columns: Columns) -> dict[str, Any]:
        return {_list_of(name): values for name, (_, values) in columns.items()}

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def _check_pooler(self, connection: Connection, pid: int) -> None:
        """Find out what the application's engine is connected to, and whether it fits."""
        driver: Any = connection.connection.driver_connection
        if self._prepared_statements is None:
            self._reads_in_transactions = poolers.is_pooled(driver, pid)
        if self._reads_in_transactions and not poolers.is_fit(connection):
            raise BackendError(
                "Failed to connect: behind a pooler such as PgBouncer the engine must not prepare "
                f"statements; make it with {poolers.SETTINGS}, or say prepared_statements=True if "
                "the pooler keeps them"
            )


class Row(asyncpg.Record):  # type: ignore[misc]  # the driver is not typed
    """One with its columns as attributes, like a row of SQLAlchemy's."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


async def _fetch(
    name: Callable[[], str], connection: Connection, statement: Prepared, values: Sequence[Any]
) -> Any:
    """`name` names the statement where the connection does not have it yet."""
    # SQLAlchemy keeps this as long as the driver's connection lives.
    statements = connection.info
    if statement not in statements:
        driver: Any = connection.connection.driver_connection
        statements[statement] = await driver.prepare(statement.sql, name=name(), record_class=Row)
    return await statements[statement].fetch(*values)


def _list_of(name: str) -> str:
    # Not the column's own name, which SQLAlchemy takes for a value that is to be inserted.
    return f"all_{name}"


def _keep_alive(connection: Any, _record: Any) -> None:
    # asyncpg offers no way to its socket, and some event loops give one that takes no options.
    transport = getattr(connection.driver_connection, "_transport", None)
    peer = transport.get_extra_info("socket") if transport else None
    if peer is None or peer.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
