"""Tasks that complete in a transaction of their own."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from sheppy import BackendError, Task

from . import _unit
from ._completion import ACTION, Completion
from ._engines import abandon
from ._joined import JoinedDatabase
from ._payloads import encode_task
from ._stores import finishing
from ._turns import locking
from ._validation import check_queue

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from ._claims import Claims
    from ._database import Database
    from ._options import Options
    from ._payloads import Payload
    from ._unit import Unit
    from ._wakeups import Wakeups

_completers: weakref.WeakKeyDictionary[Wakeups, weakref.WeakSet[Completer]] = (
    weakref.WeakKeyDictionary()
)


class Claim(NamedTuple):
    queue: str
    task_id: str
    token: int


class Completer:
    """Opens the transactions in which the tasks of one backend instance complete."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        claims: Claims,
        options: Options,
        *,
        create_engine: Callable[..., AsyncEngine] | None,
        completed: Callable[[str, str, int], None],
    ) -> None:
        """`create_engine` makes one like the database's own, which is the application's if None.

        `completed` is told of each.
        """
        self._database = database
        self._wakeups = wakeups
        self._claims = claims
        self._options = options
        self._create_engine = create_engine
        self._completed = completed
        self._engine: AsyncEngine | None = None
        self._open: set[Claim] = set()
        _completers.setdefault(wakeups, weakref.WeakSet()).add(self)

    @asynccontextmanager
    async def complete(self, task: Task, queue: str | None) -> AsyncIterator[Completion]:
        """The session whose commit completes a task that this process runs."""
        if not isinstance(task, Task):
            raise ValueError(
                f"complete() needs the task itself, not {type(task).__name__}: give its function a "
                "parameter `current: Task = CURRENT_TASK`"
            )
        if queue is not None:
            check_queue(queue)
        if self._database.has_one_connection:
            raise BackendError(
                f"Failed to {ACTION}: there is one connection, as with ':memory:', which cannot be "
                "in two transactions at once; use a file, or an engine with a pool"
            )
        completer = self._holder_of(str(task.id), queue)
        async with completer._complete(task, completer._claim(str(task.id), queue)) as completion:
            yield completion

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.dispose()

    def abandon(self) -> None:
        """Leave the connections as they are: the event loop is closed, or they are the parent's."""
        if self._engine is not None:
            abandon(self._engine)

    @asynccontextmanager
    async def _complete(self, task: Task, claim: Claim) -> AsyncIterator[Completion]:
        unit = _unit.of(self._wakeups, claim.queue, claim.task_id)
        self._open.add(claim)
        try:
            connection = await self._database.connect(ACTION, self._pooled)
            completion = Completion(
                connection,
                task,
                self._database,
                max_bytes=self._options.max_payload_bytes,
                write_result=lambda session, payload: self._write(session, claim, payload, unit),
                has_completed=lambda: self._database.write(ACTION, finishing.has_finished, *claim),
                completed=lambda: self._completed(*claim),
            )
            try:
                await self._database.dialect.lend(connection)
                with locking(lambda: self._file_of(completion)):
                    try:
                        yield completion
                    except BaseException as error:
                        if not await completion._end(error):
                            raise
                    else:
                        await completion._end(None)
            finally:
                await self._database.outcome(self._database.track(completion._leave()))
                if unit is not None and not completion.is_completed:
                    unit.take_back()
        finally:
            self._open.discard(claim)

    async def _write(
        self, session: Completion, claim: Claim, payload: Payload, unit: Unit | None
    ) -> None:
        """Store the result in the session's transaction; BackendError: the claim is lost."""
        row = encode_task(payload, self._options.max_payload_bytes)
        children = unit.hand_over() if unit is not None else None
        database = JoinedDatabase(session, self._database.tables, self._database.dialect)
        stored = await database.write(
            ACTION,
            children.finish if children else finishing.finish,
            claim.queue,
            row,
            claim.token,
            self._options.ttl_for(payload),
        )
        if not stored:
            self._claims.lose(*claim)
            raise _lost(claim.task_id)

    @property
    def _pooled(self) -> AsyncEngine:
        if self._create_engine is None:
            return self._database.engine
        if self._engine is None:
            # Tasks that stay in their transactions for long must not keep the backend waiting.
            self._engine = self._create_engine(grows=True)
        return self._engine

    def _file_of(self, completion: Completion) -> str | None:
        """The file that is locked by a transaction, if it is."""
        return self._database.engine.url.database if completion._holds_turn else None

    def _holder_of(self, task_id: str, queue: str | None) -> Completer:
        """The backend instance, of those on this installation, that has taken the task.

        The worker's may be another than the application's: sheppy's command line makes its own.
        """
        if self._holds(task_id, queue):
            return self
        others = _completers.get(self._wakeups, weakref.WeakSet())
        here = (other for other in others if other._database.is_here)
        return next((other for other in here if other._holds(task_id, queue)), self)

    def _holds(self, task_id: str, queue: str | None) -> bool:
        held = self._claims.queues_of(task_id)
        return bool(held) if queue is None else queue in held

    def _claim(self, task_id: str, queue: str | None) -> Claim:
        queues = self._claims.queues_of(task_id) if queue is None else [queue]
        if len(queues) > 1:
            raise ValueError(
                f"Task {task_id} was taken from several queues, {', '.join(queues)}: say which one "
                "with complete(task, queue=...)"
            )
        token = self._claims.held(queues[0], task_id) if queues else None
        if token is None:
            if self._claims.is_completed(queue, task_id):
                raise BackendError(f"Failed to {ACTION}: {task_id} has been completed already")
            if self._claims.is_lost(task_id):
                raise _lost(task_id)
            raise BackendError(
                f"Failed to {ACTION}: {task_id} is none that a worker with this backend is running"
            )
        claim = Claim(queues[0], task_id, token)
        if claim in self._open:
            raise BackendError(f"Failed to {ACTION}: {task_id} is about to complete already")
        return claim


def _lost(task_id: str) -> BackendError:
    return BackendError(
        f"Failed to {ACTION}: {task_id} was retried, cleared or taken over meanwhile; nothing of "
        "it is stored"
    )
