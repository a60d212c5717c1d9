"""Taking tasks out, and storing what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sheppy import BackendError

from . import _wakeups
from ._database import new_token
from ._payloads import Payload, decode, encode_task, moment
from ._stores import claims as claim_store
from ._validation import check_keys, check_limit, check_queue, check_timeout

if TYPE_CHECKING:
    from ._claims import Claims
    from ._database import Database
    from ._options import Options
    from ._wakeups import Wakeups

logger = logging.getLogger("sheppy_sql")

LONGEST_RETRY = 100 * 365 * 86_400.0  # seconds; beyond it, SQLite's calendar ends
RETRY_GRACE = 30.0
"""Seconds after a retry's time in which the worker may still schedule it itself."""


class Consumer:
    """pop, store_result and acknowledge of one backend instance."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        claims: Claims,
        options: Options,
        *,
        owner: str,
    ) -> None:
        self._database = database
        self._wakeups = wakeups
        self._options = options
        self._owner = owner
        self._claims = claims
        self._unheard: set[int] = set()  # tokens of claims whose outcome nobody has seen
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
        token = self._claims.token(queue, row.id)
        if token is None and self._claims.holds_elsewhere(queue, row.id):
            raise BackendError(
                "Failed to store a task: queue name mismatch, it was popped from another queue "
                "than the one its result is stored in"
            )
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
            self._claims.lose(queue, row.id, token)
            return True
        self._claims.end(queue, row.id, token)
        if task["finished_at"]:
            self._wakeups.wake([_wakeups.finished(queue, row.id)])
        return True

    async def acknowledge(self, queue: str, ids: Sequence[str]) -> None:
        """End this instance's claims on tasks, leaving them as they are stored."""
        check_queue(queue)
        tokens = {
            task_id: self._claims.token(queue, task_id) for task_id in check_keys(ids, "task id")
        }
        held = {task_id: token for task_id, token in tokens.items() if token is not None}
        if held:
            await self._database.write("acknowledge tasks", claim_store.end, queue, held)
        for task_id, token in held.items():
            self._claims.end(queue, task_id, token)

    async def close(self) -> None:
        """Hand back what this instance still holds; whoever waits for tasks gets an error."""
        self._closed = True
        # A cancelled pop may have claimed and not yet have come to hear of it.
        await self._database.drain()
        if self._claims.any_held or self._unheard:
            await self._hand_back(None)
        self._claims.lose_all()

    async def _claim(self, queue: str, limit: int) -> list[Payload] | None:
        if self._closed:
            raise BackendError("Failed to take tasks: the backend was disconnected meanwhile")
        if self._database.dialect.embedded and not await self._database.read(
            "look for tasks", claim_store.has_pending, queue
        ):
            return None
        token = new_token()
        self._unheard.add(token)
        claim = self._database.start(
            "take tasks", claim_store.claim, queue, limit, self._owner, token
        )
        try:
            claimed = await asyncio.shield(claim)
        except asyncio.CancelledError:
            # It may be committed, and nobody will ever hear of it. A task of its own, as
            # whoever cancelled once may do it again.
            await asyncio.wait([asyncio.create_task(self._hand_back_after(claim, token))])
            raise
        self._unheard.discard(token)
        self._claims.take(queue, [task_id for task_id, _ in claimed], token)
        return [decode(text) for _, text in claimed] or None

    async def _hand_back_after(self, claim: asyncio.Task[Any], token: int) -> None:
        while not claim.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([claim])
        await self._hand_back(token)

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
            if token is not None:
                self._unheard.discard(token)
            self._wakeups.wake([_wakeups.pending(queue) for queue in queues])


def _retry_in(task: Payload) -> float | None:
    """Seconds until a retrying task must run even if its worker never schedules it.

    By the duration that the worker chose, not by its clock. The worker of
    sheppy 0.0.7 does not schedule the last attempt at all.
    """
    if task.get("status") != "retrying":
        return None
    decided, due = moment(task.get("last_retry_at")), moment(task.get("next_retry_at"))
    delay = (due - decided).total_seconds() if due and decided else 0.0
    delay = min(max(delay, 0.0), LONGEST_RETRY)
    config = task.get("config")
    retries = config.get("retry") if isinstance(config, dict) else None
    used = task.get("retry_count")
    is_last = isinstance(retries, int) and isinstance(used, int) and used >= retries
    return delay if is_last else delay + RETRY_GRACE
