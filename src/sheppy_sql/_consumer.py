"""Waiting for tasks, and handing them back."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sheppy import BackendError

from . import _waiting, _wakeups
from ._acknowledger import Acknowledger
from ._crowd import Crowd
from ._payloads import Payload, decode
from ._retries import LONGEST_DELAY
from ._stores import claims as claim_store
from ._stores import consumers as consumer_store
from ._stores import taking as taking_store
from ._taker import STAY_CLAIMED, Taker
from ._transaction import new_token
from ._validation import check_keys, check_limit, check_number, check_queue, check_timeout

if TYPE_CHECKING:
    from ._claims import Claims
    from ._database import Database
    from ._leftovers import Leftovers
    from ._storer import Storer
    from ._suspects import Suspects
    from ._transaction import Transaction
    from ._waiting import Pace
    from ._wakeups import Topic, Wakeups

logger = logging.getLogger("sheppy_sql")

RECENTLY = 0.25
"""Seconds for which nobody looks again into a queue that was empty, where nothing was heard of."""


class Emptiness(NamedTuple):
    """A look that found nothing."""

    at: float
    serial: int
    """Of the signals: another one now means that there was one since."""


class Consumer:
    """pop, acknowledge and the host's care for claims, of one backend instance."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        claims: Claims,
        suspects: Suspects,
        leftovers: Leftovers,
        storer: Storer,
        pace: Pace,
        *,
        queues: set[str],
        owner: str,
        begin: Callable[[], Awaitable[None]],
        host_decides: bool,
    ) -> None:
        """`queues` is told of each from which it takes tasks, or tries to.

        `begin` is called before anything is taken: from then on the owner must be alive.

        `host_decides`: the worker gives the signs of life, and says what is stale.
        """
        self._queues = queues
        self._database = database
        self._wakeups = wakeups
        self._pace = pace
        self._owner = owner
        self._begin = begin
        self._host_decides = host_decides
        self._claims = claims
        self._suspects = suspects
        self._storer = storer
        self._crowd = Crowd(wakeups)
        self._acknowledger = Acknowledger(database)
        self._empty: dict[str, Emptiness] = {}
        self._active = False
        self._taker = Taker(
            database, claims, suspects, leftovers, storer.finisher, owner=owner, begin=begin
        )

    async def pop(self, queue: str, limit: int, timeout: float | None) -> list[Payload]:
        """Up to `limit` tasks, waiting up to `timeout` seconds for the first."""
        check_queue(queue)
        count, seconds = check_limit(limit, "limit"), check_timeout(timeout)
        if count <= 0:
            return []
        wait = _waiting.wait_seconds(seconds, zero_means_forever=False)
        if wait > 0:
            await self._pace.check()
        await self._start()
        self._queues.add(queue)
        has_looked = False

        async def look(signals: set[Topic]) -> list[Payload] | None:
            nonlocal has_looked
            is_called = _wakeups.pending(queue) in signals
            seen = Emptiness(time.monotonic(), self._wakeups.serial)
            if signals and await self._crowd.give_way(queue):
                waiter.take_signals()
            # Where it has just been empty, or others are as likely to be first.
            look_first = queue in self._empty and not (is_called and self._crowd.is_alone(queue))
            taken = await self._taker.take(queue, count, look_first=look_first)
            if is_called:
                self._crowd.saw(queue, found=taken is not None)
            if taken is None and not has_looked and not (wait and self._suspects.seen_lately):
                # Once a call: whoever finds the queue empty may believe it.
                taken = await self._taker.take_unseen_suspect(queue)
            has_looked = True
            if taken is None:
                self._empty[queue] = seen
            else:
                self._empty.pop(queue, None)
            return taken

        with self._wakeups.waiting([_wakeups.pending(queue)]) as waiter:
            taken = await _waiting.poll(
                look,
                waiter,
                timeout=wait,
                pace=self._pace,
                look_first=not (wait and self._is_known_empty(queue)),
            )
        return taken or []

    def _is_known_empty(self, queue: str) -> bool:
        """Whether a look just now has found nothing, and nothing has been heard of since."""
        seen = self._empty.get(queue)
        return (
            seen is not None
            and self._pace.is_told
            and seen.serial == self._wakeups.serial
            and time.monotonic() - seen.at < RECENTLY
        )

    async def acknowledge(self, queue: str, ids: Sequence[str]) -> None:
        """End this instance's claims on tasks, leaving them as they are stored."""
        held = {
            task_id: token
            for task_id, token in self._held(queue, ids).items()
            if not self._claims.take_postponed(queue, task_id)
        }
        if held:
            await self._acknowledger.end(queue, held)
        for task_id, token in held.items():
            self._storer.end_claim(queue, task_id, token)

    async def heartbeat(self, queue: str, ids: Sequence[str]) -> None:
        """Keep those of the tasks that this instance holds from counting as stale."""
        if held := self._held(queue, ids):
            await self._acknowledger.renew(queue, held)

    async def get_stale(self, queue: str, min_idle_ms: float) -> list[Payload]:
        """Tasks that others took and have given no sign of for so long; now this instance's."""
        check_queue(queue)
        idle = check_number(min_idle_ms, "min_idle_ms") / 1000
        if idle < 0:
            raise ValueError("min_idle_ms must not be negative")
        await self._start()
        token = new_token()
        stale = await self._taker.claim_under(
            token,
            lambda tx: taking_store.take_over(
                tx,
                queue,
                min(idle, LONGEST_DELAY),
                self._owner,
                token,
                # Workers of an older sheppy know no heartbeats, and go on while it is replaced.
                spare_consumers=self._host_decides,
            ),
        )
        self._claims.take(queue, [task_id for task_id, _ in stale], token)
        return [decode(text) for _, text in stale]

    async def stop(self) -> None:
        """Take nothing more; whoever waits for tasks gets an error."""
        self._taker.close()
        self._wakeups.wake_here([_wakeups.pending(queue) for queue in self._queues])
        # A cancelled pop may have claimed and not yet have come to hear of it.
        await self._database.drain()

    async def hand_back_all(self) -> None:
        """Return what this instance still holds, and be known no more."""
        if not self._active:
            return
        try:
            queues = await self._database.write("hand back tasks", self._resign)
        except BackendError as error:
            # The disconnect that brought us here must pass all the same.
            logger.warning(STAY_CLAIMED, self._owner, error)
        else:
            self._wakeups.wake([_wakeups.pending(queue) for queue in queues])
        self._claims.lose_all()

    async def _start(self) -> None:
        self._active = True
        await self._begin()

    async def _resign(self, tx: Transaction) -> set[str]:
        queues = await claim_store.release(tx, self._owner, None)
        await consumer_store.remove(tx, self._owner)
        return queues

    def _held(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        check_queue(queue)
        wanted = check_keys(ids, "task id")
        tokens = ((task_id, self._claims.token(queue, task_id)) for task_id in wanted)
        return {task_id: token for task_id, token in tokens if token is not None}
