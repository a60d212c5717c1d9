"""A connection to one installation: the only place that begins and commits."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sheppy import BackendError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import StaticPool
from sqlalchemy.util.concurrency import greenlet_spawn

from . import _engines
from ._attempts import Attempts
from ._connections import Connections
from ._transaction import OwnTransaction, Transaction, run
from ._turns import locked_file, turn_of

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

    from ._dialects import Dialect
    from ._transaction import Operation
    from .schema import Tables

P = ParamSpec("P")
T = TypeVar("T")

CANCELLED_PATIENCE = 5.0
"""Seconds for which a cancelled caller waits for its transaction to end."""


class Database:
    """Runs operations, each in a transaction of its own; lives in one process and event loop.

    `outage_grace` is for how many seconds each of them may outlast an outage; one that begins
    before anybody has `reached` the database is none.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tables: Tables,
        dialect: Dialect,
        *,
        outage_grace: float,
        reached: bool = False,
        is_ours: bool = False,
    ) -> None:
        """`is_ours`: nobody else takes connections from the engine."""
        self.engine = engine
        self._connections = Connections(engine, keeps=is_ours and not self.has_one_connection)
        self.tables = tables
        self.dialect = dialect
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._attempts = Attempts(self._loop, outage_grace, reached=reached)
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False
        # Waiting here is fair, waiting for SQLite's own lock is not.
        one_at_a_time = turn_of(engine, self._loop)
        at_will = contextlib.nullcontext()
        self._write_turn: AbstractAsyncContextManager[Any] = (
            one_at_a_time if dialect.embedded or self.has_one_connection else at_will
        )
        self._read_turn: AbstractAsyncContextManager[Any] = (
            one_at_a_time if self.has_one_connection else at_will
        )

    @property
    def is_in_memory(self) -> bool:
        """Whether it ends with this process, and no other sees it."""
        return self.dialect.embedded and self.has_one_connection

    @property
    def has_one_connection(self) -> bool:
        """Whether all transactions take turns on one."""
        return isinstance(self.engine.pool, StaticPool)

    @property
    def reached_for(self) -> float:
        """Seconds since when it has been known to be there without an outage."""
        return self._attempts.reached_for

    @property
    def is_usable(self) -> bool:
        """False after a fork, and once it or its event loop is closed."""
        return self._pid == os.getpid() and not self._closed and not self._loop.is_closed()

    @property
    def is_here(self) -> bool:
        """Whether it is usable, and in the running event loop."""
        return self.is_usable and asyncio.get_running_loop() is self._loop

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """In which all of this is done."""
        return self._loop

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
        """The outcome of `operation` once it is committed; BackendError names `action`.

        An operation is repeated after a conflict or an outage. Where `Transaction.repeated`
        says that it may have been committed already, it must find that out.
        """
        return await self.outcome(self.start(action, operation, *args, **kwargs))

    async def write_one(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`write` for an operation of one statement, which is one round trip where it may be."""
        self.check_turn(action)
        work = self.start_statement(action, lambda tx: operation(tx, *args, **kwargs))
        return await self.outcome(work)

    async def read(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `operation`, one statement that changes nothing, finds."""
        return await self.outcome(self.start_read(action, operation, *args, **kwargs))

    def start_read(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[T]:
        """`read` under way."""
        attempt = self._attempt(lambda tx: operation(tx, *args, **kwargs), write=False)
        return self._start(action, attempt)

    def start(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Task[T]:
        """`write` under way, for a caller who must know how it ends though it is cancelled."""
        self.check_turn(action)
        attempt = self._attempt(lambda tx: operation(tx, *args, **kwargs), write=True)
        return self._start(action, attempt)

    def start_statement(
        self,
        action: str,
        operation: Callable[[Transaction], Awaitable[T]],
        *,
        patient: bool = True,
        ended: Callable[[T | BaseException], None] | None = None,
    ) -> asyncio.Task[T]:
        """`start` for what changes rows by one statement, which needs no BEGIN and COMMIT.

        On a file it may be several: there they have a transaction all the same.

        Unless `patient`, LockedError where the statement's own lock timeout has ended it. `ended`
        hears of the end a moment earlier than the task's own callbacks, if it ever began.
        """
        attempt = self._attempt(operation, write=True, single=True)
        return self._start(action, attempt, patient=patient, ended=ended)

    async def converse(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`write` for what needs the AsyncConnection, or waits for more than its statements."""
        attempt = self._attempt(
            lambda tx: operation(tx, *args, **kwargs), write=True, converses=True
        )
        return await self.outcome(self._start(action, attempt))

    def check_turn(self, action: str) -> None:
        """BackendError where the caller would wait for a transaction of his own."""
        locked = locked_file()
        if locked is not None and self.dialect.embedded and self.engine.url.database == locked:
            raise BackendError(
                f"Failed to {action}: the transaction in which this task completes has the file, "
                "and this would wait for it; use Queue(backend.bind(tx)), or wait for its end"
            )

    def give_up(self, work: asyncio.Task[Any]) -> None:
        """Have what is under way not be tried again; its caller is gone."""
        self._attempts.give_up(work)

    async def drain(self) -> None:
        """Wait for the operations under way, cancelled callers' among them.

        None of them is tried again meanwhile.
        """
        self._attempts.leave()
        while self._running:
            await asyncio.wait(self._running)

    async def close(self) -> None:
        """Refuse new operations, and drain."""
        self._closed = True
        await self.drain()
        await self._connections.close()

    async def connect(self, action: str, engine: AsyncEngine) -> AsyncConnection:
        """A connection, as soon as there is one; for the caller to close."""
        opening = self._start(action, lambda _: _engines.connect(engine))
        try:
            return await self.outcome(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._close_unwanted)
            raise

    def track(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The work under way: it goes on though nobody waits for it, and `close` waits."""
        running = self._loop.create_task(work)
        self._running.add(running)
        running.add_done_callback(self._forget)
        return running

    @property
    def turn(self) -> asyncio.Lock | None:
        """What must be held by whoever writes on a connection of his own; None where nothing."""
        return self._write_turn if isinstance(self._write_turn, asyncio.Lock) else None

    def _start(
        self,
        action: str,
        attempt: Callable[[bool], Awaitable[T]],
        *,
        patient: bool = True,
        ended: Callable[[T | BaseException], None] | None = None,
    ) -> asyncio.Task[T]:
        self.check_loop()
        if self._closed:
            raise BackendError(f"Failed to {action}: the backend was disconnected meanwhile")
        # A task of its own: a cancelled caller must not cut a commit in half.
        work = self._attempts.repeat(action, attempt, patient=patient)
        return self.track(work if ended is None else _telling(work, ended))

    def _close_unwanted(self, opening: asyncio.Task[AsyncConnection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.track(opening.result().close())

    async def outcome(self, work: asyncio.Task[T]) -> T:
        """Of what is under way; a caller who is cancelled waits a moment for it."""
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.give_up(work)
            await asyncio.wait([work], timeout=CANCELLED_PATIENCE)
            raise

    def _forget(self, work: asyncio.Task[Any]) -> None:
        self._running.discard(work)
        self._attempts.forget(work)
        # Nobody may be left to hear of it.
        if not work.cancelled():
            work.exception()

    def _attempt(
        self,
        operation: Callable[[Transaction], Awaitable[T]],
        *,
        write: bool,
        single: bool = False,
        converses: bool = False,
    ) -> Callable[[bool], Awaitable[T]]:
        """One try at `operation` in a transaction of its own, to be called as often as needed."""
        begin = partial(self.dialect.begin, write=write, single=single)
        turn = self._write_turn if write else self._read_turn

        async def attempt(repeated: bool) -> T:
            async with turn:
                return await greenlet_spawn(self._carry_out, begin, operation, repeated)

        async def conversation(repeated: bool) -> T:
            async with turn, self._connections.lend_whole() as connection:
                await connection.run_sync(begin)
                transaction = Transaction(connection, self.tables, self.dialect, repeated)
                outcome = await operation(transaction)
                await connection.commit()
                return outcome

        return conversation if converses else attempt

    def _carry_out(
        self,
        begin: Callable[[Connection], bool],
        operation: Callable[[Transaction], Awaitable[T]],
        repeated: bool,
    ) -> T:
        with self._connections.lend() as connection:
            commits = begin(connection)
            transaction = OwnTransaction(
                connection,
                self.tables,
                self.dialect,
                repeated,
                fetch=self.dialect.fetcher(in_transaction=commits),
            )
            outcome = run(operation(transaction))
            if commits:
                connection.commit()
            return outcome


async def _telling(work: Awaitable[T], ended: Callable[[T | BaseException], None]) -> T:
    try:
        outcome = await work
    except BaseException as error:
        ended(error)
        raise
    ended(outcome)
    return outcome
