"""Claiming tasks: how many, and which; and what nobody came to hear of is handed back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sheppy import BackendError

from ._database import CANCELLED_PATIENCE
from ._floors import Floors
from ._payloads import Payload, decode
from ._stores import taking as taking_store
from ._suspects import Choice
from ._transaction import new_token

if TYPE_CHECKING:
    from ._claims import Claims
    from ._database import Database
    from ._finisher import Finisher
    from ._leftovers import Leftovers
    from ._suspects import Suspects
    from ._transaction import Transaction

logger = logging.getLogger("sheppy_sql")

GROUND = 0
"""Below every position."""
MOST_DELAY = 0.05
"""Seconds, for tasks that come while results are stored: longer than that takes, but in trouble."""
DISCONNECTED = "Failed to take tasks: the backend was disconnected meanwhile"
STAY_CLAIMED = "Tasks of %s stay claimed for now: %s"


class Taker:
    """Of one backend instance."""

    def __init__(
        self,
        database: Database,
        claims: Claims,
        suspects: Suspects,
        leftovers: Leftovers,
        finisher: Finisher,
        *,
        owner: str,
        begin: Callable[[], Awaitable[None]],
    ) -> None:
        """`begin` is called before anything is taken: from then on the owner must be alive."""
        self._database = database
        self._claims = claims
        self._suspects = suspects
        self._leftovers = leftovers
        self._finisher = finisher
        self._owner = owner
        self._begin = begin
        self._floors = Floors(GROUND)
        self._taking = 0
        self._taking_suspect = False
        self._closed = False

    def close(self) -> None:
        """Take nothing more."""
        self._closed = True

    async def take(self, queue: str, limit: int, *, look_first: bool) -> list[Payload] | None:
        """Up to `limit` tasks, or a suspect alone; None where there is nothing to be had now.

        `look_first`: with a read, before anything is claimed.
        """
        await self._begin()
        if self._closed:
            raise BackendError(DISCONNECTED)
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

    async def take_unseen_suspect(self, queue: str) -> list[Payload] | None:
        """A suspect of which this instance has not heard yet, if it may take one."""
        if not self._is_free or not await self._database.read(
            "look for tasks", taking_store.has_pending, queue, suspects=True
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
            claimed = await self.claim_under(
                token,
                lambda tx: taking_store.claim(
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
            "look for tasks", taking_store.has_pending, queue, suspects=suspects, look=look
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
        # On SQLite nothing would be gained: the claim itself waits for those who write before it.
        may_wait = not self._database.dialect.embedded
        if may_wait and taken == limit <= self._finisher.count(queue):
            await self._finisher.until_stored(queue, MOST_DELAY)

    async def claim_under(
        self,
        token: int,
        operation: Callable[[Transaction], Awaitable[list[tuple[str, str]]]],
        delay: Callable[[int], Awaitable[None]] | None = None,
    ) -> list[tuple[str, str]]:
        """(id, payload) of what the operation claims, after `delay`, which is told how many.

        Handed back where nobody is there to hear of it.
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
            handing_back = asyncio.create_task(
                self._hand_back_after(claim, token, lambda: repeated)
            )
            await asyncio.wait([handing_back], timeout=CANCELLED_PATIENCE)
            raise
        except BackendError:
            self._leftovers.leave(token, late=True)
            raise
        if repeated:
            # An earlier try may be at its COMMIT still.
            self._leftovers.leave(token, kept=[task_id for task_id, _ in claimed], late=True)
        if self._closed:
            # Handed back, with all that is held; whoever ran it would run it twice.
            raise BackendError(DISCONNECTED)
        return claimed

    async def _hand_back_after(
        self, claim: asyncio.Task[Any], token: int, is_repeated: Callable[[], bool]
    ) -> None:
        while not claim.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([claim])
        if self._closed:
            return  # all is handed back
        failed = claim.cancelled() or claim.exception() is not None
        self._leftovers.leave(token, late=failed or is_repeated())
        try:
            await self._leftovers.hand_back_claim(token)
        except BackendError as error:
            # It stays a leftover, and the cancellation must pass all the same.
            logger.warning(STAY_CLAIMED, self._owner, error)
