"""The one row that says which version the tables have."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import select

if TYPE_CHECKING:
    from .._database import Transaction


class Installation(NamedTuple):
    version: int
    """Of the schema, stamped by every migration."""
    oldest_code: int
    """The oldest code, by the version that it needs, which can work on this schema."""
    name: str
    """Random and unique to these tables."""


async def read(tx: Transaction) -> Installation | None:
    """None where the tables were made and never stamped."""
    schema = tx.tables.schema
    rows = await tx.rows(select(schema.c.version, schema.c.oldest_code, schema.c.installation))
    return Installation(*rows[0]) if rows else None
