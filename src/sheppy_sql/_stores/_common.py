"""Small expressions that several stores share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, any_, literal, null, or_, select

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from .._database import Transaction

UNCLAIMED: dict[str, Any] = {"owner": null(), "claim_token": null(), "heartbeat_at": null()}


def unexpired(tx: Transaction) -> ColumnElement[bool]:
    """Whether a result is still there for the caller; the row itself outlives it a little."""
    expires_at = tx.tables.results.c.expires_at
    return or_(expires_at.is_(None), expires_at > tx.dialect.now())


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
