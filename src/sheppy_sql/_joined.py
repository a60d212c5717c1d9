"""Operations in a transaction that belongs to the caller: joined, never begun or ended here."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from sheppy import BackendError
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from ._errors import joined_error
from ._transaction import Transaction

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.engine import RootTransaction
    from sqlalchemy.orm import Session as SyncSession

    from ._dialects import Dialect
    from ._transaction import Operation, Result
    from ._wakeups import Topic, Wakeups
    from .schema import Tables

P = ParamSpec("P")
T = TypeVar("T")

MOVING_SNAPSHOTS = frozenset({"READ COMMITTED", "READ UNCOMMITTED"})
COMMIT_POLL = 0.002  # seconds

# Ours are not the tables that an application's engine may translate.
AS_WRITTEN: Final = {"schema_translate_map": None}

_signals: weakref.WeakKeyDictionary[Any, dict[int, AfterCommit]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class JoinedTransaction(Transaction):
    """The caller's; what its engine is set to does not change our statements."""

    is_callers = True

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result:
        return await self.connection.execute(statement, parameters, execution_options=AS_WRITTEN)


class JoinedDatabase:
    """Carries out operations on the caller's session or connection, once and as they come.

    No commit, rollback, flush or repetition: an error leaves the transaction as the database
    leaves it.
    """

    def __init__(
        self, session: AsyncSession | AsyncConnection, tables: Tables, dialect: Dialect
    ) -> None:
        self.dialect = dialect
        self._session = session
        self._tables = tables
        # Of one transaction: it does not change from the first statement on.
        self._fixed: tuple[RootTransaction | None, bool] = (None, False)

    async def write(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        async with self._joined(action) as transaction:
            return await operation(transaction, *args, **kwargs)

    read = write

    @asynccontextmanager
    async def _joined(self, action: str) -> AsyncIterator[Transaction]:
        try:
            connection = (
                await self._session.connection()
                if isinstance(self._session, AsyncSession)
                else self._session
            )
            fixed = await self._check(action, connection)
            yield JoinedTransaction(connection, self._tables, self.dialect, fixed_snapshot=fixed)
        except Exception as error:
            if (told := joined_error(action, error)) is None:
                raise
            # From None: what SQLAlchemy and the driver say may quote payloads.
            raise told from None

    async def _check(self, action: str, connection: AsyncConnection) -> bool:
        """Whether the transaction has a fixed snapshot. BackendError: there is none to join."""
        embedded = connection.dialect.name == "sqlite"
        if embedded is not self.dialect.embedded:
            raise ValueError(
                f"The session is on {connection.dialect.name}, the backend is not: "
                "bind a session on the database that the backend uses"
            )
        raw = await connection.get_raw_connection()
        if _commits_by_itself(raw.dbapi_connection, raw.driver_connection, embedded=embedded):
            raise BackendError(
                f"Failed to {action}: the session commits each statement by itself (AUTOCOMMIT), "
                "so nothing can be enqueued together with it; give its engine another "
                "isolation level, or use the backend itself"
            )
        return False if embedded else await connection.run_sync(self._has_fixed_snapshot)

    def _has_fixed_snapshot(self, connection: Connection) -> bool:
        known_of, fixed = self._fixed
        if known_of is None or known_of is not connection.get_transaction():
            fixed = connection.get_isolation_level() not in MOVING_SNAPSHOTS
            self._fixed = (connection.get_transaction(), fixed)
        return fixed


class AfterCommit:
    """Signals that are held back until the caller's transaction is committed."""

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups
        self._topics: set[Topic] = set()
        self._told: set[Topic] = set()

    @classmethod
    def of(cls, session: AsyncSession | AsyncConnection, wakeups: Wakeups) -> AfterCommit:
        """The one of this session or connection; a second `bind` adds no second listener."""
        if isinstance(session, AsyncSession):
            return cls.on(session.sync_session, wakeups)
        if session.sync_connection is None:
            raise ValueError("The connection is not open: use it in `async with engine.begin()`")
        return cls.on(session.sync_connection, wakeups)

    @classmethod
    def on(cls, target: SyncSession | Connection, wakeups: Wakeups) -> AfterCommit:
        """The one of what SQLAlchemy's events tell of; a Connection's needs an event loop."""
        known = _signals.setdefault(target, {})
        if id(wakeups) not in known:
            signals = known[id(wakeups)] = cls(wakeups)
            if isinstance(target, Connection):
                event.listen(target, "commit", signals._at_commit)
                event.listen(target, "rollback", signals._forget)
            else:
                event.listen(target, "after_commit", signals._after_commit)
                event.listen(target, "after_rollback", signals._forget)
        return known[id(wakeups)]

    def wake(self, topics: Iterable[Topic], *, told: bool = False) -> None:
        """`told`: the transaction itself notifies the other processes."""
        (self._told if told else self._topics).update(topics)

    def _after_commit(self, session: SyncSession) -> None:
        if not session.in_nested_transaction():
            self._send()

    def _at_commit(self, connection: Connection) -> None:
        # A connection tells before its commit: looked at too early, nothing would be there.
        if (self._topics or self._told) and (
            transaction := connection.get_transaction()
        ) is not None:
            self._send_after(transaction)

    def _send_after(self, transaction: RootTransaction) -> None:
        if transaction.is_active:
            asyncio.get_running_loop().call_later(COMMIT_POLL, self._send_after, transaction)
        else:
            self._send()

    def _send(self) -> None:
        topics, self._topics = self._topics, set()
        told, self._told = self._told, set()
        if topics:
            self._wakeups.wake(topics)
        self._wakeups.wake(told, told=True)

    def _forget(self, _: object) -> None:
        self._topics.clear()
        self._told.clear()


def _commits_by_itself(adapted: Any, driver: Any, *, embedded: bool) -> bool:
    if embedded:
        # Where the driver begins nothing, somebody must have sent a BEGIN.
        return driver.isolation_level is None and not driver.in_transaction
    return getattr(adapted, "autocommit", False) is True
