"""Rows of a queue by their ids, each of which is searched for by itself.

Of a condition on all the ids at once, or a join, PostgreSQL may make a plan that reads every row of
the queue: where it believes that there are few, as its statistics say that were taken of a queue
that had just been drained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, Text, and_, any_, func, literal_column, select, true

from ._common import among, made_once, tries

if TYPE_CHECKING:
    from sqlalchemy import (
        CTE,
        Column,
        ColumnElement,
        Delete,
        Executable,
        FromClause,
        Select,
        Subquery,
        Table,
        Update,
    )

    from .._dialects.base import Columns
    from .._transaction import Transaction


def find(
    tx: Transaction,
    table: Table,
    columns: Sequence[ColumnElement[Any]],
    queue: Any,
    ids: Sequence[str] | None,
    *conditions: ColumnElement[bool],
) -> Subquery:
    """Columns of the rows that meet the conditions.

    `ids` may be None, in a statement for `rows`.
    """
    # It keeps the search from being made a join.
    fence: ColumnElement[int] = literal_column("0")
    found = _rows(table, columns, queue, conditions)
    return _searched(tx, table, found, ids, lambda search: search.offset(fence))


async def rows(
    tx: Transaction,
    make: Callable[..., Executable],
    queue: str,
    ids: Sequence[str],
    *flags: bool,
    **parameters: Any,
) -> Sequence[Any]:
    """Rows of the statement that is made once, by `make(tx, *flags)`, with `find`.

    The queue is `of_queue()` there, and the ids are None.
    """
    given = {"of_queue": queue, **tx.dialect.lists(_wanted(ids)), **parameters}
    return await tx.rows(made_once(tx, make, *flags), given)


def lock(
    tx: Transaction,
    table: Table,
    columns: Sequence[ColumnElement[Any]],
    queue: str,
    ids: Sequence[str],
    *conditions: ColumnElement[bool],
    joined: FromClause | None = None,
    **how: Any,
) -> Subquery:
    """`find`, and have nobody else change them: FOR UPDATE, with `how` as SQLAlchemy takes it.

    `joined`: what the rows are found in, if the table is joined with another. In the order of the
    ids, byte by byte as in the tables: two statements that lock rows as they find them can
    deadlock.
    """
    found = _rows(table, columns, queue, conditions)
    if joined is not None:
        found = found.select_from(joined)
    return _searched(tx, table, found, sorted(ids), lambda search: search.with_for_update(**how))


async def change(
    tx: Transaction,
    statement: Update | Delete,
    queue: str,
    ids: Sequence[str],
    *conditions: ColumnElement[bool],
    **how: Any,
) -> set[str]:
    """Apply an UPDATE or DELETE to the rows that meet the conditions; the ids of those.

    They are locked before, as in `lock`.
    """
    table: Any = statement.table
    key = _key(table)
    if tx.dialect.embedded:
        mine = [table.c.queue == queue, among(tx, key, ids), *conditions]
        return {row.id for row in await tx.rows(statement.where(*mine).returning(key.label("id")))}
    columns = [*table.primary_key.columns, table.c.ctid]
    each = lock(tx, table, columns, queue, ids, *conditions, **how)
    return {task_id for _, task_id in await apply(tx, statement, select(each))}


async def apply(
    tx: Transaction, statement: Update | Delete, locking: Select[Any]
) -> set[tuple[str, str]]:
    """Apply an UPDATE or DELETE, in PostgreSQL, to rows that are locked before; their keys.

    `locking` is the SELECT that locks them, and gives their keys and places on disk. The statement
    may be applied to a row twice.
    """
    applied = _applied(statement, locking)
    changed: set[tuple[str, str]] = set()
    numbered = tries()
    while True:
        next(numbered)
        locked = await tx.rows(applied)
        changed |= {(queue, task_id) for queue, task_id, is_done in locked if is_done}
        # A row that was written to between the snapshot and its lock is locked in its newest
        # version, which the same snapshot does not show: a newer one does.
        if all(row.is_done for row in locked):
            return changed


def _applied(statement: Update | Delete, locking: Select[Any]) -> Select[Any]:
    """The statement that does so once: the keys of what is locked, and whether it `is_done`."""
    table: Any = statement.table
    keys = list(table.primary_key.columns)
    locked = locking.cte("locked").prefix_with("MATERIALIZED")
    done = statement.where(is_at(table, locked)).returning(*keys).cte("done")
    is_same = and_(*(done.c[key.name] == locked.c[key.name] for key in keys))
    is_done = done.c[keys[0].name].is_not(None).label("is_done")
    columns = [locked.c[key.name] for key in keys]
    return select(*columns, is_done).select_from(locked.outerjoin(done, is_same))


def is_at(table: Table, picked: CTE | Subquery) -> ColumnElement[bool]:
    """Whether a row, in PostgreSQL, is where those are that have been locked."""
    place: Column[Any] = table.c.ctid
    places = func.array(select(picked.c.ctid).scalar_subquery(), type_=ARRAY(place.type))
    return place == any_(places)


def _rows(
    table: Table,
    columns: Sequence[ColumnElement[Any]],
    queue: Any,
    conditions: Sequence[ColumnElement[bool]],
) -> Select[Any]:
    return select(*columns).where(table.c.queue == queue, *conditions)


def _searched(
    tx: Transaction,
    table: Table,
    found: Select[Any],
    ids: Sequence[str] | None,
    fence: Callable[[Select[Any]], Select[Any]],
) -> Subquery:
    """What is found whose ids are wanted, searched for with the fence around each search."""
    key = _key(table)
    item = tx.dialect.unnest(_wanted(ids))
    if tx.dialect.embedded:
        # Not a join with the ids: as in `among`.
        return found.where(key.in_(select(item.c.wanted))).subquery("found")
    each = fence(found.where(key == item.c.wanted)).lateral("each")
    return select(each).select_from(item.join(each, true())).subquery("found")


def _wanted(ids: Sequence[str] | None) -> Columns:
    return {"wanted": (Text(), None if ids is None else list(ids))}


def _key(table: Table) -> Column[str]:
    """What is unique in a queue."""
    _, key = table.primary_key.columns
    return key
