"""When live tasks are due, and who is about to put them in line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, literal, null, or_, select, update

from ..schema import DUE, LEASED, PARKED, Timestamp
from ._common import among

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from .._database import Transaction
    from .._payloads import TaskRow


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
        update(scheduled).where(*parked).values(kind=DUE, run_at=run_at, lease_token=null())
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


async def has_due(tx: Transaction, queue: str, now: datetime | None) -> bool:
    """Whether `lease_due` could find anything."""
    scheduled = tx.tables.scheduled_tasks
    found = select(1).where(scheduled.c.queue == queue, _is_due(tx, now))
    return await tx.scalar(found.order_by(scheduled.c.run_at).limit(1)) is not None


async def lease_due(
    tx: Transaction, queue: str, now: datetime | None, token: int, seconds: float
) -> list[tuple[str, str]]:
    """(id, payload) of what is due, hidden from others for so many seconds.

    Not moved into line yet: the host does that by an append, and where it dies
    before, the task is due again.
    """
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    payloads = (
        select(scheduled.c.task_id, tasks.c.payload)
        .where(
            scheduled.c.queue == queue,
            tasks.c.queue == scheduled.c.queue,
            tasks.c.id == scheduled.c.task_id,
        )
        .order_by(scheduled.c.run_at, scheduled.c.task_id)
    )
    if tx.repeated:
        # Leased at the first try, though its answer was lost?
        mine = payloads.where(scheduled.c.kind == LEASED, scheduled.c.lease_token == token)
        if taken := await tx.rows(mine):
            return [(row.task_id, row.payload) for row in taken]
    due = payloads.where(_is_due(tx, now)).with_for_update(of=[tasks, scheduled], skip_locked=True)
    leased = [(row.task_id, row.payload) for row in await tx.rows(due)]
    if leased:
        ids = sorted(task_id for task_id, _ in leased)
        await tx.execute(
            update(scheduled)
            .where(scheduled.c.queue == queue, among(tx, scheduled.c.task_id, ids))
            .values(kind=LEASED, lease_token=token, run_at=tx.dialect.now(plus=seconds))
        )
    return leased


async def lock_leases(tx: Transaction, queue: str, leases: Mapping[str, int]) -> set[str]:
    """Which of the leases, tokens by id, still hold; nobody else takes them in this transaction."""
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    ids = sorted(leases)
    held = (
        select(scheduled.c.task_id)
        .where(
            scheduled.c.queue == queue,
            among(tx, scheduled.c.task_id, ids),
            among(tx, scheduled.c.lease_token, [leases[task_id] for task_id in ids]),
            tasks.c.queue == scheduled.c.queue,
            tasks.c.id == scheduled.c.task_id,
        )
        .order_by(scheduled.c.task_id)
        .with_for_update(of=[tasks, scheduled])
    )
    return {row.task_id for row in await tx.rows(held)}


def _is_due(tx: Transaction, now: datetime | None) -> ColumnElement[bool]:
    """Due by the caller's time if it gave one; leases and parks by the database's only."""
    scheduled = tx.tables.scheduled_tasks
    moment = tx.dialect.now()
    if now is None:
        return scheduled.c.run_at <= moment
    return or_(
        and_(scheduled.c.kind == DUE, scheduled.c.run_at <= literal(now, Timestamp)),
        and_(scheduled.c.kind != DUE, scheduled.c.run_at <= moment),
    )


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
            index_elements=[scheduled.c.queue, scheduled.c.task_id], set_=values
        )
    )
