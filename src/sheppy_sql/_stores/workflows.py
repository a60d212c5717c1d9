"""Workflows, and the tasks that each still waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Text, delete, func, insert, literal, select

from ._common import among

if TYPE_CHECKING:
    from .._database import Transaction


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
    changes = {"payload": payload, "finished": finished}
    statement = tx.dialect.insert(workflows).values(
        queue=queue, id=workflow_id, created_at=tx.dialect.now(), **changes
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


async def get(
    tx: Transaction, queue: str, ids: Sequence[str], *, finished: bool = False
) -> dict[str, str]:
    """Payloads of those that exist, or of those that have finished, by id."""
    workflows = tx.tables.workflows
    statement = select(workflows.c.id, workflows.c.payload).where(
        workflows.c.queue == queue, among(tx, workflows.c.id, ids)
    )
    if finished:
        statement = statement.where(workflows.c.finished)
    return {row.id: row.payload for row in await tx.rows(statement)}


async def get_all(tx: Transaction, queue: str, *, unfinished: bool = False) -> list[str]:
    """Payloads of all, or of the unfinished ones, the oldest first."""
    workflows = tx.tables.workflows
    statement = (
        select(workflows.c.payload)
        .where(workflows.c.queue == queue)
        .order_by(workflows.c.created_at, workflows.c.id)
    )
    if unfinished:
        statement = statement.where(~workflows.c.finished)
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
    # Locked first: of two last tasks, one must see the other gone.
    locked = (
        select(1).where(workflows.c.queue == queue, workflows.c.id == workflow_id).with_for_update()
    )
    if await tx.scalar(locked) is None:
        return -1
    of_workflow = (waiting.c.queue == queue, waiting.c.workflow_id == workflow_id)
    done = delete(waiting).where(*of_workflow, waiting.c.task_id == task_id)
    if await tx.count(done) == 0:
        return -1
    return int(await tx.scalar(select(func.count()).where(*of_workflow)))


async def _stop_waiting(tx: Transaction, queue: str, workflow_id: str) -> None:
    waiting = tx.tables.workflow_tasks
    await tx.execute(
        delete(waiting).where(waiting.c.queue == queue, waiting.c.workflow_id == workflow_id)
    )
