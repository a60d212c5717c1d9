"""Queues as a whole: which there are, what is in them, emptying one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, select, union

from ..schema import DUE, PENDING
from . import by_id
from . import workflows as workflow_store
from ._common import unexpired

if TYPE_CHECKING:
    from sqlalchemy import Column, Delete, Select, Table

    from .._transaction import Transaction


CHUNK = 5_000  # tasks that clear deletes in one statement


async def register(tx: Transaction, queue: str) -> None:
    """Make a queue known, empty or not."""
    await tx.execute(
        tx.dialect.insert(tx.tables.queues).values(name=queue).on_conflict_do_nothing()
    )


async def list_all(tx: Transaction) -> dict[str, int]:
    """How many tasks wait in each known queue, by name in order."""
    tables = tx.tables
    names = union(
        select(tables.queues.c.name.label("queue")),
        _distinct(tables.tasks.c.queue),
        # A program that knew a queue before it was cleared registers it no second time.
        _distinct(tables.results.c.queue),
    ).subquery("names")
    waiting = (
        select(func.count())
        .where(tables.tasks.c.queue == names.c.queue, tables.tasks.c.state == PENDING)
        .scalar_subquery()
    )
    found = await tx.rows(select(names.c.queue, waiting.label("pending")))
    return dict(sorted((row.queue, row.pending) for row in found))


async def get_stats(tx: Transaction, queue: str) -> dict[str, int]:
    """Tasks that wait, finished tasks that have not expired, tasks with a time to run."""
    tables = tx.tables

    def counted(table: Table, *conditions: Any) -> Any:
        rows = select(func.count()).select_from(table)
        return rows.where(table.c.queue == queue, *conditions).scalar_subquery()

    pending, completed, scheduled = (
        await tx.rows(
            select(
                counted(tables.tasks, tables.tasks.c.state == PENDING),
                counted(tables.results, unexpired(tx)),
                counted(tables.scheduled_tasks, tables.scheduled_tasks.c.kind == DUE),
            )
        )
    )[0]
    return {"pending": pending, "completed": completed, "scheduled": scheduled}


async def clear(tx: Transaction, queue: str) -> int:
    """Delete all but a queue's workflows; how many tasks, in every state, and crons there were."""
    tables = tx.tables
    finished = select(func.count()).where(tables.results.c.queue == queue, unexpired(tx))
    removed = int(await tx.scalar(finished))
    # The order in which everybody locks: tasks, by id, then results, then the rest.
    last: str | None = None
    while ids := await _lock_some(tx, queue, last):
        last = ids[-1]
        removed += len(await by_id.change(tx, delete(tables.tasks), queue, ids))
    await tx.execute(_deleting_results(tx, queue))
    for table in (tables.rate_limits, tables.rate_limit_entries):
        await tx.execute(delete(table).where(table.c.queue == queue))
    # Only what has no task: one may have been scheduled since the tasks were deleted.
    scheduled = tables.scheduled_tasks
    has_task = select(1).where(
        tables.tasks.c.queue == scheduled.c.queue, tables.tasks.c.id == scheduled.c.task_id
    )
    await tx.execute(delete(scheduled).where(scheduled.c.queue == queue, ~has_task.exists()))
    removed += await tx.count(delete(tables.crons).where(tables.crons.c.queue == queue))
    # They stay, and what they wait for must not be added again for their sake.
    await workflow_store.forsake(tx, queue)
    await tx.execute(delete(tables.queues).where(tables.queues.c.name == queue))
    return removed


async def _lock_some(tx: Transaction, queue: str, after: str | None) -> list[str]:
    """The next ids of a queue's tasks, a statement's worth, none of which changes any more."""
    tasks = tx.tables.tasks
    some = select(tasks.c.id).where(tasks.c.queue == queue)
    if after is not None:
        some = some.where(tasks.c.id > after)
    locked = some.order_by(tasks.c.id).limit(CHUNK).with_for_update()
    return [row.id for row in await tx.rows(locked)]


def _deleting_results(tx: Transaction, queue: str) -> Delete:
    """A DELETE of all of a queue's; by their ids in order, as everybody locks."""
    results = tx.tables.results
    locked = select(results.c.id).where(results.c.queue == queue).order_by(results.c.id)
    ids = locked.with_for_update().cte("locked").prefix_with("MATERIALIZED")
    return delete(results).where(results.c.queue == queue, results.c.id.in_(select(ids.c.id)))


def _distinct(queue: Column[str]) -> Select[tuple[str]]:
    """The queues in a table, one look into its primary key for each, however many rows."""
    first = select(func.min(queue).label("queue")).cte(f"{queue.table.name}_queues", recursive=True)
    after = select(func.min(queue)).where(queue > first.c.queue).scalar_subquery()
    names = first.union_all(select(after).where(first.c.queue.is_not(None)))
    return select(names.c.queue).where(names.c.queue.is_not(None))
