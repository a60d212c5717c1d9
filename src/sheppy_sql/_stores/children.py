"""A task's result, and in the same transaction the tasks that it wanted enqueued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from . import finishing
from . import queues as queue_store
from . import results as result_store
from . import scheduled as schedule_store
from . import tasks as task_store

if TYPE_CHECKING:
    from .._payloads import TaskRow
    from .._transaction import Transaction


@dataclass(frozen=True, slots=True)
class Child:
    """A task to be enqueued if its id is still free then; an id occurs once in a queue."""

    queue: str
    row: TaskRow
    run_at: datetime | None


async def finish(
    tx: Transaction,
    queue: str,
    row: TaskRow,
    token: int | None,
    ttl: float | None,
    children: Sequence[Child],
    append_token: int,
) -> bool:
    """`finishing.finish`, with children enqueued if and only if the result is stored."""
    claimed = token is not None
    if claimed and tx.repeated and await result_store.is_of_claim(tx, queue, row.id, token):
        return True
    if not await finishing.finish(tx, queue, row, token, ttl):
        return False
    for child_queue in sorted({child.queue for child in children}):
        of_queue = [child for child in children if child.queue == child_queue]
        at_once = [child.row for child in of_queue if child.run_at is None]
        if at_once:
            await task_store.add(tx, child_queue, at_once, append_token, pending=True)
        run_at = {child.row.id: child.run_at for child in of_queue if child.run_at is not None}
        if run_at:
            later = [child.row for child in of_queue if child.row.id in run_at]
            added = await task_store.add(tx, child_queue, later, append_token, pending=False)
            for task_id in sorted(added.now):
                await schedule_store.put(tx, child_queue, task_id, run_at[task_id])
        await queue_store.register(tx, child_queue)
    return True
