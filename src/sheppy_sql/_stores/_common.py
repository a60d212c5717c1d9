"""Small expressions that several stores share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, null, or_, select

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, FromClause

    from .._database import Transaction

UNCLAIMED: dict[str, Any] = {"owner": null(), "claim_token": null(), "heartbeat_at": null()}


def unexpired(tx: Transaction) -> ColumnElement[bool]:
    """Whether a result is still there for the caller; the row itself outlives it a little."""
    expires_at = tx.tables.results.c.expires_at
    return or_(expires_at.is_(None), expires_at > tx.dialect.now())


def id_list(tx: Transaction, ids: Sequence[str]) -> FromClause:
    """The ids as rows to join with, in one parameter."""
    return tx.dialect.unnest({"id": (Text(), ids)})


def among(tx: Transaction, column: ColumnElement[str], ids: Sequence[str]) -> ColumnElement[bool]:
    """For DELETE, which cannot join on SQLite."""
    return column.in_(select(id_list(tx, ids).c.id))
