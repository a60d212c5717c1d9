"""The seam between the two databases: what they do differently, and nothing else."""

from __future__ import annotations

from .base import Dialect as Dialect
from .postgresql import PostgreSQL
from .sqlite import SQLite

_DIALECTS: dict[str, type[Dialect]] = {"postgresql": PostgreSQL, "sqlite": SQLite}


def dialect_named(name: str, *, prepared_statements: bool | None = None) -> Dialect:
    """The dialect for SQLAlchemy's name of it; one for each engine."""
    return _DIALECTS[name](prepared_statements=prepared_statements)
