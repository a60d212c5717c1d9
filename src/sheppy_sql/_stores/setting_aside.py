"""Tasks that ran and have not ended: set aside, postponed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import null, select, update

from ..schema import IDLE, SCHEDULED
from . import results as result_store
from . import scheduled as schedule_store
from . import tasks as task_store
from ._common import UNCLAIMED

if TYPE_CHECKING:
    from datetime import datetime

    from .._payloads import TaskRow
    from .._transaction import Transaction


async def set_aside(
    tx: Transaction, queue: str, row: TaskRow, token: int | None, retry_in: float | None
) -> bool:
    """Store a task that ran and is not finished; False where its claim no longer holds.

    It is then in no queue until somebody schedules or appends it, or, if it is
    to be retried, until `retry_in` seconds have passed without either.
    """
    if token is None:
        await store(tx, queue, row)
        await result_store.remove(tx, queue, row.id)
        return True
    tasks = tx.tables.tasks
    state = IDLE if retry_in is None else SCHEDULED
    statement = (
        update(tasks)
        .where(tasks.c.queue == queue, tasks.c.id == row.id, tasks.c.claim_token == token)
        .values(payload=row.payload, status=row.status, state=state, position=null(), **UNCLAIMED)
    )
    if await tx.count(statement) == 0:
        return tx.repeated and (
            await schedule_store.is_parked(tx, queue, row.id, token)
            if retry_in is not None
            else await _is_idle(tx, queue, row)
        )
    if retry_in is not None:
        await schedule_store.park(tx, queue, row.id, retry_in, token)
    return True


async def postpone(
    tx: Transaction, queue: str, row: TaskRow, token: int, run_at: datetime, append_token: int
) -> None:
    """End a claim, if it still holds, by scheduling its task."""
    tasks = tx.tables.tasks
    if tx.repeated and await task_store.find_appended(tx, queue, [row.id], append_token):
        return
    statement = (
        update(tasks)
        .where(tasks.c.queue == queue, tasks.c.id == row.id, tasks.c.claim_token == token)
        .values(
            payload=row.payload,
            status=row.status,
            state=SCHEDULED,
            position=null(),
            append_token=append_token,
            **UNCLAIMED,
        )
    )
    if await tx.count(statement) > 0:
        await schedule_store.put(tx, queue, row.id, run_at)


async def _is_idle(tx: Transaction, queue: str, row: TaskRow) -> bool:
    """Whether the task is stored just so, and in no queue."""
    tasks = tx.tables.tasks
    stored = select(1).where(
        tasks.c.queue == queue,
        tasks.c.id == row.id,
        tasks.c.state == IDLE,
        tasks.c.payload == row.payload,
    )
    return await tx.scalar(stored) is not None


async def store(tx: Transaction, queue: str, row: TaskRow) -> None:
    """Replace the payload of a live task, whoever holds it, or make one that is in no queue."""
    tasks = tx.tables.tasks
    changes = {"payload": row.payload, "status": row.status}
    statement = tx.dialect.insert(tasks).values(
        queue=queue, id=row.id, state=IDLE, func=row.func, created_at=row.created_at, **changes
    )
    await tx.execute(
        statement.on_conflict_do_update(index_elements=[tasks.c.queue, tasks.c.id], set_=changes)
    )
