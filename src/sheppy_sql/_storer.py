"""Storing what became of tasks that ran."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from sheppy import BackendError

from . import _unit, _wakeups
from ._claims import Park
from ._finisher import Finisher
from ._payloads import Payload, TaskRow, TooLargeError, decode, encode_task, failure_of
from ._retries import retry_of
from ._stores import finishing, setting_aside
from ._stores import results as result_store
from ._stores import tasks as task_store
from ._validation import check_queue

if TYPE_CHECKING:
    from ._claims import Claims
    from ._database import Database
    from ._leftovers import Leftovers
    from ._options import Options
    from ._waiting import Pace
    from ._wakeups import Wakeups

logger = logging.getLogger("sheppy_sql")


class Storer:
    """store_result of one backend instance."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        claims: Claims,
        leftovers: Leftovers,
        options: Options,
        pace: Pace,
        *,
        queues: Collection[str],
    ) -> None:
        """`queues`: from which this instance takes tasks."""
        self._database = database
        self._wakeups = wakeups
        self._claims = claims
        self._leftovers = leftovers
        self._options = options
        self._queues = queues
        self.finisher = Finisher(database, wakeups, pace.carry)

    async def store_result(self, queue: str, task: Payload) -> bool:
        """Store a task that ran; nothing changes where the claim on it was lost."""
        check_queue(queue)
        children = _unit.end(self._wakeups, queue, task)
        if isinstance(task, dict) and self._claims.is_completed(queue, task.get("id")):
            # In a transaction of its own; what the worker makes of the rest of it does not count.
            self._expect_retry(queue, task["id"], task, None)
            return True
        try:
            row = encode_task(task, self._options.max_payload_bytes)
        except TooLargeError as error:
            await self._store_failure(queue, task, error)
            raise
        if "finished_at" not in task:
            raise ValueError("task has no 'finished_at': set it, to None if it is not finished")
        token = self._claims.token(queue, row.id)
        if token is None and self._claims.holds_elsewhere(queue, row.id):
            raise BackendError(
                "Failed to store a task: queue name mismatch, it was popped from another queue "
                "than the one its result is stored in"
            )
        try:
            if task["finished_at"]:
                ttl = self._options.ttl_for(task)
                stored = await self.finisher.finish(queue, row, token, ttl, children)
            else:
                stored = await self._set_aside(queue, row, task, token)
            if not stored and token is not None and await self._has_result(queue, row.id, token):
                # It has completed in a transaction of its own whose end nobody has heard of, or was
                # stored before a lock ended what it was stored with.
                self.end_claim(queue, row.id, token)
                self._wakeups.wake([_wakeups.finished(queue, row.id)])
                return True
        except BackendError:
            if token is not None:
                # Nobody will try again, and the claim would stay as long as this instance.
                self._leftovers.leave(token, [row.id])
                self._claims.lose(queue, row.id, token)
            raise
        if not stored:
            logger.warning("Task %s was taken over or cleared: its result is dropped", row.id)
            self._claims.lose(queue, row.id, token)
        else:
            self.end_claim(queue, row.id, token)
            if children:
                self._wakeups.wake(children.topics)
        return True

    def completed(self, queue: str, task_id: str, token: int) -> None:
        """Hear of a task whose own transaction has stored its result and ended its claim."""
        self.end_claim(queue, task_id, token)
        self._claims.complete(queue, task_id)
        self._wakeups.wake([_wakeups.finished(queue, task_id)])

    def end_claim(self, queue: str, task_id: str, token: int | None) -> None:
        """Forget the claim of a task that is stored, or was acknowledged."""
        held_suspect = self._claims.holds_suspect
        self._claims.end(queue, task_id, token)
        if held_suspect and not self._claims.holds_suspect:
            # Other tasks may be taken again.
            self._wakeups.wake_here([_wakeups.pending(queue) for queue in self._queues])

    async def _store_failure(self, queue: str, task: Payload, error: TooLargeError) -> None:
        """End a task whose result is too large as failed.

        The host only logs what `store_result` raises, and the task would never end.
        """
        task_id = task.get("id")
        token = self._claims.token(queue, task_id) if isinstance(task_id, str) else None
        if token is None or not isinstance(task_id, str) or not task.get("finished_at"):
            return
        before = await self._database.read("get tasks", task_store.get, queue, [task_id])
        if task_id not in before:
            return
        failed = failure_of(decode(before[task_id]), f"ResultTooLarge: {error}")
        # What is stored already is not refused for its size.
        row = encode_task(failed, len(before[task_id]) * 2 + 10_000)
        ttl = self._options.ttl_for(failed)
        await self._database.write("store a result", finishing.finish, queue, row, token, ttl)
        self.end_claim(queue, task_id, token)
        self._wakeups.wake([_wakeups.finished(queue, task_id)])

    async def _set_aside(self, queue: str, row: TaskRow, task: Payload, token: int | None) -> bool:
        retry = retry_of(task, self._options.handover)
        stored: bool = await self._database.write(
            "store a task",
            setting_aside.set_aside,
            queue,
            row,
            token,
            None if retry is None else retry.delay + retry.grace,
        )
        if token is not None:
            self._expect_retry(queue, row.id, task, token if stored else None)
        return stored

    def _expect_retry(self, queue: str, task_id: str, task: Payload, token: int | None) -> None:
        """If a task is to be retried: after a lost claim (None), what follows changes nothing."""
        retry = retry_of(task, self._options.handover)
        if retry is not None and retry.due is not None:
            self._claims.park(queue, task_id, Park(retry.due, token, retry.grace))

    async def _has_result(self, queue: str, task_id: str, token: int) -> bool:
        return await self._database.read(
            "get a result", result_store.is_of_claim, queue, task_id, token
        )
