"""Finished tasks: kept until they expire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, delete, literal, null, select, true, tuple_

from . import by_id
from ._common import is_held, of_queue, unexpired

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, FromClause, Select
    from sqlalchemy.dialects.postgresql import Insert as PostgreSQLInsert
    from sqlalchemy.dialects.sqlite import Insert as SQLiteInsert

    from .._payloads import TaskRow
    from .._transaction import Transaction


KEPT = 600.0
"""Seconds for which an expired result's row stays, so that a lost answer is still recognised."""


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


def insert_all(
    tx: Transaction,
    queue: ColumnElement[str],
    item: FromClause,
    source: FromClause | None = None,
    *,
    append_token: ColumnElement[int | None],
    expires_at: ColumnElement[Any],
) -> PostgreSQLInsert | SQLiteInsert:
    """The statement that does what `put` does for many, whose columns are those of `item`.

    `source`: where they come from, if from more than `item`.
    """
    results = tx.tables.results
    values = {
        "queue": queue,
        **{name: item.c[name] for name in ("id", "payload", "status", "func", "claim_token")},
        "append_token": append_token,
        "finished_at": tx.dialect.now(),
        "expires_at": expires_at,
    }
    rows = select(*values.values()).select_from(item if source is None else source)
    # As everybody locks, which a server's own order of texts is not.
    ordered = item.c.id if tx.dialect.embedded else item.c.id.collate("C")
    # WHERE: or SQLite takes the ON of the conflict for one of a join.
    insertion = tx.dialect.insert(results).from_select(
        list(values), rows.where(true()).order_by(ordered)
    )
    changes = {name: insertion.excluded[name] for name in values if name not in {"queue", "id"}}
    return insertion.on_conflict_do_update(
        index_elements=[results.c.queue, results.c.id], set_=changes
    )


async def of_claims(tx: Transaction, queue: str, claims: Mapping[str, int]) -> set[str]:
    """Those of the ids whose results were stored under their claims, tokens by id."""
    results = tx.tables.results
    columns = [results.c.id, results.c.claim_token]
    stored = select(by_id.find(tx, results, columns, queue, [*claims]))
    return {row.id for row in await tx.rows(stored) if row.claim_token == claims[row.id]}


async def get(tx: Transaction, queue: str, ids: Sequence[str]) -> dict[str, str]:
    """The payloads of those that are finished, by id."""
    return {row.id: row.payload for row in await by_id.rows(tx, finished, queue, ids)}


def finished(tx: Transaction) -> Select[tuple[str, str]]:
    """(id, payload) of those that are finished and not expired, for by_id.rows."""
    results = tx.tables.results
    columns = [results.c.id, results.c.payload]
    return select(by_id.find(tx, results, columns, of_queue(), None, unexpired(tx)))


async def prune(tx: Transaction, most: int) -> int:
    """Delete up to `most` results that expired a while ago, the oldest first; how many there were.

    Those that another transaction has locked are left to a later call.
    """
    results = tx.tables.results
    old = (
        select(results.c.queue, results.c.id)
        .where(results.c.expires_at <= tx.dialect.now(plus=-KEPT), ~is_held(tx))
        .order_by(results.c.expires_at)
        .limit(most)
        .with_for_update(skip_locked=True)
        .cte("old")
        .prefix_with("MATERIALIZED")
    )
    pruned = delete(results).where(
        tuple_(results.c.queue, results.c.id).in_(select(old.c.queue, old.c.id))
    )
    # Counted by its rows: of a statement with a CTE, SQLite's driver counts none.
    return len(await tx.rows(pruned.returning(results.c.id)))


async def is_of_claim(tx: Transaction, queue: str, task_id: str, token: int | None) -> bool:
    """Whether the result was stored under this claim."""
    results = tx.tables.results
    stored = select(1).where(
        results.c.queue == queue, results.c.id == task_id, results.c.claim_token == token
    )
    return await tx.scalar(stored) is not None


async def check_unseen(tx: Transaction, queue: str, ids: Sequence[str]) -> None:
    """Fail as a conflict where one of the ids has a result that this transaction cannot see.

    Only where the snapshot is fixed: the task may have ended since it was taken. An INSERT meets
    what a SELECT does not show, and is then refused as a serialization failure.
    """
    if not tx.fixed_snapshot:
        return
    results = tx.tables.results
    item = tx.dialect.unnest({"id": (Text(), ids)})
    probe = tx.dialect.insert(results).from_select(
        ["queue", "id", "payload", "finished_at"],
        select(literal(queue, Text), item.c.id, literal("null", Text), tx.dialect.now()),
    )
    probed = await tx.rows(probe.on_conflict_do_nothing().returning(results.c.id))
    await by_id.change(tx, delete(results), queue, [row.id for row in probed])


async def remove(tx: Transaction, queue: str, task_id: str) -> None:
    results = tx.tables.results
    await tx.execute(delete(results).where(results.c.queue == queue, results.c.id == task_id))
