"""Taking tasks, and what becomes of them: handed back, put aside, finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sqlalchemy import delete, null, select, update

from ..schema import CLAIMED, IDLE, PENDING, SCHEDULED
from . import results as result_store
from . import scheduled as schedule_store
from ._common import UNCLAIMED, among

if TYPE_CHECKING:
    from .._database import Transaction
    from .._payloads import TaskRow


async def has_pending(tx: Transaction, queue: str) -> bool:
    """Whether a claim could find anything."""
    tasks = tx.tables.tasks
    found = select(1).where(tasks.c.queue == queue, tasks.c.state == PENDING)
    # Ordered, or SQLite may prefer the table to the index where one queue holds most tasks.
    return await tx.scalar(found.order_by(tasks.c.position).limit(1)) is not None


async def claim(
    tx: Transaction, queue: str, limit: int, owner: str, token: int
) -> list[tuple[str, str]]:
    """(id, payload) of up to `limit` pending tasks, now the owner's, first in first out.

    Tasks that another transaction has locked are skipped, not waited for.
    """
    tasks = tx.tables.tasks
    picked = (
        select(tasks.c.id)
        .where(tasks.c.queue == queue, tasks.c.state == PENDING)
        .order_by(tasks.c.position)
        .limit(limit)
        .with_for_update(skip_locked=True)
        # MATERIALIZED: inlined, the planner may run the LIMIT again per row and claim too many.
        .cte("picked")
        .prefix_with("MATERIALIZED")
    )
    statement = (
        update(tasks)
        .where(tasks.c.queue == queue, tasks.c.id == picked.c.id)
        .values(state=CLAIMED, owner=owner, claim_token=token, heartbeat_at=tx.dialect.now())
        .returning(tasks.c.id, tasks.c.payload, tasks.c.position)
    )
    # RETURNING promises no order.
    claimed = sorted(await tx.rows(statement), key=lambda row: row.position)
    return [(row.id, row.payload) for row in claimed]


async def release(tx: Transaction, owner: str, token: int | None) -> set[str]:
    """Hand back what one claim, or (None) the owner, holds; the queues concerned.

    Each task goes to its old place in line.
    """
    tasks = tx.tables.tasks
    held = update(tasks).where(tasks.c.owner == owner, tasks.c.state == CLAIMED)
    if token is not None:
        held = held.where(tasks.c.claim_token == token)
    statement = held.values(state=PENDING, **UNCLAIMED).returning(tasks.c.queue)
    return {row.queue for row in await tx.rows(statement)}


async def end(tx: Transaction, queue: str, claims: Mapping[str, int]) -> None:
    """End claims, tokens by id, where they still hold; the tasks stay, in no queue."""
    tasks = tx.tables.tasks
    ids = sorted(claims)
    statement = (
        update(tasks)
        .where(
            tasks.c.queue == queue,
            among(tx, tasks.c.id, ids),
            # A token is of one instance's pop: a task under it is one that was asked for.
            among(tx, tasks.c.claim_token, [claims[task_id] for task_id in ids]),
        )
        .values(state=IDLE, position=null(), **UNCLAIMED)
    )
    await tx.execute(statement)


async def finish(
    tx: Transaction, queue: str, row: TaskRow, token: int | None, ttl: float | None
) -> bool:
    """Move a task to the results for `ttl` seconds (None: for ever).

    With a claim's token only while that claim holds, else False. Without one,
    whatever the task was before.
    """
    tasks = tx.tables.tasks
    mine = delete(tasks).where(tasks.c.queue == queue, tasks.c.id == row.id)
    if token is None:
        # Stored first, so that its row is locked: it is what keeps the id unique.
        await _store(tx, queue, row)
        await schedule_store.remove(tx, queue, row.id)
    else:
        mine = mine.where(tasks.c.claim_token == token)
    ended = await tx.rows(mine.returning(tasks.c.append_token))
    if not ended:
        return False
    await result_store.put(tx, queue, row, token, ended[0].append_token, ttl)
    return True


async def set_aside(
    tx: Transaction, queue: str, row: TaskRow, token: int | None, retry_in: float | None
) -> bool:
    """Store a task that ran and is not finished; False where its claim no longer holds.

    It is then in no queue until somebody schedules or appends it, or, if it is
    to be retried, until `retry_in` seconds have passed without either.
    """
    if token is None:
        await _store(tx, queue, row)
        await result_store.remove(tx, queue, row.id)
        return True
    tasks = tx.tables.tasks
    state = IDLE if retry_in is None else SCHEDULED
    statement = (
        update(tasks)
        .where(tasks.c.queue == queue, tasks.c.id == row.id, tasks.c.claim_token == token)
        .values(payload=row.payload, status=row.status, state=state, position=null(), **UNCLAIMED)
    )
    held = await tx.count(statement) > 0
    if held and retry_in is not None:
        await schedule_store.park(tx, queue, row.id, retry_in)
    return held


async def _store(tx: Transaction, queue: str, row: TaskRow) -> None:
    """Replace the payload of a live task, whoever holds it, or make one that is in no queue."""
    tasks = tx.tables.tasks
    changes = {"payload": row.payload, "status": row.status}
    statement = tx.dialect.insert(tasks).values(
        queue=queue, id=row.id, state=IDLE, func=row.func, created_at=row.created_at, **changes
    )
    await tx.execute(
        statement.on_conflict_do_update(index_elements=[tasks.c.queue, tasks.c.id], set_=changes)
    )
