"""What is due among the scheduled tasks, from the floor on where there is one."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    DateTime,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    true,
    union_all,
    update,
)

from ..schema import DUE, LEASED, UTC, Timestamp
from . import by_id, floors
from ._common import made_once
from .floors import Line, own_xid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement, FromClause, Select

    from .._floors import Floor, Look
    from .._transaction import Transaction


async def is_any_due(
    tx: Transaction, queue: str, now: datetime | None, look: Look[datetime]
) -> bool:
    """Whether `lease` could find anything; `look` is told of what was seen."""
    scheduled = tx.tables.scheduled_tasks
    if tx.dialect.embedded:
        found = select(1).where(scheduled.c.queue == queue, _is_due(tx, now))
        return await tx.scalar(found.order_by(scheduled.c.run_at).limit(1)) is not None
    floor = look.begin(tx.connection)
    looking = made_once(tx, _looking, bool(floor.running))
    [row] = await tx.rows(looking, _parameters(queue, floor, now))
    look.saw(floors.read_seen(row))
    return bool(row.is_any_due)


async def lease(
    tx: Transaction,
    queue: str,
    now: datetime | None,
    token: int,
    seconds: float,
    look: Look[datetime],
) -> list[tuple[str, str]]:
    """(id, payload) of what is due, hidden from others for so many seconds.

    Not moved into line yet: the host does that by an append, and where it dies
    before, the task is due again.
    """
    scheduled = tx.tables.scheduled_tasks
    if tx.repeated:
        # Leased at the first try, though its answer was lost?
        mine = _tasks(tx).where(
            scheduled.c.queue == queue, scheduled.c.kind == LEASED, scheduled.c.lease_token == token
        )
        if taken := await tx.rows(mine.order_by(*_in_order(scheduled))):
            return [(row.task_id, row.payload) for row in taken]
    leased = [(row.task_id, row.payload) for row in await _lock(tx, queue, now, look)]
    if leased:
        hidden = update(scheduled).values(
            kind=LEASED,
            lease_token=token,
            run_at=tx.dialect.now(plus=seconds),
            due_xid=own_xid(tx),
        )
        await by_id.change(tx, hidden, queue, [task_id for task_id, _ in leased])
    return leased


async def _lock(
    tx: Transaction, queue: str, now: datetime | None, look: Look[datetime]
) -> Sequence[Any]:
    """What is due, but what others have locked."""
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    if tx.dialect.embedded:
        due = _tasks(tx).where(scheduled.c.queue == queue, _is_due(tx, now))
        due = due.order_by(*_in_order(scheduled))
        return await tx.rows(due.with_for_update(of=[tasks, scheduled], skip_locked=True))
    floor = look.begin(tx.connection)
    locking = made_once(tx, _locking, bool(floor.running))
    return await tx.rows(locking, _parameters(queue, floor, now))


def _looking(tx: Transaction, running: bool) -> Select[Any]:
    run_at, moment = tx.tables.scheduled_tasks.c.run_at, tx.dialect.now()
    ranges = floors.ranges(_line(tx), running=running)
    due = floors.first(ranges, where=_due_above(tx))
    # No higher than now, though what comes next may be far away: what is scheduled meanwhile is
    # then found by its time, and only what should have run already by its transaction.
    start = func.coalesce(floors.first(ranges, where=[run_at <= moment]), moment)
    return select(due.is_not(None).label("is_any_due"), *floors.seen(start))


def _locking(tx: Transaction, running: bool) -> Select[Any]:
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    key = [scheduled.c.queue, scheduled.c.task_id]
    parts = [
        each.select(*key, scheduled.c.run_at, where=_due_above(tx)).subquery()
        for each in floors.ranges(_line(tx), running=running)
    ]
    # A fence, and a search for each: the planner may not begin with all tasks of the queue.
    found = union_all(*(select(part.c.queue, part.c.task_id) for part in parts)).cte("found")
    found = found.prefix_with("MATERIALIZED")
    due = _tasks(tx).where(
        scheduled.c.queue == found.c.queue,
        scheduled.c.task_id == found.c.task_id,
        *_due_above(tx),
    )
    each = due.with_for_update(of=[tasks, scheduled], skip_locked=True).lateral("each")
    rows = select(each.c.task_id, each.c.payload).select_from(found.join(each, true()))
    return rows.order_by(*_in_order(each))


def _tasks(tx: Transaction) -> Select[Any]:
    """Tasks that have a time: their ids, times and payloads."""
    scheduled, tasks = tx.tables.scheduled_tasks, tx.tables.tasks
    is_its_task = and_(tasks.c.queue == scheduled.c.queue, tasks.c.id == scheduled.c.task_id)
    return select(scheduled.c.task_id, scheduled.c.run_at, tasks.c.payload).select_from(
        scheduled.join(tasks, is_its_task)
    )


def _in_order(tasks: FromClause) -> list[ColumnElement[Any]]:
    return [tasks.c.run_at, tasks.c.task_id]


def _is_due(tx: Transaction, now: datetime | None) -> ColumnElement[bool]:
    moment = tx.dialect.now()
    if now is None:
        return tx.tables.scheduled_tasks.c.run_at <= moment
    return _is_due_by(tx, literal(now, Timestamp))


def _is_due_by(tx: Transaction, now: ColumnElement[Any]) -> ColumnElement[bool]:
    """Due by the caller's time; leases and parks by the database's only."""
    scheduled = tx.tables.scheduled_tasks
    return or_(
        and_(scheduled.c.kind == DUE, scheduled.c.run_at <= now),
        and_(scheduled.c.kind != DUE, scheduled.c.run_at <= tx.dialect.now()),
    )


def _due_above(tx: Transaction) -> list[ColumnElement[bool]]:
    """Due by the caller's time, if that is given; with an end for the index."""
    run_at, moment = tx.tables.scheduled_tasks.c.run_at, tx.dialect.now()
    now = bindparam("at_moment", type_=Timestamp)
    # Of these the first passes over a null.
    return [run_at <= func.greatest(now, moment), _is_due_by(tx, func.coalesce(now, moment))]


def _parameters(queue: str, floor: Floor[datetime], now: datetime | None) -> dict[str, Any]:
    return {**floors.parameters(queue, floor), "at_moment": now}


def _line(tx: Transaction) -> Line:
    """All that has a time, of whatever kind."""
    scheduled = tx.tables.scheduled_tasks
    return Line(
        queue=scheduled.c.queue,
        place=scheduled.c.run_at,
        condition=[],
        xid=scheduled.c.due_xid,
        hidden_condition=[],
        hide=lambda run_at: func.timezone(UTC, run_at, type_=DateTime()),
    )
