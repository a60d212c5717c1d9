"""The transaction in which a task completes, as its function sees it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sheppy import BackendError
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession

from ._errors import Fault, backend_error, fault, is_driver_error, joined_error
from ._greenlets import await_
from ._payloads import encode_task

if TYPE_CHECKING:
    from sheppy import Task
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.orm import Session as SyncSession
    from sqlalchemy.orm import SessionTransaction

    from ._database import Database
    from ._payloads import Payload

ACTION = "complete a task"


class Stage(enum.Enum):
    OPEN = enum.auto()
    ENDING = enum.auto()
    """The result is written, and the COMMIT may be under way."""
    COMPLETED = enum.auto()


class Completion(AsyncSession):
    """The session that `SqlBackend.complete` gives: its commit completes the task.

    All that SQLAlchemy's AsyncSession can do, on one connection. Committed is once, by leaving the
    block or by `commit()`; what is done before a `rollback()` is gone, and the task not completed
    by that. Objects stay readable after the commit.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        task: Task,
        database: Database,
        *,
        max_bytes: int,
        write_result: Callable[[Completion, Payload], Awaitable[None]],
        has_completed: Callable[[], Awaitable[bool]],
        completed: Callable[[], None],
    ) -> None:
        """`write_result` raises BackendError where the claim is lost.

        `has_completed` finds out, after an answer was lost; `completed` is told.
        """
        super().__init__(connection, expire_on_commit=False)
        self._own_connection = connection
        self._task = task
        self._database = database
        self._max_bytes = max_bytes
        self._write_result = write_result
        self._has_completed = has_completed
        self._completed = completed
        self._stage = Stage.OPEN
        self._payload: Payload | None = None
        self._committing: asyncio.Task[None] | None = None
        self._holds_turn = False
        event.listen(self.sync_session, "after_begin", self._after_begin)
        event.listen(self.sync_session, "before_commit", self._before_commit)
        event.listen(self.sync_session, "after_commit", self._after_commit)
        event.listen(self.sync_session, "after_transaction_end", self._after_end)

    def set_result(self, value: Any) -> None:
        """The task's result, None where it is never set; checked as a returned value is.

        Raises pydantic's ValidationError where the value does not fit the annotation of the
        function, and ValueError where it is too large.
        """
        payload = completed_task(self._task, value)
        encode_task(payload, self._max_bytes)
        self._payload = payload

    async def commit(self) -> None:
        """Store the rows and the result, and end the claim; leaving the block does it too.

        BackendError where the claim was lost, where the task was completed before, or where nobody
        can tell whether it has been; then nothing is stored, or (the last) all may be.
        """
        self._check_open()
        self._committing = self._database.track(self._commit())
        await self._database.outcome(self._committing)

    @property
    def is_completed(self) -> bool:
        return self._stage is Stage.COMPLETED

    async def _end(self, error: BaseException | None) -> bool:
        """At the end of the block; whether what it raised (None: nothing) is settled."""
        await self._commit_has_ended()
        if error is None:
            if not self.is_completed:
                await self.commit()
        elif self._stage is Stage.ENDING and isinstance(error, Exception):
            # By a commit that SQLAlchemy made, as at the end of `async with tx.begin()`.
            await self._database.outcome(self._database.track(self._settle(error)))
            return True
        return False

    async def _leave(self) -> None:
        """Roll back what is not committed, and give the connection back."""
        await self._commit_has_ended()
        try:
            await self.close()
        except Exception as error:
            if not is_driver_error(error):
                raise
            await self._own_connection.invalidate()
        finally:
            if not self._database.is_usable and not self._own_connection.invalidated:
                # There is no pool any more that would close it.
                await self._own_connection.invalidate()
            await self._own_connection.close()
            self._release_turn()

    async def _commit_has_ended(self) -> None:
        if self._committing is not None and not self._committing.done():
            # Whoever began it was cancelled.
            await asyncio.wait([self._committing])

    async def _commit(self) -> None:
        try:
            await super().commit()
        except Exception as error:
            if self._stage is not Stage.ENDING:
                raise
            await self._settle(error)

    async def _settle(self, error: Exception) -> None:
        """Return if the COMMIT that ended in this error was one; raise what the caller is told."""
        if not is_driver_error(error) or fault(error) is Fault.OTHER:
            self._stage = Stage.OPEN
            raise error
        if fault(error) is Fault.CONFLICT:
            self._stage = Stage.OPEN
            told = joined_error(ACTION, error)
            raise (told or error) from None
        if not self._own_connection.invalidated:
            await self._own_connection.invalidate()
        if not await self._has_completed():
            self._stage = Stage.OPEN
            # From None: what SQLAlchemy and the driver say may quote payloads.
            raise backend_error(ACTION, error) from None
        self._now_completed()

    def _check_open(self) -> None:
        if self._stage is Stage.COMPLETED:
            raise BackendError(
                f"Failed to {ACTION}: it has been completed; what is to be written with it must be "
                "written before"
            )
        if self._stage is Stage.ENDING:
            raise BackendError(f"Failed to {ACTION}: it is not known whether it was committed")

    def _before_commit(self, session: SyncSession) -> None:
        if session.in_nested_transaction():
            return
        self._check_open()
        session.flush()
        await_(self._write())
        self._stage = Stage.ENDING

    async def _write(self) -> None:
        # As late as can be, since until the end it is locked.
        payload = self._payload or completed_task(self._task, None)
        now = {"finished_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")}
        await self._write_result(self, {**payload, **now})

    def _after_commit(self, session: SyncSession) -> None:
        if not session.in_nested_transaction():
            self._now_completed()

    def _now_completed(self) -> None:
        self._stage = Stage.COMPLETED
        # Nothing that is written now would ever be committed.
        self.sync_session.autobegin = False
        # The worker has this very task, and asks it whether to retry what fails after this.
        self._task.__dict__["config"] = self._task.config.model_copy(update={"retry": 0})
        self._completed()

    def _after_begin(
        self, _: SyncSession, transaction: SessionTransaction, connection: Connection
    ) -> None:
        if transaction.nested:
            return
        if (turn := self._database.turn) is not None:
            await_(turn.acquire())
            self._holds_turn = True
        self._database.dialect.begin_lent(connection)

    def _after_end(self, _: SyncSession, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            self._release_turn()

    def _release_turn(self) -> None:
        if self._holds_turn and self._database.turn is not None:
            self._holds_turn = False
            self._database.turn.release()


def completed_task(task: Task, result: Any) -> Payload:
    """The task as sheppy's worker would store it, had its function returned this.

    The model itself holds the result against the annotation of the function.
    """
    ended = {"status": "completed", "result": result, "error": None}
    finished = {"finished_at": datetime.now(timezone.utc)}
    checked = type(task).model_validate({**task.model_dump(mode="json"), **ended, **finished})
    payload: Payload = checked.model_dump(mode="json")
    return payload
