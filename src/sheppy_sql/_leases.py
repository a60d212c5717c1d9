"""Returning what dead workers had taken."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from . import _chores, _wakeups
from ._payloads import Payload, decode, encode_task, failure_of
from ._process import is_gone
from ._stores import claims as claim_store
from ._stores import consumers as consumer_store
from ._stores import finishing
from ._stores import taking as taking_store
from ._stores.consumers import Policy

if TYPE_CHECKING:
    from ._database import Database
    from ._options import Options
    from ._process import Process
    from ._suspects import Suspects
    from ._transaction import Transaction
    from ._wakeups import Wakeups

logger = logging.getLogger("sheppy_sql")

CHECKS_PER_LEASE = 12
SETTLING = 0.25
"""Share of a lease for which, after an outage, an expired lease says nothing.

Nobody could renew his, and those who live need a moment to do so.
"""
LONGEST_INTERVAL = 5.0  # seconds between two looks for dead workers
FAIL = "fail"
UNKNOWN_OWNERS, UNKNOWN_OWNERS_INTERVAL = "return claims of unknown owners", 60.0  # seconds


class Returned(NamedTuple):
    """What became of a dead worker's tasks: (queue, id) of each."""

    requeued: list[tuple[str, str]]
    failed: list[tuple[str, str]]


class Leases:
    """Looks for dead workers; for those of this machine by their processes as well."""

    def __init__(
        self,
        database: Database,
        wakeups: Wakeups,
        suspects: Suspects,
        options: Options,
        process: Process,
        *,
        owner: str,
        host_decides: bool,
    ) -> None:
        self._database = database
        self._wakeups = wakeups
        self._suspects = suspects
        self._options = options
        self._process = process
        self._owner = owner
        self._host_decides = host_decides
        self._unknown_due = 0.0
        self._looks_for_suspects = self._has_returned = False
        self.interval = min(options.lease / CHECKS_PER_LEASE, LONGEST_INTERVAL)

    async def reclaim(self) -> None:
        """Return the claims of those who died, and see which queues have suspects.

        The former only where the host has no say in it.
        """
        # Nobody outlives another in memory, and nobody gives signs of life there.
        if not self._host_decides and not self._database.is_in_memory:
            await self._reclaim_from_known()
            await self._reclaim_from_unknown_now_and_then()
        # Every other time: nobody dies so often, and what was just returned may be of them.
        self._looks_for_suspects = not self._looks_for_suspects
        if not self._looks_for_suspects and not self._has_returned:
            return
        self._has_returned = False
        queues = await self._database.read("look for suspects", taking_store.get_suspect_queues)
        self._suspects.saw(queues)
        # Whoever waits here may be the one that is free for them.
        self._wakeups.wake_here([_wakeups.pending(queue) for queue in queues])

    async def _reclaim_from_known(self) -> None:
        absentees = await self._database.read(
            "look for dead workers", consumer_store.get_absentees, self._owner, self._process
        )
        leases_tell = self._database.reached_for > self._options.lease * SETTLING
        for absentee in absentees:
            if is_gone(absentee.process):
                await self._return_claims(absentee.id, absentee.policy)
            elif absentee.expired and leases_tell:
                await self._return_claims(absentee.id, absentee.policy, known_by_its_lease=True)

    async def _reclaim_from_unknown_now_and_then(self) -> None:
        if time.monotonic() < self._unknown_due:
            return
        self._unknown_due = time.monotonic() + min(UNKNOWN_OWNERS_INTERVAL, self._options.lease)
        if await _chores.take(
            self._database, "look for unknown workers", UNKNOWN_OWNERS, UNKNOWN_OWNERS_INTERVAL
        ):
            await self._reclaim_from_unknown()

    async def _reclaim_from_unknown(self) -> None:
        owners = await self._database.read(
            "look for unknown workers", consumer_store.get_unknown_owners
        )
        for owner in owners:
            await self._return_claims(
                owner, Policy(self._options.on_crash, self._options.max_crashes)
            )

    async def _return_claims(
        self, owner: str, policy: Policy, *, known_by_its_lease: bool = False
    ) -> None:
        returned = await self._database.write(
            "return a dead worker's tasks", self._return, owner, policy, known_by_its_lease
        )
        if returned.requeued or returned.failed:
            self._has_returned = True
            logger.warning(
                "Worker %s died: of its tasks %d are taken again and %d have failed",
                owner,
                len(returned.requeued),
                len(returned.failed),
            )
        self._wakeups.wake(
            [_wakeups.pending(queue) for queue in {queue for queue, _ in returned.requeued}]
            + [_wakeups.finished(queue, task_id) for queue, task_id in returned.failed]
        )

    async def _return(
        self, tx: Transaction, owner: str, policy: Policy, known_by_its_lease: bool
    ) -> Returned:
        returned = Returned([], [])
        # It may have beaten since: an outage may lie between that look and this one.
        if known_by_its_lease and not await consumer_store.lock_expired(tx, owner):
            return returned
        for claim in await claim_store.lock_claims(tx, owner):
            crashes = claim.crashes + 1
            if policy.on_crash == FAIL or crashes >= policy.max_crashes:
                failed = _failed(decode(claim.payload), owner, crashes)
                row = encode_task(failed, len(claim.payload) * 2 + 10_000)
                ttl = self._options.ttl_for(failed)
                await finishing.finish(tx, claim.queue, row, claim.claim_token, ttl)
                returned.failed.append((claim.queue, claim.id))
            else:
                returned.requeued.append((claim.queue, claim.id))
        if returned.requeued:
            await claim_store.release_crashed(tx, owner, returned.requeued)
        return returned


def _failed(payload: Payload, owner: str, crashes: int) -> Payload:
    times = "" if crashes == 1 else f", the last of {crashes} that died so"
    return failure_of(payload, f"WorkerDied: worker {owner} died while it had this task{times}")
