"""Workflows, and the tasks that each still waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Text, case, delete, func, insert, literal, select, union_all, update

from ..schema import NEVER, UNFINISHED
from . import by_id

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement, Select

    from .._transaction import Transaction


class Stalled(NamedTuple):
    """An unfinished workflow that has not been touched for a while."""

    id: str
    touched_at: datetime


async def put(
    tx: Transaction,
    queue: str,
    workflow_id: str,
    payload: str,
    *,
    finished: bool,
    waits_for: Sequence[str],
) -> None:
    """Store a workflow and, in place of what it waited for, what it waits for now."""
    workflows, waiting = tx.tables.workflows, tx.tables.workflow_tasks
    now = tx.dialect.now()
    changes = {"payload": payload, "finished": finished, "updated_at": now}
    statement = tx.dialect.insert(workflows).values(
        queue=queue, id=workflow_id, created_at=now, **changes
    )
    await tx.execute(
        statement.on_conflict_do_update(
            index_elements=[workflows.c.queue, workflows.c.id], set_=changes
        )
    )
    await _stop_waiting(tx, queue, workflow_id)
    if waits_for:
        item = tx.dialect.unnest({"id": (Text(), sorted(waits_for))})
        await tx.execute(
            insert(waiting).from_select(
                ["queue", "workflow_id", "task_id"],
                select(literal(queue), literal(workflow_id), item.c.id),
            )
        )


async def get(tx: Transaction, queue: str, ids: Sequence[str]) -> dict[str, str]:
    """Payloads of those that exist, by id."""
    rows = await tx.rows(_find(tx, queue, ids))
    return {row.id: row.payload for row in rows}


async def get_finished(tx: Transaction, queue: str, ids: Sequence[str]) -> dict[str, str]:
    """Payloads of those that have finished, by id."""
    rows = await tx.rows(_find(tx, queue, ids, tx.tables.workflows.c.finished))
    return {row.id: row.payload for row in rows}


async def get_all(tx: Transaction, queue: str, *, unfinished: bool = False) -> list[str]:
    """Payloads of all, or of the unfinished ones, the oldest first."""
    workflows = tx.tables.workflows
    statement = (
        select(workflows.c.payload)
        .where(workflows.c.queue == queue)
        .order_by(workflows.c.created_at, workflows.c.id)
    )
    if unfinished:
        statement = statement.where(UNFINISHED)
    return [row.payload for row in await tx.rows(statement)]


async def remove(tx: Transaction, queue: str, workflow_id: str) -> bool:
    """Delete a workflow; False where there was none."""
    workflows = tx.tables.workflows
    statement = delete(workflows).where(workflows.c.queue == queue, workflows.c.id == workflow_id)
    existed = await tx.count(statement) > 0
    await _stop_waiting(tx, queue, workflow_id)
    return existed


async def complete_task(tx: Transaction, queue: str, workflow_id: str, task_id: str) -> int:
    """How many tasks the workflow still waits for; -1 where it did not wait for this one."""
    workflows, waiting = tx.tables.workflows, tx.tables.workflow_tasks
    now = tx.dialect.now()
    # Locked thereby: of two last tasks, one must see the other gone.
    touched = (
        update(workflows)
        .where(workflows.c.queue == queue, workflows.c.id == workflow_id)
        .values(updated_at=case((workflows.c.updated_at > now, workflows.c.updated_at), else_=now))
    )
    if await tx.count(touched) == 0:
        return -1
    of_workflow = (waiting.c.queue == queue, waiting.c.workflow_id == workflow_id)
    done = delete(waiting).where(*of_workflow, waiting.c.task_id == task_id)
    if await tx.count(done) == 0:
        return -1
    return int(await tx.scalar(select(func.count()).where(*of_workflow)))


async def stalled(
    tx: Transaction, queue: str, grace: float, after: str, limit: int
) -> list[Stalled]:
    """Unfinished ones, ids from `after` on, not touched for `grace` seconds.

    Without those that are known to wait for a live task; others may, too.
    """
    workflows, waiting, tasks = tx.tables.workflows, tx.tables.workflow_tasks, tx.tables.tasks
    waits = (
        select(1)
        .join_from(
            waiting,
            tasks,
            (tasks.c.queue == waiting.c.queue) & (tasks.c.id == waiting.c.task_id),
        )
        .where(waiting.c.queue == workflows.c.queue, waiting.c.workflow_id == workflows.c.id)
    )
    # An expression, lest the primary key be searched: it holds all that have ever finished.
    place = workflows.c.id.concat("")
    statement = (
        select(workflows.c.id, _touched(tx).label("touched_at"))
        .where(workflows.c.queue == queue, UNFINISHED, place > after)
        .where(_touched(tx) <= tx.dialect.now(plus=-grace), ~waits.exists())
        .order_by(place)
        .limit(limit)
    )
    return [Stalled(row.id, row.touched_at) for row in await tx.rows(statement)]


async def any_unsettled(tx: Transaction, queue: str, task_ids: Sequence[str], grace: float) -> bool:
    """Whether one of the tasks is live, or has ended less than `grace` seconds ago."""
    tasks, results = tx.tables.tasks, tx.tables.results
    is_recent = results.c.finished_at > tx.dialect.now(plus=-grace)
    live = by_id.find(tx, tasks, [tasks.c.id], queue, task_ids)
    ended = by_id.find(tx, results, [results.c.id], queue, task_ids, is_recent)
    # One snapshot: a task that ends just now is in one of them.
    either = union_all(select(live), select(ended))
    return await tx.scalar(either.limit(1)) is not None


async def touch_stalled(tx: Transaction, queue: str, workflow_id: str, grace: float) -> bool:
    """Touch a workflow; False where it has ended, or been touched within `grace` seconds."""
    workflows = tx.tables.workflows
    statement = (
        update(workflows)
        .where(workflows.c.queue == queue, workflows.c.id == workflow_id, UNFINISHED)
        .where(_touched(tx) <= tx.dialect.now(plus=-grace))
        .values(updated_at=tx.dialect.now())
    )
    return await tx.count(statement) > 0


async def forsake(tx: Transaction, queue: str) -> None:
    """Have none of a queue's unfinished workflows count as stalled until it is stored anew."""
    workflows = tx.tables.workflows
    unfinished = (workflows.c.queue == queue, UNFINISHED)
    locked = select(workflows.c.id).where(*unfinished).order_by(workflows.c.id)
    if await tx.rows(locked.with_for_update()):
        await tx.execute(update(workflows).where(*unfinished).values(updated_at=NEVER))


def _touched(tx: Transaction) -> ColumnElement[Any]:
    workflows = tx.tables.workflows
    return func.coalesce(workflows.c.updated_at, workflows.c.created_at)


async def _stop_waiting(tx: Transaction, queue: str, workflow_id: str) -> None:
    waiting = tx.tables.workflow_tasks
    await tx.execute(
        delete(waiting).where(waiting.c.queue == queue, waiting.c.workflow_id == workflow_id)
    )


def _find(
    tx: Transaction, queue: str, ids: Sequence[str], *conditions: ColumnElement[bool]
) -> Select[tuple[str, str]]:
    workflows = tx.tables.workflows
    columns = [workflows.c.id, workflows.c.payload]
    return select(by_id.find(tx, workflows, columns, queue, ids, *conditions))
