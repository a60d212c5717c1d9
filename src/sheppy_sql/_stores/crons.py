"""Cron definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, select

if TYPE_CHECKING:
    from .._transaction import Transaction


async def add(
    tx: Transaction, queue: str, cron_id: str, expression: str | None, payload: str
) -> bool:
    """Store a cron once; False where it is already there."""
    crons = tx.tables.crons
    statement = tx.dialect.insert(crons).values(
        queue=queue,
        id=cron_id,
        expression=expression,
        payload=payload,
        created_at=tx.dialect.now(),
    )
    return bool(await tx.rows(statement.on_conflict_do_nothing().returning(crons.c.id)))


async def remove(tx: Transaction, queue: str, cron_id: str) -> bool:
    """Delete a cron; False where there was none."""
    crons = tx.tables.crons
    statement = delete(crons).where(crons.c.queue == queue, crons.c.id == cron_id)
    return await tx.count(statement) > 0


async def get_all(tx: Transaction, queue: str) -> list[str]:
    """The payloads of a queue's crons, the oldest first."""
    crons = tx.tables.crons
    statement = (
        select(crons.c.payload)
        .where(crons.c.queue == queue)
        .order_by(crons.c.created_at, crons.c.id)
    )
    return [row.payload for row in await tx.rows(statement)]
