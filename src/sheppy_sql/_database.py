"""A connection to one installation: the only place that begins, commits and retries."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import secrets
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar

from sheppy import BackendError
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import StaticPool
from sqlalchemy.util.concurrency import greenlet_spawn

from ._connections import Connections
from ._errors import (
    Fault,
    LockedError,
    backend_error,
    fault,
    is_driver_error,
    is_lock_timeout,
    is_starting,
)
from ._prepared import is_watched, prepare
from ._wakeups import sleep_until

if TYPE_CHECKING:
    from sqlalchemy import Connection, Executable, Pool
    from sqlalchemy.ext.asyncio import AsyncConnection

    from ._dialects import Dialect
    from ._prepared import Prepared
    from .schema import Tables

P = ParamSpec("P")
T = TypeVar("T")

CONFLICT_ATTEMPTS = 20
CONFLICT_PAUSE = 0.005  # seconds; grows with every attempt
OUTAGE_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds before each further attempt, the last for all that follow.

The first follows at once: it finds another connection where only the pooled one was gone.
"""
CANCELLED_PATIENCE = 5.0
"""Seconds for which a cancelled caller waits for its transaction to end."""


def new_token() -> int:
    """A number that marks what one call writes, known before the call is made.

    So what was written is found again though its answer was lost or never awaited.
    """
    return secrets.randbits(63)


class Result(Protocol):
    """What a store asks of a statement's result, whoever has carried it out."""

    @property
    def rowcount(self) -> int: ...

    def all(self) -> Sequence[Any]: ...

    def scalar(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Transaction:
    """What a store needs: where to execute, on which tables, in which dialect."""

    connection: AsyncConnection
    tables: Tables
    dialect: Dialect
    repeated: bool = False
    """Whether this was tried before an outage, and may be committed though nobody heard of it."""
    fixed_snapshot: bool = False
    """Whether a later statement may not see what others have committed meanwhile."""
    is_callers: ClassVar[bool] = False
    """Whether it goes on after what is done here, so that no setting may be left in it."""

    async def rows(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        """Rows, with the selected columns as attributes.

        `parameters`: of a statement that was made once and is carried out many times.
        """
        return (await self.execute(statement, parameters)).all()

    async def scalar(self, statement: Executable) -> Any:
        return (await self.execute(statement)).scalar()

    async def count(self, statement: Executable) -> int:
        """How many rows the statement changed."""
        return (await self.execute(statement)).rowcount

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result:
        return await self.connection.execute(statement, parameters)

    async def do(self, function: Callable[[Connection], T]) -> T:
        """What a function returns that is given the connection."""
        return await self.connection.run_sync(function)


@dataclass(frozen=True, slots=True)
class OwnTransaction(Transaction):
    """One that is carried out in a single greenlet: a coroutine that waits for statements only.

    Each step of an AsyncConnection has a greenlet of its own, and its end a task, which takes
    as long as most statements.
    """

    connection: Connection  # type: ignore[assignment]  # the stores see no more than `execute`
    statement_name: Callable[[], str] | None = None
    """Of the next statement that is to be kept on the connection; None where none may be."""

    async def rows(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Any]:
        if parameters is None or self.statement_name is None or is_watched(self.connection):
            return self.connection.execute(statement, parameters).all()
        made = self.tables.made
        if statement not in made:
            made[statement] = prepare(statement, self.connection.dialect)
        prepared: Prepared = made[statement]
        return prepared.fetch(self.connection, parameters, self.statement_name)

    async def execute(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Result:
        return self.connection.execute(statement, parameters)

    async def do(self, function: Callable[[Connection], T]) -> T:
        return function(self.connection)


_abandoned: list[Pool] = []

_locks: weakref.WeakKeyDictionary[Engine, tuple[asyncio.AbstractEventLoop, asyncio.Lock]] = (
    weakref.WeakKeyDictionary()
)

Operation = Callable[Concatenate[Transaction, P], Awaitable[T]]


class Operations(Protocol):
    """Where operations are carried out: in transactions of their own, or in the caller's."""

    @property
    def dialect(self) -> Dialect: ...

    async def write(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...

    async def read(
        self, action: str, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...


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
        self._connections = Connections(engine, keeps=is_ours and not dialect.embedded)
        self.tables = tables
        self.dialect = dialect
        self._outage_grace = outage_grace
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._running: set[asyncio.Task[Any]] = set()
        self._unwanted: set[asyncio.Task[Any]] = set()
        self._out_until = self._loop.time()
        self._reached = reached
        self._closed = False
        self._leaving = asyncio.Event()
        # Waiting here is fair, waiting for SQLite's own lock is not.
        one_at_a_time = _turns(engine, self._loop)
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
        return self._loop.time() - self._out_until

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
        self._unwanted.add(work)

    async def drain(self) -> None:
        """Wait for the operations under way, cancelled callers' among them.

        None of them is tried again meanwhile.
        """
        self._leaving.set()
        while self._running:
            await asyncio.wait(self._running)

    async def close(self) -> None:
        """Refuse new operations, and drain."""
        self._closed = True
        await self.drain()
        await self._connections.close()

    async def connect(self, action: str, engine: AsyncEngine) -> AsyncConnection:
        """A connection, as soon as there is one; for the caller to close."""
        opening = self._start(action, lambda _: _connect(engine))
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
        work = self._retry(action, attempt, patient=patient)
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
        self._unwanted.discard(work)
        # Nobody may be left to hear of it.
        if not work.cancelled():
            work.exception()

    async def _retry(
        self, action: str, attempt: Callable[[bool], Awaitable[T]], *, patient: bool
    ) -> T:
        """The only place that sees a driver's error."""
        conflicts = outages = 0
        gives_up_at = math.inf
        while True:
            try:
                # A conflict was rolled back: what it tried is certainly not committed.
                outcome = await attempt(outages > 0)
            except Exception as error:
                if not is_driver_error(error):
                    raise
                if not patient and is_lock_timeout(error):
                    raise LockedError from None
                now = self._loop.time()
                kind = fault(error)
                if kind is Fault.CONFLICT and conflicts < CONFLICT_ATTEMPTS - 1:
                    conflicts += 1
                    pause = CONFLICT_PAUSE * conflicts
                elif (
                    kind is Fault.OUTAGE
                    and now < gives_up_at
                    and self._rides_out(error, first=not outages)
                ):
                    # Counted from the first one: before, all was well.
                    gives_up_at = min(gives_up_at, now + self._outage_grace)
                    pause = OUTAGE_PAUSES[min(outages, len(OUTAGE_PAUSES) - 1)]
                    outages += 1
                    if outages > 1:  # else it was no more than a connection that had died
                        self._out_until = now
                else:
                    # From None: what SQLAlchemy and the driver say may quote payloads.
                    raise backend_error(action, error) from None
            else:
                self._reached = True
                if outages > 1:
                    self._out_until = self._loop.time()
                return outcome
            await sleep_until(self._leaving, pause * random.uniform(0.5, 1.5))  # noqa: S311

    def _rides_out(self, error: Exception, *, first: bool) -> bool:
        """Whether it is worth while to wait for the end of an outage.

        Once always: it may be no more than a connection that died in the pool.
        """
        unwanted = self._leaving.is_set() or asyncio.current_task() in self._unwanted
        if unwanted and not first:
            return False
        # Nobody has got through yet: it may as well be the wrong address.
        return self._reached or is_starting(error)

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
                # Where there is a transaction, SQLAlchemy begins it with its first statement.
                statement_name=None if commits else self.dialect.statement_name,
            )
            outcome = run(operation(transaction))
            if commits:
                connection.commit()
            return outcome


def run(waiting: Awaitable[T]) -> T:
    """The outcome of a coroutine that waits for nothing, as its statements block."""
    steps = waiting.__await__()
    try:
        next(steps)
    except StopIteration as end:
        outcome: T = end.value
        return outcome
    if hasattr(steps, "close"):
        steps.close()
    raise RuntimeError("Something of sheppy-sql waited where it must not; please report this")


def twin(engine: AsyncEngine) -> AsyncEngine:
    """An engine that connects as another does, outside its pool, for whatever event loop."""
    original = engine.sync_engine
    # The pool's own recipe, so that what the application does on connecting is done here too.
    return AsyncEngine(
        Engine(
            original.pool.recreate(),
            original.dialect,
            original.url,
            logging_name=original.logging_name,
            hide_parameters=True,
        )
    )


def abandon(engine: AsyncEngine) -> None:
    """Leave an engine's connections as they are: their event loop is closed, or the parent's."""
    # Kept: at its end a connection's transport would tell the selector, which a child shares with
    # its parent, and the parent would wait for ever.
    _abandoned.append(engine.sync_engine.pool)
    engine.sync_engine.dispose(close=False)


async def _connect(engine: AsyncEngine) -> AsyncConnection:
    return await engine.connect()


async def _telling(work: Awaitable[T], ended: Callable[[T | BaseException], None]) -> T:
    try:
        outcome = await work
    except BaseException as error:
        ended(error)
        raise
    ended(outcome)
    return outcome


def _no_file() -> None:
    return None


_locked_file: ContextVar[Callable[[], str | None]] = ContextVar(
    "sheppy_sql_locked_file", default=_no_file
)


def locked_file() -> str | None:
    """The SQLite file that a transaction of this very task has locked at this moment."""
    return _locked_file.get()()


@contextlib.contextmanager
def locking(file: Callable[[], str | None]) -> Iterator[None]:
    """Have `file` tell, in this context, what `locked_file` is."""
    before = _locked_file.get()
    _locked_file.set(file)
    try:
        yield
    finally:
        # Not by its token: whoever is cancelled may end elsewhere.
        _locked_file.set(before)


def _turns(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
    """The engine's own lock: two backends on one in-memory engine share its only connection."""
    made_in, lock = _locks.get(engine.sync_engine, (None, None))
    if made_in is not loop or lock is None:
        lock = asyncio.Lock()
        _locks[engine.sync_engine] = (loop, lock)
    return lock
