"""A connection to one installation: the only place that begins, commits and retries."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sheppy import BackendError
from sqlalchemy import Engine
from sqlalchemy.pool import StaticPool

from ._errors import Fault, backend_error, fault, is_driver_error

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from ._dialects import Dialect
    from .schema import Tables

P = ParamSpec("P")
T = TypeVar("T")

CONFLICT_ATTEMPTS = 20
CONFLICT_PAUSE = 0.005  # seconds; grows with every attempt


def new_token() -> int:
    """A number that marks what one call writes, known before the call is made.

    So what was written is found again though its answer was lost or never awaited.
    """
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True)
class Transaction:
    """What a store needs: where to execute, on which tables, in which dialect."""

    connection: AsyncConnection
    tables: Tables
    dialect: Dialect

    async def rows(self, statement: Executable) -> Sequence[Any]:
        """Rows, with the selected columns as attributes."""
        return (await self.connection.execute(statement)).all()

    async def scalar(self, statement: Executable) -> Any:
        return (await self.connection.execute(statement)).scalar()

    async def count(self, statement: Executable) -> int:
        """How many rows the statement changed."""
        return (await self.connection.execute(statement)).rowcount

    async def execute(self, statement: Executable) -> None:
        await self.connection.execute(statement)


_locks: weakref.WeakKeyDictionary[Engine, tuple[asyncio.AbstractEventLoop, asyncio.Lock]] = (
    weakref.WeakKeyDictionary()
)

Operation = Callable[Concatenate[Transaction, P], Awaitable[T]]


class Database:
    """Runs operations, each in a transaction of its own; lives in one process and event loop."""

    def __init__(self, engine: AsyncEngine, tables: Tables, dialect: Dialect) -> None:
        self.engine = engine
        self.tables = tables
        self.dialect = dialect
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False
        # Waiting here is fair, waiting for SQLite's own lock is not.
        one_at_a_time = _turns(engine, self._loop)
        at_will = contextlib.nullcontext()
        self._write_turn: AbstractAsyncContextManager[Any] = (
            one_at_a_time if dialect.embedded else at_will
        )
        self._read_turn: AbstractAsyncContextManager[Any] = (
            one_at_a_time if isinstance(engine.pool, StaticPool) else at_will
        )

    @property
    def is_usable(self) -> bool:
        """False after a fork, and once it or its event loop is closed."""
        return self._pid == os.getpid() and not self._closed and not self._loop.is_closed()

    def check_loop(self) -> None:
        """Raise BackendError in any event loop but the one that connected."""
        if asyncio.get_running_loop() is not self._loop:
            raise BackendError(
                "This backend is connected in another running event loop: use one SqlBackend "
                "for each event loop"
            )

    async def write(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The outcome of `operation` once it is committed; BackendError names `action`."""
        return await self._outcome(self.start(action, operation, *args, **kwargs))

    async def read(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `operation`, one statement that changes nothing, finds."""
        attempt = self._attempt(operation, False, *args, **kwargs)
        return await self._outcome(self._start(action, attempt))

    def start(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[T]:
        """`write` under way, for a caller who must know how it ends though it is cancelled."""
        return self._start(action, self._attempt(operation, True, *args, **kwargs))

    async def drain(self) -> None:
        """Wait for the operations under way, cancelled callers' among them."""
        while self._running:
            await asyncio.wait(self._running)

    async def close(self) -> None:
        """Refuse new operations, and drain."""
        self._closed = True
        await self.drain()

    def _start(self, action: str, attempt: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        self.check_loop()
        if self._closed:
            raise BackendError(f"Failed to {action}: the backend was disconnected meanwhile")
        # A task of its own: a cancelled caller must not cut a commit in half.
        work = self._loop.create_task(self._retry(action, attempt))
        self._running.add(work)
        work.add_done_callback(self._forget)
        return work

    async def _outcome(self, work: asyncio.Task[T]) -> T:
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    def _forget(self, work: asyncio.Task[Any]) -> None:
        self._running.discard(work)
        # Nobody may be left to hear of it.
        if not work.cancelled():
            work.exception()

    async def _retry(self, action: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The only place that sees a driver's error."""
        tries = 0
        while True:
            tries += 1
            try:
                return await attempt()
            except Exception as error:
                if not is_driver_error(error):
                    raise
                if fault(error) is not Fault.CONFLICT or tries == CONFLICT_ATTEMPTS:
                    # From None: what SQLAlchemy and the driver say may quote payloads.
                    raise backend_error(action, error) from None
            await asyncio.sleep(CONFLICT_PAUSE * tries * random.uniform(0.5, 1.5))  # noqa: S311

    def _attempt(
        self, operation: Operation[P, T], write: bool, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], Awaitable[T]]:
        """One try at `operation` in a transaction of its own, to be called as often as needed."""

        async def attempt() -> T:
            turn = self._write_turn if write else self._read_turn
            async with turn, self.engine.connect() as connection:
                await self.dialect.begin(connection, write=write)
                transaction = Transaction(connection, self.tables, self.dialect)
                outcome = await operation(transaction, *args, **kwargs)
                await connection.commit()
                return outcome

        return attempt


def _turns(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
    """The engine's own lock: two backends on one in-memory engine share its only connection."""
    made_in, lock = _locks.get(engine.sync_engine, (None, None))
    if made_in is not loop or lock is None:
        lock = asyncio.Lock()
        _locks[engine.sync_engine] = (loop, lock)
    return lock
