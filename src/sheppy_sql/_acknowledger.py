"""Ending and renewing claims without a result: those of many calls at once, where many come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, Batchers
from ._stores import claims as claim_store

if TYPE_CHECKING:
    from ._database import Database
    from ._transaction import Transaction

ACKNOWLEDGE, RENEW = "acknowledge tasks", "renew claims"

Held: TypeAlias = Mapping[str, int]
"""The tokens of claims, by the ids of their tasks."""
Act: TypeAlias = "Callable[[Transaction, str, Held, float], Awaitable[None]]"
"""Something that is done to claims of a queue; it waits so many seconds for a lock, at most."""


class Acknowledger:
    """Of one backend instance."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ending = self._batchers(ACKNOWLEDGE, claim_store.end)
        self._renewing = self._batchers(RENEW, claim_store.renew)

    async def end(self, queue: str, held: Held) -> None:
        """End claims, where they still hold, leaving the tasks as they are stored."""
        self._database.check_turn(ACKNOWLEDGE)
        await self._ending[queue].submit(held.keys(), held, len(held))

    async def renew(self, queue: str, held: Held) -> None:
        """Give a sign of life for claims, where they still hold."""
        self._database.check_turn(RENEW)
        await self._renewing[queue].submit(held.keys(), held, len(held))

    def _batchers(self, action: str, act: Act) -> Batchers[Held, None]:
        def start(
            queue: str,
            calls: Sequence[Held],
            patient: bool,
            ended: Callable[[Sequence[None] | BaseException], None],
        ) -> asyncio.Task[list[None]]:
            lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
            held = {task_id: token for call in calls for task_id, token in call.items()}

            async def act_on_all(tx: Transaction) -> list[None]:
                await act(tx, queue, held, lock_timeout)
                return [None] * len(calls)

            return self._database.start_statement(action, act_on_all, patient=False, ended=ended)

        return Batchers(start)
