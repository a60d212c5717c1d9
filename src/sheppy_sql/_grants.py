"""What a role needs that works with the tables, and changes none."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.dialects.postgresql.base import PGDialect

from ._names import Names
from .schema import build_tables
from .schema import version_table as version_table_of


def grants(role: str, names: Names, *, version_table: bool = True) -> Iterator[str]:
    """The statements, for PostgreSQL; `version_table`: whether Alembic's is beside the tables.

    The role is named as pg_roles has it. ValueError where a name cannot be one.
    """
    if not isinstance(role, str) or not role or "\0" in role:
        raise ValueError("role must be the name of a role of PostgreSQL, and not empty")
    tables = build_tables(*names)
    quote = PGDialect().identifier_preparer.quote  # type: ignore[no-untyped-call]  # not yet typed

    def quoted(name: str) -> str:
        return f"{quote(names.schema)}.{quote(name)}" if names.schema else quote(name)

    to = f"TO {quote(role)}"
    if names.schema:
        yield f"GRANT USAGE ON SCHEMA {quote(names.schema)} {to}"
    # Only migrations write the version.
    changed = [t.name for t in tables.metadata.sorted_tables if t is not tables.schema]
    yield f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(map(quoted, changed))} {to}"
    read = [tables.schema.name, *([version_table_of(names.prefix)] if version_table else [])]
    yield f"GRANT SELECT ON {', '.join(map(quoted, read))} {to}"
    yield f"GRANT USAGE ON SEQUENCE {quoted(tables.positions.name)} {to}"
    yield f"GRANT EXECUTE ON FUNCTION {quoted(f'{names.prefix}append')} {to}"
