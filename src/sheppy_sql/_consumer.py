"""Taking tasks, and handing them back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sheppy import BackendError

from . import _waiting, _wakeups
from ._acknowledger import Acknowledger
from ._crowd import Crowd
from ._database import CANCELLED_PATIENCE
from ._floors import Floors
from ._payloads import Payload, decode
from ._retries import LONGEST_DELAY
from ._stores import claims as claim_store
from ._stores import consumers as consumer_store
from ._suspects import Choice
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

GROUND = 0
"""Below every position."""


RECENTLY = 0.25
"""Seconds for which nobody looks again into a queue that was empty, where nothing was heard of."""


MOST_DELAY = 0.05
"""Seconds, for tasks that come while results are stored: longer than that takes, but in trouble."""


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
        self._floors = Floors(GROUND)
        self._taking = 0
        self._taking_suspect = False
        self._leftovers = leftovers
        self._storer = storer
        self._crowd = Crowd(wakeups)
        self._acknowledger = Acknowledger(database)
        self._empty: dict[str, Emptiness] = {}
        self._active = False
        self._closed = False

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
            taken = await self._take(queue, count, look_first=look_first)
            if is_called:
                self._crowd.saw(queue, found=taken is not None)
            if taken is None and not has_looked and not (wait and self._suspects.seen_lately):
                # Once a call: whoever finds the queue empty may believe it.
                taken = await self._take_unseen_suspect(queue)
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
        stale = await self._claim_under(
            token,
            lambda tx: claim_store.take_over(
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
        self._closed = True
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
            self._warn(error)
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

    async def _take(self, queue: str, limit: int, *, look_first: bool) -> list[Payload] | None:
        await self._begin()
        if self._closed:
            raise BackendError("Failed to take tasks: the backend was disconnected meanwhile")
        choice = self._suspects.choose(
            queue,
            free=self._is_free,
            holds_suspect=self._taking_suspect or self._claims.holds_suspect,
        )
        if choice is Choice.SUSPECT:
            taken = await self._claim(queue, 1, suspects=True)
            self._suspects.took(queue, found=taken is not None)
            if taken is not None:
                return taken
        elif choice is Choice.NOTHING:
            return None
        return await self._claim(queue, limit, suspects=False, look_first=look_first)

    async def _take_unseen_suspect(self, queue: str) -> list[Payload] | None:
        """A suspect of which this instance has not heard yet, if it may take one."""
        if not self._is_free or not await self._database.read(
            "look for tasks", claim_store.has_pending, queue, suspects=True
        ):
            return None
        # Another pop may have begun meanwhile.
        return await self._claim(queue, 1, suspects=True) if self._is_free else None

    @property
    def _is_free(self) -> bool:
        """Whether this instance holds nothing, and is about to hold nothing."""
        return not self._taking and not self._claims.any_held

    async def _claim(
        self, queue: str, limit: int, *, suspects: bool, look_first: bool = False
    ) -> list[Payload] | None:
        self._taking += 1
        self._taking_suspect |= suspects
        try:
            look_first |= self._database.dialect.embedded
            if look_first and not await self._is_any_pending(queue, suspects=suspects):
                return None
            token, look = new_token(), self._floors.look(queue)
            claimed = await self._claim_under(
                token,
                lambda tx: claim_store.claim(
                    tx, queue, limit, self._owner, token, look=look, suspects=suspects
                ),
                delay=partial(self._until_there_is_room, queue, limit),
            )
            look.keep()
            ids = [task_id for task_id, _ in claimed]
            self._claims.take(queue, ids, token, suspect=suspects)
            return [decode(text) for _, text in claimed] or None
        finally:
            self._taking -= 1
            if suspects:
                self._taking_suspect = False

    async def _is_any_pending(self, queue: str, *, suspects: bool) -> bool:
        look = None if suspects else self._floors.look(queue)
        found = await self._database.read(
            "look for tasks", claim_store.has_pending, queue, suspects=suspects, look=look
        )
        if look is not None:
            look.keep()
        return found

    async def _until_there_is_room(self, queue: str, limit: int, taken: int) -> None:
        """Wait a moment with tasks that a worker could not begin with yet.

        It asks for as many as it has slots, once it has given those to the tasks before, and so
        before they have taken them. Were it told now, it would not ask again until the tasks that
        it is told of have ended, and then wait for the next ones with nothing to do.
        """
        if not self._database.dialect.embedded and taken == limit <= self._storer.finisher.count(
            queue
        ):
            await self._storer.finisher.until_stored(queue, MOST_DELAY)

    async def _claim_under(
        self,
        token: int,
        operation: Callable[[Transaction], Awaitable[list[tuple[str, str]]]],
        delay: Callable[[int], Awaitable[None]] | None = None,
    ) -> list[tuple[str, str]]:
        """What the operation claims; handed back where nobody is there to hear of it.

        `delay` is awaited before, and told how many there are.
        """
        repeated = False

        async def watched(tx: Transaction) -> list[tuple[str, str]]:
            nonlocal repeated
            repeated = tx.repeated
            return await operation(tx)

        self._database.check_turn("take tasks")
        claim = self._database.start_statement("take tasks", watched)
        try:
            claimed = await asyncio.shield(claim)
            if delay is not None:
                await delay(len(claimed))
        except asyncio.CancelledError:
            self._database.give_up(claim)
            # It may be committed, and nobody will ever hear of it. A task of its own, as
            # whoever cancelled once may do it again.
            handing_back = asyncio.create_task(self._hand_back_after(claim, token))
            await asyncio.wait([handing_back], timeout=CANCELLED_PATIENCE)
            raise
        except BackendError:
            self._leftovers.leave(token, late=True)
            raise
        if repeated:
            # An earlier try may be at its COMMIT still.
            self._leftovers.leave(token, kept=[task_id for task_id, _ in claimed], late=True)
        return claimed

    async def _hand_back_after(self, claim: asyncio.Task[Any], token: int) -> None:
        while not claim.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([claim])
        if self._closed:
            return  # all is handed back
        failed = claim.cancelled() or claim.exception() is not None
        self._leftovers.leave(token, late=failed)
        try:
            await self._leftovers.hand_back_claim(token)
        except BackendError as error:
            # It stays a leftover, and the cancellation must pass all the same.
            self._warn(error)

    def _held(self, queue: str, ids: Sequence[str]) -> dict[str, int]:
        check_queue(queue)
        wanted = check_keys(ids, "task id")
        tokens = ((task_id, self._claims.token(queue, task_id)) for task_id in wanted)
        return {task_id: token for task_id, token in tokens if token is not None}

    def _warn(self, error: BackendError) -> None:
        logger.warning("Tasks of %s stay claimed for now: %s", self._owner, error)
