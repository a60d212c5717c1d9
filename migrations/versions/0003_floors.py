"""Floors for taking tasks."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.sql import quoted_name

from sheppy_sql.migrate import add_column, create_index, names_in_use, short_locks

revision = "sheppy_sql_0003"
down_revision = "sheppy_sql_0002"
branch_labels = None
depends_on = None

VERSION = 3
OLDEST_CODE = 1
"""Older code leaves the new columns to their defaults."""

FLOORS = (("tasks", "pending_xid"), ("scheduled_tasks", "due_xid"))
QUEUE = 'queue COLLATE "POSIX"'
XID = "pg_current_xact_id()::text::bigint"


def whole(name: str) -> quoted_name:
    """A name that Alembic's ALTER TABLE does not take apart at its dots."""
    return quoted_name(name, quote=True)


def names() -> tuple[quoted_name | None, str, bool]:
    """The schema, the prefix, and whether it is PostgreSQL."""
    schema, prefix = names_in_use()
    postgresql = op.get_context().dialect.name == "postgresql"
    return None if schema is None else whole(schema), prefix, postgresql


@short_locks
def upgrade() -> None:
    schema, prefix, postgresql = names()
    # First, as all this can be done twice: an index that is built CONCURRENTLY commits.
    for table, column in FLOORS:
        # Not volatile, so that the rows that are there get it without being written.
        default: dict[str, Any] = {"server_default": sa.text(XID)} if postgresql else {}
        added: sa.Column[Any] = sa.Column(column, sa.BigInteger, **default)
        add_column(whole(prefix + table), added, schema=schema)
    if postgresql:
        create_index(
            f"{prefix}tasks_pending_xid",
            f"{prefix}tasks",
            ["pending_xid", sa.text(QUEUE), "position"],
            schema=schema,
            postgresql_where=sa.text("state LIKE 'pending' AND crashes = 0"),
        )
        create_index(
            f"{prefix}scheduled_tasks_due_xid",
            f"{prefix}scheduled_tasks",
            ["due_xid", sa.text(QUEUE), sa.text("timezone('UTC', run_at)")],
            schema=schema,
        )
    stamp(VERSION, OLDEST_CODE)


@short_locks
def downgrade() -> None:
    schema, prefix, postgresql = names()
    for table, column in reversed(FLOORS):
        if postgresql:
            op.drop_index(f"{prefix}{table}_{column}", f"{prefix}{table}", schema=schema)
        op.drop_column(whole(prefix + table), column, schema=schema)
    stamp(2, 1)


def stamp(version: int, oldest_code: int) -> None:
    schema, prefix = names_in_use()
    columns = [sa.column("version", sa.Integer), sa.column("oldest_code", sa.Integer)]
    table = sa.table(f"{prefix}schema", *columns, schema=schema)
    op.execute(table.update().values(version=version, oldest_code=oldest_code))
