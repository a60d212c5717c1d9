"""When live tasks are due, and who is about to put them in line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, null, select, update

from ..schema import DUE, PARKED
from . import by_id
from ._common import among
from .floors import own_xid

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from .._payloads import TaskRow
    from .._transaction import Transaction


async def put(tx: Transaction, queue: str, task_id: str, run_at: datetime) -> None:
    """Schedule a live task, or move it."""
    await _upsert(tx, queue, task_id, DUE, run_at)


async def park(tx: Transaction, queue: str, task_id: str, seconds: float, token: int) -> None:
    """Have a task become due by itself if nobody schedules it within `seconds`.

    `token`: of the claim under which it was put aside.
    """
    await _upsert(tx, queue, task_id, PARKED, tx.dialect.now(plus=seconds), token)


async def is_parked(tx: Transaction, queue: str, task_id: str, token: int) -> bool:
    return await tx.scalar(select(1).where(*_parked(tx, queue, task_id, token))) is not None


async def unpark(tx: Transaction, queue: str, row: TaskRow, token: int, grace: float) -> None:
    """Schedule a parked task for its retry, `grace` seconds before it would be due by itself.

    By what was parked, not by the worker's clock. Nothing happens where the park is no more.
    """
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    # The order in which everybody locks.
    locked = select(1).where(tasks.c.queue == queue, tasks.c.id == row.id).with_for_update()
    await tx.rows(locked)
    parked = _parked(tx, queue, row.id, token)
    due = await tx.rows(select(scheduled.c.run_at).where(*parked).with_for_update())
    if not due:
        return
    run_at = due[0].run_at - timedelta(seconds=grace)
    await tx.execute(
        update(scheduled)
        .where(*parked)
        .values(kind=DUE, run_at=run_at, lease_token=null(), due_xid=own_xid(tx))
    )
    await tx.execute(
        update(tasks)
        .where(tasks.c.queue == queue, tasks.c.id == row.id)
        .values(payload=row.payload, status=row.status)
    )


async def remove(tx: Transaction, queue: str, task_id: str) -> None:
    scheduled = tx.tables.scheduled_tasks
    await tx.execute(
        delete(scheduled).where(scheduled.c.queue == queue, scheduled.c.task_id == task_id)
    )


async def get_all(tx: Transaction, queue: str) -> list[str]:
    """The payloads of scheduled tasks, due or not, the earliest first."""
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    statement = (
        select(tasks.c.payload)
        .where(
            scheduled.c.queue == queue,
            scheduled.c.kind == DUE,
            tasks.c.queue == scheduled.c.queue,
            tasks.c.id == scheduled.c.task_id,
        )
        .order_by(scheduled.c.run_at, scheduled.c.task_id)
    )
    return [row.payload for row in await tx.rows(statement)]


async def lock_leases(tx: Transaction, queue: str, leases: Mapping[str, int]) -> set[str]:
    """Which of the leases, tokens by id, still hold; nobody else takes them in this transaction."""
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    is_its_task = and_(tasks.c.queue == scheduled.c.queue, tasks.c.id == scheduled.c.task_id)
    held = by_id.lock(
        tx,
        scheduled,
        [scheduled.c.task_id],
        queue,
        [*leases],
        among(tx, scheduled.c.lease_token, sorted(set(leases.values()))),
        joined=scheduled.join(tasks, is_its_task),
        of=[tasks, scheduled],
    )
    return {row.task_id for row in await tx.rows(select(held))}


def _parked(tx: Transaction, queue: str, task_id: str, token: int) -> list[ColumnElement[bool]]:
    scheduled = tx.tables.scheduled_tasks
    return [
        scheduled.c.queue == queue,
        scheduled.c.task_id == task_id,
        scheduled.c.kind == PARKED,
        scheduled.c.lease_token == token,
    ]


async def _upsert(
    tx: Transaction,
    queue: str,
    task_id: str,
    kind: str,
    run_at: Any,
    token: int | None = None,
) -> None:
    scheduled = tx.tables.scheduled_tasks
    values = {"run_at": run_at, "kind": kind, "lease_token": token}
    statement = tx.dialect.insert(scheduled).values(queue=queue, task_id=task_id, **values)
    await tx.execute(
        statement.on_conflict_do_update(
            index_elements=[scheduled.c.queue, scheduled.c.task_id],
            set_={**values, "due_xid": statement.excluded.due_xid},
        )
    )
