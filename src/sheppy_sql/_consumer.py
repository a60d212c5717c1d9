"""Taking tasks out, and storing what became of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sheppy import BackendError

from . import _wakeups
from ._database import new_token
from ._payloads import Payload, decode, encode_task, moment
from ._stores import claims as claim_store
from ._validation import check_keys, check_limit, check_queue, check_timeout

if TYPE_CHECKING:
    from ._database import Database
    from ._options import Options
    from ._wakeups import Wakeups

logger = logging.getLogger("sheppy_sql")

RETRY_GRACE = 30.0
"""Seconds after a retry's time in which the worker may still schedule it itself."""


class Consumer:
    """pop, store_result and acknowledge of one backend instance, and the claims it holds."""

    def __init__(
        self, database: Database, wakeups: Wakeups, options: Options, *, owner: str
    ) -> None:
        self._database = database
        self._wakeups = wakeups
        self._options = options
        self._owner = owner
        self._claims: dict[tuple[str, str], int] = {}
        self._closed = False

    async def pop(self, queue: str, limit: int, timeout: float | None) -> list[Payload]:
        """Up to `limit` tasks, waiting up to `timeout` seconds for the first."""
        check_queue(queue)
        count, seconds = check_limit(limit, "limit"), check_timeout(timeout)
        if count <= 0:
            return []
        with self._wakeups.waiting([_wakeups.pending(queue)]) as waiter:
            taken = await _wakeups.poll(
                lambda _: self._claim(queue, count),
                waiter,
                timeout=_wakeups.wait_seconds(seconds, zero_means_forever=False),
                max_interval=self._options.max_poll_interval,
            )
        return taken or []

    async def store_result(self, queue: str, task: Payload) -> bool:
        """Store a task that ran; nothing changes where the claim on it was lost."""
        check_queue(queue)
        row = encode_task(task, self._options.max_payload_bytes)
        if "finished_at" not in task:
            raise ValueError("task has no 'finished_at': set it, to None if it is not finished")
        token = self._claims.get((queue, row.id))
        if token is None:
            self._refuse_other_queue(queue, row.id)
        if task["finished_at"]:
            ttl = self._options.ttl_for(row.status)
            stored = await self._database.write(
                "store a result", claim_store.finish, queue, row, token, ttl
            )
        else:
            stored = await self._database.write(
                "store a task", claim_store.set_aside, queue, row, token, _retry_in(task)
            )
        if not stored:
            logger.warning("Task %s was taken over or cleared: its result is dropped", row.id)
            return True
        self.forget(queue, row.id)
        if task["finished_at"]:
            self._wakeups.wake([_wakeups.finished(queue, row.id)])
        return True

    async def acknowledge(self, queue: str, ids: Sequence[str]) -> None:
        """End this instance's claims on tasks, leaving them as they are stored."""
        check_queue(queue)
        keys = [(queue, task_id) for task_id in check_keys(ids, "task id")]
        held = [(key[1], self._claims[key]) for key in keys if key in self._claims]
        if held:
            await self._database.write("acknowledge tasks", claim_store.end, queue, held)
        for task_id, _ in held:
            self.forget(queue, task_id)

    async def close(self) -> None:
        """Hand back what this instance still holds; whoever waits for tasks gets an error."""
        self._closed = True
        # A cancelled pop may have claimed and not yet have come to hear of it.
        await self._database.drain()
        await self._hand_back(None)

    def forget(self, queue: str, task_id: str) -> None:
        """End, for this instance, a claim that the database holds no longer."""
        self._claims.pop((queue, task_id), None)

    async def _claim(self, queue: str, limit: int) -> list[Payload] | None:
        if self._closed:
            raise BackendError("Failed to take tasks: the backend was disconnected meanwhile")
        if self._database.dialect.embedded and not await self._database.read(
            "look for tasks", claim_store.has_pending, queue
        ):
            return None
        token = new_token()
        try:
            claimed = await self._database.write(
                "take tasks", claim_store.claim, queue, limit, self._owner, token
            )
        except asyncio.CancelledError:
            # It may have been committed, and nobody will ever hear of it.
            await self._hand_back(token)
            raise
        self._claims.update({(queue, task_id): token for task_id, _ in claimed})
        return [decode(text) for _, text in claimed] or None

    async def _hand_back(self, token: int | None) -> None:
        """Return what one claim took, or all claims of this instance; never fails."""
        if self._closed and token is not None:
            return  # close() returns everything
        try:
            queues = await self._database.write(
                "hand back tasks", claim_store.release, self._owner, token
            )
        except BackendError as error:
            # The cancellation or the disconnect that brought us here must pass all the same.
            logger.warning("Tasks of %s may stay claimed: %s", self._owner, error)
        else:
            self._wakeups.wake([_wakeups.pending(queue) for queue in queues])

    def _refuse_other_queue(self, queue: str, task_id: str) -> None:
        for claimed_in, claimed_id in self._claims:
            if claimed_id == task_id and claimed_in != queue:
                raise BackendError(
                    "queue name mismatch: the task was popped from another queue than the one "
                    "its result is stored in"
                )


def _retry_in(task: Payload) -> float | None:
    """Seconds until a retrying task must run even if its worker never schedules it.

    By the duration that the worker chose, not by its clock. The worker of
    sheppy 0.0.7 does not schedule the last attempt at all.
    """
    if task.get("status") != "retrying":
        return None
    decided, due = moment(task.get("last_retry_at")), moment(task.get("next_retry_at"))
    delay = max((due - decided).total_seconds(), 0.0) if due and decided else 0.0
    config = task.get("config")
    retries, used = (config or {}).get("retry"), task.get("retry_count")
    is_last = isinstance(retries, int) and isinstance(used, int) and used >= retries
    return delay if is_last else delay + RETRY_GRACE
