"""Small expressions that several stores share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sheppy import BackendError
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Text,
    and_,
    any_,
    bindparam,
    func,
    literal,
    null,
    or_,
    select,
    tuple_,
)

if TYPE_CHECKING:
    from sqlalchemy import BindParameter, ColumnElement

    from .._dialects.base import Columns
    from .._transaction import Transaction

S = TypeVar("S")

CRON_RUN = "________-____-5___-____-____________"
"""What the ids of a cron's runs look like: UUIDs of version 5, made of the time of the run."""
CRON_RUN_HELD = 86_400.0
"""Seconds for which the id of a cron's run stays taken beyond its expiry.

A worker whose clock is slow would schedule the same run once more.
"""

UNCLAIMED: dict[str, Any] = {"owner": null(), "claim_token": null(), "heartbeat_at": null()}


MOST_TRIES = 50


def tries() -> Iterator[int]:
    """Tries at rows that were locked in a version which the snapshot did not show.

    The next snapshot shows them: BackendError after many of those.
    """
    yield from range(MOST_TRIES)
    raise BackendError(
        "Failed to change tasks that were locked: a trigger or a policy on the tables prevents it; "
        "have it return the row"
    )


def made_once(tx: Transaction, make: Callable[..., S], *flags: bool) -> S:
    """The statement that `make(tx, *flags)` makes of the tables, for the parameters it names.

    Making one takes longer than carrying it out.
    """
    # Of one database or the other: a program may enqueue in both.
    made, key = tx.tables.made, (type(tx.dialect), make, flags)
    if key not in made:
        made[key] = make(tx, *flags)
    statement: S = made[key]
    return statement


def of_queue() -> BindParameter[str]:
    """The queue of a statement that is made once: its parameter `of_queue`."""
    return bindparam("of_queue", type_=Text)


def without_lists(columns: Columns) -> Columns:
    """Columns for `unnest` in a statement that is made once."""
    return {name: (type_, None) for name, (type_, _) in columns.items()}


def unexpired(tx: Transaction) -> ColumnElement[bool]:
    """Whether a result is still there for the caller; the row itself outlives it a little."""
    expires_at = tx.tables.results.c.expires_at
    return or_(expires_at.is_(None), expires_at > tx.dialect.now())


def is_held(tx: Transaction) -> ColumnElement[bool]:
    """Whether the id of an expired result is not free yet."""
    results = tx.tables.results.c
    return and_(results.id.like(CRON_RUN), results.expires_at > tx.dialect.now(plus=-CRON_RUN_HELD))


def limited(tx: Transaction, lock_timeout: ColumnElement[str]) -> list[ColumnElement[bool]]:
    """Conditions, always true, that have a statement which locks rows not wait for them for long.

    Of one that is a transaction by itself: rows are locked once they, or the first, are found.
    """
    if tx.dialect.embedded or tx.is_callers:
        return []
    return [func.set_config("lock_timeout", lock_timeout, True) != ""]


def milliseconds(seconds: float) -> str:
    """A length of time as PostgreSQL reads it."""
    return f"{round(seconds * 1000)}ms"


def among(
    tx: Transaction, column: ColumnElement[Any], values: Sequence[Any]
) -> ColumnElement[bool]:
    """Whether a column holds one of the values, which travel as one parameter.

    Not a join with the values: SQLite, knowing nothing of how many there are,
    may go through all its rows for each of them.
    """
    if tx.dialect.embedded:
        item = tx.dialect.unnest({"value": (column.type, values)})
        return column.in_(select(item.c.value))
    return column == any_(literal(list(values), ARRAY(column.type)))


def is_under(tx: Transaction, claims: Mapping[str, int]) -> ColumnElement[bool]:
    """Whether a task is under its own one of the claims, whose tokens are given by id.

    Not under any of them: it may have been taken anew, in the very pop that took another of these.
    """
    tasks = tx.tables.tasks
    pair = tx.dialect.unnest(
        {"id": (Text(), list(claims)), "claim_token": (BigInteger(), list(claims.values()))}
    )
    return tuple_(tasks.c.id, tasks.c.claim_token).in_(select(pair.c.id, pair.c.claim_token))
