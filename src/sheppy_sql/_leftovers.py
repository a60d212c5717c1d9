"""Claims that are to be handed back, and could not be yet or are not committed yet."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _wakeups
from ._stores import claims as claim_store

if TYPE_CHECKING:
    from ._database import Database
    from ._wakeups import Wakeups

LATEST_COMMIT = 600.0
"""Seconds after which a claim whose answer was lost is taken to have never been committed.

The server may be at its COMMIT for long, waiting for a disk or a standby, while the client has
gone on; the tasks then become ours though nobody here knows them.
"""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A claim of which something is to be handed back."""

    ids: Collection[str] | None
    """What; None for all."""
    kept: Collection[str]
    """What was handed out, and is none of it."""
    until: float
    """By the event loop's clock, when the last look for it may be."""


class Leftovers:
    """Those of one backend instance."""

    def __init__(self, database: Database, wakeups: Wakeups, *, owner: str) -> None:
        self._database = database
        self._wakeups = wakeups
        self._owner = owner
        self._by_token: dict[int, list[Leftover]] = {}

    def leave(
        self,
        token: int,
        ids: Collection[str] | None = None,
        *,
        kept: Collection[str] = (),
        late: bool = False,
    ) -> None:
        """Have a claim, or some `ids` of it but not those `kept`, be handed back.

        `late`: it may be committed only in a while.
        """
        now = asyncio.get_running_loop().time()
        leftover = Leftover(ids, kept, now + LATEST_COMMIT if late else now)
        self._by_token.setdefault(token, []).append(leftover)

    async def hand_back(self) -> None:
        """Hand back what there is; what fails is left for the next time, as is what may come."""
        for token in list(self._by_token):
            await self.hand_back_claim(token)

    async def hand_back_claim(self, token: int) -> None:
        """Hand back what there is of one claim."""
        left = self._by_token.get(token, [])
        for leftover in list(left):
            queues = await self._database.write(
                "hand back tasks",
                claim_store.release,
                self._owner,
                token,
                leftover.ids,
                leftover.kept,
            )
            self._wakeups.wake([_wakeups.pending(queue) for queue in queues])
            if leftover in left and asyncio.get_running_loop().time() >= leftover.until:
                left.remove(leftover)
        if not left:
            self._by_token.pop(token, None)
