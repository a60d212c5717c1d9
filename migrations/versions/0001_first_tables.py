"""The first tables."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from sheppy_sql.migrate import create_schema, names_in_use, short_locks

revision = "sheppy_sql_0001"
down_revision = None
branch_labels = ("sheppy_sql",)
depends_on = None

VERSION = 1
OLDEST_CODE = 1

TABLES = (
    "tasks",
    "scheduled_tasks",
    "results",
    "crons",
    "workflows",
    "workflow_tasks",
    "rate_limits",
    "rate_limit_entries",
    "queues",
    "schema",
)
POSITIONS_INCREMENT = 100_000
SCHEDULE_STORAGE = "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000"
TASKS_STORAGE = f"fillfactor = 70, {SCHEDULE_STORAGE}, autovacuum_analyze_scale_factor = 0.05"


def key(name: str) -> sa.Column[Any]:
    collated = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, collated, nullable=False)


def moment(name: str, *, nullable: bool = True) -> sa.Column[Any]:
    kind = sa.DateTime(timezone=True).with_variant(sa.Text(), "sqlite")
    return sa.Column(name, kind, nullable=nullable)


@short_locks
def upgrade() -> None:
    schema, prefix = names_in_use()
    create_schema()
    postgresql = op.get_context().dialect.name == "postgresql"

    def create(
        name: str, *columns: sa.Column[Any], primary_key: tuple[str, ...], **kw: Any
    ) -> None:
        constraint = sa.PrimaryKeyConstraint(*primary_key, name=f"{prefix}{name}_pkey")
        op.create_table(prefix + name, *columns, constraint, schema=schema, **kw)

    def store(table: str, parameters: str) -> None:
        # SQLAlchemy 2.0 knows no storage parameters.
        name = op.get_context().dialect.identifier_preparer.format_table(
            sa.table(prefix + table, schema=schema)
        )
        alter = sa.DDL(f"ALTER TABLE {name.replace('%', '%%')} SET ({parameters})")  # type: ignore[no-untyped-call]  # not yet typed
        op.execute(alter)

    def index(table: str, name: str, *columns: str, **where: str) -> None:
        predicates: dict[str, Any] = {
            f"{dialect}_where": sa.text(sql) for dialect, sql in where.items()
        }
        op.create_index(
            f"{prefix}{name}",
            prefix + table,
            list(columns),
            schema=schema,
            **predicates,
        )

    create(
        "tasks",
        key("queue"),
        key("id"),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger),
        sa.Column("owner", sa.Text),
        sa.Column("claim_token", sa.BigInteger),
        moment("heartbeat_at"),
        sa.Column("append_token", sa.BigInteger),
        sa.Column("func", sa.Text),
        sa.Column("status", sa.Text),
        moment("created_at"),
        primary_key=("queue", "id"),
    )
    index("tasks", "tasks_pending", "queue", "position", postgresql="state = 'pending'")
    index(
        "tasks",
        "tasks_claimed",
        "owner",
        "claim_token",
        postgresql="state = 'claimed'",
        sqlite="state = 'claimed'",
    )
    create(
        "scheduled_tasks",
        key("queue"),
        key("task_id"),
        moment("run_at", nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("lease_token", sa.BigInteger),
        primary_key=("queue", "task_id"),
    )
    index("scheduled_tasks", "scheduled_tasks_due", "queue", "run_at")
    create(
        "results",
        key("queue"),
        key("id"),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("status", sa.Text),
        sa.Column("func", sa.Text),
        sa.Column("claim_token", sa.BigInteger),
        sa.Column("append_token", sa.BigInteger),
        moment("finished_at", nullable=False),
        moment("expires_at"),
        primary_key=("queue", "id"),
    )
    index(
        "results",
        "results_expiry",
        "expires_at",
        postgresql="expires_at IS NOT NULL",
        sqlite="expires_at IS NOT NULL",
    )
    create(
        "crons",
        key("queue"),
        key("id"),
        sa.Column("expression", sa.Text),
        sa.Column("payload", sa.Text, nullable=False),
        moment("created_at", nullable=False),
        primary_key=("queue", "id"),
    )
    create(
        "workflows",
        key("queue"),
        key("id"),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("finished", sa.Boolean, nullable=False),
        moment("created_at", nullable=False),
        primary_key=("queue", "id"),
    )
    index(
        "workflows",
        "workflows_unfinished",
        "queue",
        postgresql="NOT finished",
        sqlite="NOT finished",
    )
    create(
        "workflow_tasks",
        key("queue"),
        key("workflow_id"),
        key("task_id"),
        primary_key=("queue", "workflow_id", "task_id"),
    )
    create(
        "rate_limits",
        key("queue"),
        key("key"),
        moment("next_slot_at"),
        moment("window_started_at"),
        sa.Column("window_count", sa.BigInteger, nullable=False),
        primary_key=("queue", "key"),
    )
    create(
        "rate_limit_entries",
        key("queue"),
        key("key"),
        moment("acquired_at", nullable=False),
        key("task_id"),
        primary_key=("queue", "key", "acquired_at", "task_id"),
    )
    create("queues", key("name"), primary_key=("name",))
    create(
        "schema",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("oldest_code", sa.Integer, nullable=False),
        sa.Column("installation", sa.Text, nullable=False),
        primary_key=("id",),
    )
    if postgresql:
        store("tasks", TASKS_STORAGE)
        store("scheduled_tasks", SCHEDULE_STORAGE)
        positions = sa.Sequence(f"{prefix}positions", increment=POSITIONS_INCREMENT, schema=schema)
        op.execute(sa.schema.CreateSequence(positions))
    stamp = sa.table(
        f"{prefix}schema",
        *(sa.column(name) for name in ("id", "version", "oldest_code", "installation")),
        schema=schema,
    )
    random = (
        sa.cast(sa.func.gen_random_uuid(), sa.Text)
        if postgresql
        else sa.func.lower(sa.func.hex(sa.func.randomblob(16)))
    )
    op.execute(
        stamp.insert().values(
            id=sa.literal(1, sa.Integer),
            version=sa.literal(VERSION, sa.Integer),
            oldest_code=sa.literal(OLDEST_CODE, sa.Integer),
            installation=random,
        )
    )


@short_locks
def downgrade() -> None:
    schema, prefix = names_in_use()
    for name in reversed(TABLES):
        op.drop_table(prefix + name, schema=schema)
    if op.get_context().dialect.name == "postgresql":
        op.execute(sa.schema.DropSequence(sa.Sequence(f"{prefix}positions", schema=schema)))
