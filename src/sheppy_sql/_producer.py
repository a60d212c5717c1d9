"""Putting tasks in: at once, for later, and those whose time has come."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from . import _unit, _wakeups
from ._appender import append_by_itself
from ._floors import Floors
from ._payloads import Payload, TaskRow, decode, encode_task
from ._stores import due as due_store
from ._stores import queues as queue_store
from ._stores import scheduled as schedule_store
from ._stores import setting_aside
from ._stores import tasks as task_store
from ._stores.receipts import once
from ._transaction import new_token
from ._validation import check_moment, check_queue
from .schema import PENDING, SCHEDULED

if TYPE_CHECKING:
    from ._appender import AppendNew
    from ._claims import Claims
    from ._options import Options
    from ._transaction import Operations, Transaction
    from ._wakeups import Signals

GROUND = datetime.min.replace(tzinfo=timezone.utc)
"""Before every time that a task can have."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A task that this instance has popped from the schedule and not yet appended."""

    token: int
    payload: str

    def is_kept_by(self, row: TaskRow) -> bool:
        """Whether an append is the promised one: the same task, now pending.

        Anything else is somebody's retry, which must not depend on a lease.
        """
        return json.dumps({**decode(self.payload), "status": "pending"}) == row.payload


class Held(NamedTuple):
    """What an instance holds of a task: the token of a claim, a lease, or neither."""

    task_id: str
    claim: int | None
    lease: Lease | None


class Producer:
    """append, schedule and pop_scheduled of one backend instance."""

    def __init__(
        self,
        database: Operations,
        wakeups: Signals,
        claims: Claims,
        options: Options,
        *,
        append_new: AppendNew | None = None,
        registers: bool = True,
    ) -> None:
        """`append_new` is how new tasks are appended, if not one call by itself.

        `registers`: whether a queue is made known with its first task. The row would be locked
        until the transaction ends, and with it every other first task.
        """
        self._append_in_line = append_new or partial(append_by_itself, database)
        self._registers = registers
        self._database = database
        self._wakeups = wakeups
        self._claims = claims
        self._max_bytes = options.max_payload_bytes
        self._handover = options.handover
        self._known_queues: set[str] = set()
        self._floors = Floors(GROUND)
        self._leases: dict[tuple[str, str], Lease] = {}

    async def append(self, queue: str, tasks: Sequence[Payload], *, unique: bool) -> list[bool]:
        """Put tasks in line; which of them were taken, in the caller's order."""
        check_queue(queue)
        if not isinstance(tasks, (list, tuple)):
            raise ValueError(f"tasks must be a list, not {type(tasks).__name__}")
        rows = [encode_task(task, self._max_bytes) for task in tasks]
        if not rows and queue in self._known_queues:
            return []  # as the host's scheduler asks for every second
        if unique and (unit := _unit.for_children(self._wakeups, tasks)):
            held_back = await unit.take(self._database, queue, rows)
            if held_back is not None:
                return held_back
        if unique:
            return await self._append_new(queue, rows)
        await self._append_again(queue, rows)
        return [True] * len(rows)

    async def schedule(self, queue: str, task: Payload, at: datetime, *, unique: bool) -> bool:
        """Have a task become due at `at`; False where `unique` and its id is taken."""
        check_queue(queue)
        row, run_at = encode_task(task, self._max_bytes), check_moment(at, "at")
        if unique and (unit := _unit.for_children(self._wakeups, [task])):
            held_back = await unit.take(self._database, queue, [row], run_at)
            if held_back is not None:
                return held_back[0]
        # Crons are offered again and again: where one transaction writes at a time, look first.
        look_first = unique and self._database.dialect.embedded
        if look_first and await self._database.read(
            "look for a task", task_store.exists, queue, row.id
        ):
            return False
        if not unique and (followed := self._follow_up(queue, row, run_at)) is not None:
            await followed
            return True
        held = self._held(queue, [row])
        scheduled = await self._database.write(
            "schedule a task", self._schedule, queue, row, run_at, unique, new_token()
        )
        if not unique:
            self._supersede(queue, held)
        self._known_queues.add(queue)
        return scheduled

    def _follow_up(self, queue: str, row: TaskRow, run_at: datetime) -> Awaitable[None] | None:
        """What a call of schedule does that the host's worker makes of a task it has taken.

        It may come late, when the task is another's already: then it must do nothing, other than
        somebody's wish to run the task again. And the worker's clock may be wrong, so the
        database's decides by the duration.
        """
        if park := self._claims.take_park(queue, row.id, run_at):
            if park.token is None:
                return _nothing()
            return self._database.write(
                "schedule a retry", schedule_store.unpark, queue, row, park.token, park.grace
            )
        slot, token = self._claims.take_slot(queue, row.id), self._claims.token(queue, row.id)
        if slot is None or token is None or row.status != "scheduled":
            return None
        return self._postpone(queue, row, token, slot)

    async def _postpone(self, queue: str, row: TaskRow, token: int, slot: datetime) -> None:
        await self._database.write(
            "postpone a task", setting_aside.postpone, queue, row, token, slot, new_token()
        )
        self._claims.postpone(queue, row.id, token)

    async def pop_scheduled(self, queue: str, now: datetime | None) -> list[Payload]:
        """Tasks that are due, the earliest first; an append of them is expected to follow."""
        check_queue(queue)
        moment = None if now is None else check_moment(now, "now")
        look = self._floors.look(queue)
        # Most of the time there is nothing: a statement that writes nothing finds that out.
        is_due = await self._database.read(
            "look for due tasks", due_store.is_any_due, queue, moment, look
        )
        look.keep()
        if not is_due:
            return []
        token = new_token()
        due = await self._database.write(
            "take due tasks", due_store.lease, queue, moment, token, self._handover, look
        )
        self._leases.update({(queue, task_id): Lease(token, text) for task_id, text in due})
        return [decode(text) for _, text in due]

    async def clear(self, queue: str) -> int:
        """Empty a queue; how many tasks and crons there were."""
        check_queue(queue)
        removed = await self._database.write("clear a queue", once(queue_store.clear), queue)
        self._known_queues.discard(queue)
        return removed

    async def _append_new(self, queue: str, rows: Sequence[TaskRow]) -> list[bool]:
        first = {row.id: index for index, row in reversed(list(enumerate(rows)))}
        unique_rows = [row for index, row in enumerate(rows) if first[row.id] == index]
        added = await self._append_in_line(queue, unique_rows, self._is_to_register(queue))
        self._known_queues.add(queue)
        if added.ids:
            self._wakeups.wake([_wakeups.pending(queue)], told=added.told)
        return [first[row.id] == index and row.id in added.ids for index, row in enumerate(rows)]

    async def _append_again(self, queue: str, rows: Sequence[TaskRow]) -> None:
        # The last of several with one id, in the place of the first.
        latest = {row.id: row for row in rows}
        leases = {
            row.id: lease.token
            for row in latest.values()
            if (lease := self._leases.get((queue, row.id))) and lease.is_kept_by(row)
        }
        held = self._held(queue, latest.values())
        await self._database.write(
            "append tasks", self._put, queue, list(latest.values()), leases, new_token()
        )
        self._supersede(queue, held)
        self._known_queues.add(queue)
        if rows:
            self._wakeups.wake([_wakeups.pending(queue)])

    def _held(self, queue: str, rows: Iterable[TaskRow]) -> list[Held]:
        """What this instance holds of tasks now, before they are stored anew."""
        return [
            Held(row.id, self._claims.token(queue, row.id), self._leases.get((queue, row.id)))
            for row in rows
        ]

    def _supersede(self, queue: str, before: Iterable[Held]) -> None:
        """Forget it, but not what was taken since."""
        for held in before:
            self._claims.end(queue, held.task_id, held.claim)
            if self._leases.get((queue, held.task_id)) is held.lease:
                self._leases.pop((queue, held.task_id), None)

    async def _put(
        self,
        tx: Transaction,
        queue: str,
        rows: Sequence[TaskRow],
        leases: Mapping[str, int],
        token: int,
    ) -> None:
        kept = await schedule_store.lock_leases(tx, queue, leases) if leases else set()
        # A task whose lease is over was taken by another scheduler: it is no longer ours to add.
        rows = [row for row in rows if row.id not in leases or row.id in kept]
        if rows:
            await task_store.put(tx, queue, rows, token, PENDING, promoted=kept)
        await self._register(tx, queue)

    async def _schedule(
        self,
        tx: Transaction,
        queue: str,
        row: TaskRow,
        run_at: datetime,
        unique: bool,
        token: int,
    ) -> bool:
        if unique:
            added = await task_store.add(tx, queue, [row], token, pending=False)
            is_stored, is_new = bool(added.now or added.before), bool(added.now)
        else:
            is_stored, is_new = True, await task_store.put(tx, queue, [row], token, SCHEDULED)
        if is_new:
            await schedule_store.put(tx, queue, row.id, run_at)
        await self._register(tx, queue)
        return is_stored

    async def _register(self, tx: Transaction, queue: str) -> None:
        # Last, as in an append.
        if self._is_to_register(queue):
            await queue_store.register(tx, queue)

    def _is_to_register(self, queue: str) -> bool:
        return self._registers and queue not in self._known_queues


async def _nothing() -> None:
    pass
