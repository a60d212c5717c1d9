"""Leases, receipts and chores."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.sql import quoted_name

from sheppy_sql.migrate import add_column, create_index, names_in_use, short_locks, stamp

revision = "sheppy_sql_0002"
down_revision = "sheppy_sql_0001"
branch_labels = None
depends_on = None

VERSION = 2
OLDEST_CODE = 1
"""Older code leaves the new columns to their defaults, and its claims to their age."""

TABLES = ("consumers", "receipts", "chores")


def key(name: str) -> sa.Column[Any]:
    collated = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, collated, nullable=False)


def moment(name: str, *, nullable: bool = True) -> sa.Column[Any]:
    kind = sa.DateTime(timezone=True).with_variant(sa.Text(), "sqlite")
    return sa.Column(name, kind, nullable=nullable)


def whole(name: str) -> quoted_name:
    """A name that Alembic's ALTER TABLE does not take apart at its dots."""
    return quoted_name(name, quote=True)


def names() -> tuple[quoted_name | None, str]:
    """The schema and the prefix."""
    schema, prefix = names_in_use()
    return None if schema is None else whole(schema), prefix


@short_locks
def upgrade() -> None:
    schema, prefix = names()

    def create(name: str, *columns: sa.Column[Any], primary_key: str) -> None:
        constraint = sa.PrimaryKeyConstraint(primary_key, name=f"{prefix}{name}_pkey")
        op.create_table(prefix + name, *columns, constraint, schema=schema)

    # First, as both can be done twice: an index that is built CONCURRENTLY commits.
    add_column(
        whole(f"{prefix}tasks"),
        sa.Column("crashes", sa.Integer, nullable=False, server_default=sa.text("0")),
        schema=schema,
    )
    suspect = sa.text("state = 'pending' AND crashes > 0")
    create_index(
        f"{prefix}tasks_suspect",
        f"{prefix}tasks",
        ["queue", "position"],
        schema=schema,
        postgresql_where=suspect,
        sqlite_where=suspect,
    )
    op.add_column(whole(f"{prefix}workflows"), moment("updated_at"), schema=schema)
    create(
        "consumers",
        key("id"),
        moment("heartbeat_at", nullable=False),
        moment("expires_at", nullable=False),
        moment("loop_turned_at"),
        sa.Column("on_crash", sa.Text, nullable=False),
        sa.Column("max_crashes", sa.Integer, nullable=False),
        sa.Column("hostname", sa.Text),
        sa.Column("boot_id", sa.Text),
        sa.Column("pid_namespace", sa.Text),
        sa.Column("pid", sa.Integer),
        sa.Column("process_started", sa.Text),
        primary_key="id",
    )
    create(
        "receipts",
        sa.Column("token", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("answer", sa.Text, nullable=False),
        moment("created_at", nullable=False),
        primary_key="token",
    )
    op.create_index(f"{prefix}receipts_age", f"{prefix}receipts", ["created_at"], schema=schema)
    create("chores", key("name"), moment("due_at", nullable=False), primary_key="name")
    stamp(VERSION, OLDEST_CODE)


@short_locks
def downgrade() -> None:
    schema, prefix = names()
    for name in reversed(TABLES):
        op.drop_table(prefix + name, schema=schema)
    op.drop_index(f"{prefix}tasks_suspect", f"{prefix}tasks", schema=schema)
    op.drop_column(whole(f"{prefix}workflows"), "updated_at", schema=schema)
    op.drop_column(whole(f"{prefix}tasks"), "crashes", schema=schema)
    stamp(1, 1)
