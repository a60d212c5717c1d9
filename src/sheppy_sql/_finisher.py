"""Storing the results of tasks that ran to their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import _wakeups
from ._batcher import LOCK_TIMEOUT, LONE_LOCK_TIMEOUT, Batchers
from ._stores import finishing
from ._stores.finishing import Ended

if TYPE_CHECKING:
    import asyncio

    from ._database import Database
    from ._payloads import TaskRow
    from ._transaction import Transaction
    from ._unit import Children
    from ._waiting import Notice
    from ._wakeups import Topic, Wakeups

ACTION = "store a result"


class Finisher:
    """Moves tasks to the results: many in one statement, where many end at a time."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        carry: Callable[[list[Topic]], Notice | None],
    ) -> None:
        """`carry` gives the notice that a statement is to send with its commit, if any."""
        self._database = database
        self._wakeups = wakeups
        self._carry = carry
        self._batchers: Batchers[Ended, bool] = Batchers(self._finish_all)

    async def finish(
        self,
        queue: str,
        row: TaskRow,
        token: int | None,
        ttl: float | None,
        children: Children | None,
    ) -> bool:
        """Whether the result is stored, as `finishing.finish` says, with what the task enqueued.

        Whoever waits for it hears of it.
        """
        if token is not None and children is None:
            self._database.check_turn(ACTION)
            ended = Ended(row, token, ttl)
            return await self._batchers[queue].submit([row.id], ended, len(row.payload))
        finish = children.finish if children else finishing.finish
        stored = await self._database.write(ACTION, finish, queue, row, token, ttl)
        if stored:
            self._wakeups.wake([_wakeups.finished(queue, row.id)])
        return stored

    def count(self, queue: str) -> int:
        """How many results of a queue's tasks are on their way together."""
        return self._batchers[queue].size

    async def until_stored(self, queue: str, timeout: float) -> None:
        """Wait until some of them are stored, or for so many seconds."""
        await self._batchers[queue].until_ended(timeout)

    def _finish_all(
        self,
        queue: str,
        ended: Sequence[Ended],
        patient: bool,
        tell: Callable[[Sequence[bool] | BaseException], None],
    ) -> asyncio.Task[list[bool]]:
        lock_timeout = LONE_LOCK_TIMEOUT if patient else LOCK_TIMEOUT
        is_lone = len(ended) == 1
        notice = self._carry([_wakeups.finished(queue, ended[0].row.id)]) if is_lone else None

        async def finish(tx: Transaction) -> list[bool]:
            return await finishing.finish_all(
                tx, queue, ended, lock_timeout=lock_timeout, notice=notice
            )

        def finished(outcome: list[bool] | BaseException) -> None:
            tell(outcome)
            if not isinstance(outcome, BaseException):
                pairs = zip(ended, outcome, strict=True)
                topics = [_wakeups.finished(queue, one.row.id) for one, stored in pairs if stored]
                self._wakeups.wake(topics, told=notice is not None)

        return self._database.start_statement(ACTION, finish, patient=False, ended=finished)
