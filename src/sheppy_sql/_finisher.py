"""Storing the results of tasks that ran to their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, Batchers
from ._stores import claims as claim_store
from ._stores.claims import Ended

if TYPE_CHECKING:
    import asyncio

    from ._database import Database
    from ._payloads import TaskRow
    from ._unit import Children

ACTION = "store a result"


class Finisher:
    """Moves tasks to the results: many in one statement, where many end at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._batchers: Batchers[Ended, bool] = Batchers(self._finish_all)

    async def finish(
        self,
        queue: str,
        row: TaskRow,
        token: int | None,
        ttl: float | None,
        children: Children | None,
    ) -> bool:
        """Whether the result is stored, as `claims.finish` says, with what the task enqueued."""
        if token is not None and children is None:
            self._database.check_turn(ACTION)
            ended = Ended(row, token, ttl)
            return await self._batchers[queue].submit([row.id], ended, len(row.payload))
        finish = children.finish if children else claim_store.finish
        return await self._database.write(ACTION, finish, queue, row, token, ttl)

    def _finish_all(
        self,
        queue: str,
        ended: Sequence[Ended],
        patient: bool,
        tell: Callable[[Sequence[bool] | BaseException], None],
    ) -> asyncio.Task[Sequence[bool]]:
        lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
        return self._database.start_statement(
            ACTION,
            lambda tx: claim_store.finish_all(tx, queue, ended, lock_timeout=lock_timeout),
            patient=False,
            ended=tell,
        )
