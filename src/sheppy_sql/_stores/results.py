"""Finished tasks: kept until they expire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import delete, null, select

from ._common import among, unexpired

if TYPE_CHECKING:
    from .._database import Transaction
    from .._payloads import TaskRow


async def put(
    tx: Transaction,
    queue: str,
    row: TaskRow,
    claim_token: int | None,
    append_token: int | None,
    ttl: float | None,
) -> None:
    """Store a result for `ttl` seconds (None: for ever), over an expired or earlier one."""
    results = tx.tables.results
    values = {
        "payload": row.payload,
        "status": row.status,
        "func": row.func,
        "claim_token": claim_token,
        "append_token": append_token,
        "finished_at": tx.dialect.now(),
        "expires_at": null() if ttl is None else tx.dialect.now(plus=ttl),
    }
    statement = tx.dialect.insert(results).values(queue=queue, id=row.id, **values)
    await tx.execute(
        statement.on_conflict_do_update(index_elements=[results.c.queue, results.c.id], set_=values)
    )


async def get(tx: Transaction, queue: str, ids: Sequence[str]) -> dict[str, str]:
    """The payloads of those that are finished, by id."""
    results = tx.tables.results
    statement = select(results.c.id, results.c.payload).where(
        results.c.queue == queue, among(tx, results.c.id, ids), unexpired(tx)
    )
    return {row.id: row.payload for row in await tx.rows(statement)}


async def remove(tx: Transaction, queue: str, task_id: str) -> None:
    results = tx.tables.results
    await tx.execute(delete(results).where(results.c.queue == queue, results.c.id == task_id))
