"""Storing the results of tasks that ran to their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._batcher import Batchers
from ._stores import finishing
from ._stores.finishing import Ended

if TYPE_CHECKING:
    import asyncio

    from ._database import Database
    from ._payloads import TaskRow
    from ._unit import Children

ACTION = "store a result"
LOCK_TIMEOUT = 0.05
"""Seconds for which results that go together wait for a row that somebody else has locked."""
LONE_LOCK_TIMEOUT = 0.2
"""Seconds for which a result that goes singly does, before it is the next one's turn."""


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
        """Whether the result is stored, as `finishing.finish` says, with what the task enqueued."""
        if token is not None and children is None:
            self._database.check_turn(ACTION)
            ended = Ended(row, token, ttl)
            return await self._batchers[queue].submit(row.id, ended, len(row.payload))
        finish = children.finish if children else finishing.finish
        return await self._database.write(ACTION, finish, queue, row, token, ttl)

    def _finish_all(
        self, queue: str, ended: Sequence[Ended], patient: bool
    ) -> asyncio.Task[Sequence[bool]]:
        lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
        return self._database.start_statement(
            ACTION,
            lambda tx: finishing.finish_all(tx, queue, ended, lock_timeout=lock_timeout),
            patient=False,
        )
