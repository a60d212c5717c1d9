"""Storing the results of tasks that ran to their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import _wakeups
from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, Batchers
from ._stores import finishing
from ._stores.finishing import Ended

if TYPE_CHECKING:
    import asyncio

    from ._database import Database, Transaction
    from ._payloads import TaskRow
    from ._unit import Children
    from ._wakeups import Notice, Topic

ACTION = "store a result"


class Finish(NamedTuple):
    """How a task ended."""

    stored: bool
    told: bool
    """Whether the other processes were told with it."""


class Finisher:
    """Moves tasks to the results: many in one statement, where many end at a time."""

    def __init__(self, database: Database, carry: Callable[[list[Topic]], Notice | None]) -> None:
        """`carry` gives the notice that a statement is to send with its commit, if any."""
        self._database = database
        self._carry = carry
        self._batchers: Batchers[Ended, Finish] = Batchers(self._finish_all)

    async def finish(
        self,
        queue: str,
        row: TaskRow,
        token: int | None,
        ttl: float | None,
        children: Children | None,
    ) -> Finish:
        """Whether the result is stored, as `finishing.finish` says, with what the task enqueued."""
        if token is not None and children is None:
            self._database.check_turn(ACTION)
            ended = Ended(row, token, ttl)
            return await self._batchers[queue].submit([row.id], ended, len(row.payload))
        finish = children.finish if children else finishing.finish
        stored = await self._database.write(ACTION, finish, queue, row, token, ttl)
        return Finish(stored, told=False)

    def _finish_all(
        self,
        queue: str,
        ended: Sequence[Ended],
        patient: bool,
        tell: Callable[[Sequence[Finish] | BaseException], None],
    ) -> asyncio.Task[Sequence[Finish]]:
        lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
        is_lone = len(ended) == 1
        notice = self._carry([_wakeups.finished(queue, ended[0].row.id)]) if is_lone else None

        async def finish(tx: Transaction) -> list[Finish]:
            stored = await finishing.finish_all(
                tx, queue, ended, lock_timeout=lock_timeout, notice=notice
            )
            return [Finish(one, told=notice is not None) for one in stored]

        return self._database.start_statement(ACTION, finish, patient=False, ended=tell)
