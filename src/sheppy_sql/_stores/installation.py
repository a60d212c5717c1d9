"""The one row that says which version the tables have."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sheppy import BackendError
from sqlalchemy import select

from .._errors import UPGRADE_HINT
from ..schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from .._transaction import Transaction


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


def check(found: Installation | None) -> Installation:
    """What was found, if this code can work on it; BackendError says what to run."""
    if found is None:
        raise BackendError(f"Failed to connect: tables are missing; {UPGRADE_HINT}")
    if found.version < SCHEMA_VERSION:
        raise BackendError(
            f"Failed to connect: the tables have version {found.version}, this sheppy-sql needs "
            f"{SCHEMA_VERSION}; {UPGRADE_HINT}"
        )
    if found.oldest_code > SCHEMA_VERSION:
        raise BackendError(
            f"Failed to connect: the tables have version {found.version}, which this sheppy-sql "
            f"(made for {SCHEMA_VERSION}) can no longer use; run "
            '"pip install --upgrade sheppy-sql"'
        )
    return found
