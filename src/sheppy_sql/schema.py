"""The tables, as SQLAlchemy sees them. The migrations make them; a test holds both equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Index,
    Integer,
    MetaData,
    Sequence,
    String,
    Table,
    Text,
    TextClause,
    event,
    literal_column,
    text,
)
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql import quoted_name
from sqlalchemy.types import NullType, TypeDecorator

from ._identifiers import check_identifier

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.engine import Dialect

SCHEMA_VERSION = 4
"""The schema this code needs; every migration stamps its own number into the `schema` table."""

DEFAULT_PREFIX = "sheppy_"

POSITION_STEP = 100_000
"""Positions that one append reserves, and so the most rows one statement may number."""

# Literals, not parameters: PostgreSQL uses a partial index only where the
# planner can prove its predicate, and it cannot prove one about a parameter.
PENDING = literal_column("'pending'", String)
CLAIMED = literal_column("'claimed'", String)
SCHEDULED = literal_column("'scheduled'", String)
IDLE = literal_column("'idle'", String)
UNFINISHED: ColumnElement[Any] = literal_column("NOT finished")
"""Without a type: of a Boolean, SQLAlchemy makes `.. = 1` for SQLite, and no index has that."""

UTC = literal_column("'UTC'", String)

XID = "pg_current_xact_id()::text::bigint"
"""Who makes a row takeable: PostgreSQL's floors ask for it. A bigint, as few tools know xid8."""

# What an index for floors is for must look different to the planner from what other indexes are
# for. It would otherwise take one of those where it believes that few rows are left, and walk
# over all that was taken.
ELSEWHERE = "POSIX"
"""A collation: byte by byte, as C."""
HIDDEN_QUEUE = f'queue COLLATE "{ELSEWHERE}"'
HIDDEN_RUN_AT = "timezone('UTC', run_at)"

# Small, hot and churning: leave room on the page, vacuum early.
SCHEDULE_STORAGE = "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000"
TASKS_STORAGE = f"fillfactor = 70, {SCHEDULE_STORAGE}, autovacuum_analyze_scale_factor = 0.05"
RESULTS_STORAGE = (
    "autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05, "
    "autovacuum_analyze_scale_factor = 0.05"
)

NOT_COMPARED = "sheppy_sql_not_compared"
"""In the `info` of an index that Alembic's autogenerate does not understand."""

DUE = "due"
LEASED = "leased"
PARKED = "parked"

NEVER = datetime(9999, 1, 1, tzinfo=timezone.utc)
"""When a workflow was touched whose tasks were cleared: nobody is to add them again."""


def sqlite_timestamp(value: datetime) -> str:
    """The text SQLite keeps for an aware datetime: UTC, sorted as time sorts."""
    return value.astimezone(timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")


class Timestamp(TypeDecorator[datetime]):
    """An aware UTC datetime: `timestamptz` on PostgreSQL, sortable text on SQLite."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return sqlite_timestamp(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None or isinstance(value, datetime):
            return value
        return datetime.fromisoformat(value).replace(tzinfo=timezone.utc)


# Collation C: the order of bytes, which is the order Python sorts in, so locks
# are taken in one order whoever sorts; and it compares faster.
Key = Text().with_variant(Text(collation="C"), "postgresql")


class Routine(NamedTuple):
    """A function on a server, as SQLAlchemy names it."""

    name: quoted_name
    schema: tuple[quoted_name, ...]


@dataclass(frozen=True, slots=True)
class Tables:
    """Every table of one installation; `schema` and `prefix` keep installations apart."""

    metadata: MetaData
    tasks: Table
    scheduled_tasks: Table
    results: Table
    crons: Table
    workflows: Table
    workflow_tasks: Table
    rate_limits: Table
    rate_limit_entries: Table
    queues: Table
    consumers: Table
    receipts: Table
    chores: Table
    schema: Table
    positions: Sequence
    append: Routine
    made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Statements that are made once; see made_once of the stores."""


def build_tables(schema: str | None = None, prefix: str = DEFAULT_PREFIX) -> Tables:
    """The tables under `schema` (PostgreSQL's default search path if None) and `prefix`.

    Raises ValueError where a name would not survive in PostgreSQL.
    """
    check_identifier("schema", schema)
    check_identifier("table_prefix", prefix)
    metadata = MetaData(schema=schema, naming_convention={"pk": "%(table_name)s_pkey"})

    def table(name: str, *items: SchemaItem, **kw: Any) -> Table:
        return Table(prefix + name, metadata, *items, **kw)

    def index(name: str, *columns: str, **where: str) -> Index:
        conditions: dict[str, Any] = {f"{db}_where": text(sql) for db, sql in where.items()}
        return Index(prefix + name, *columns, **conditions)

    def floor_index(name: str, *columns: str | TextClause, **where: str) -> Index:
        conditions: dict[str, Any] = {f"{db}_where": text(sql) for db, sql in where.items()}
        return Index(prefix + name, *columns, **conditions, info={NOT_COMPARED: True}).ddl_if(
            dialect="postgresql"
        )

    def key(name: str) -> Column[str]:
        return Column(name, Key, primary_key=True)

    def place() -> Column[Any]:
        # Where PostgreSQL keeps this version of the row; it makes the column by itself.
        return Column("ctid", NullType, system=True)

    tables = Tables(
        metadata=metadata,
        tasks=table(
            "tasks",
            key("queue"),
            key("id"),
            Column("payload", Text, nullable=False),
            Column("state", Text, nullable=False),
            # The place in line; kept while claimed, so that a task handed back keeps it.
            Column("position", BigInteger),
            Column("owner", Text),
            Column("claim_token", BigInteger),
            Column("heartbeat_at", Timestamp),
            Column("append_token", BigInteger),
            Column("func", Text),
            Column("status", Text),
            Column("created_at", Timestamp),
            # How often a worker died that had taken the task; from the first time on it is
            # taken alone.
            Column("crashes", Integer, nullable=False, server_default=text("0")),
            # Of the transaction that made it pending; unused on SQLite.
            Column("pending_xid", BigInteger),
            place(),
            # SQLite's covers every state: it also gives the last position taken.
            index("tasks_pending", "queue", "position", postgresql="state = 'pending'"),
            index(
                "tasks_claimed",
                "owner",
                "claim_token",
                postgresql="state = 'claimed'",
                sqlite="state = 'claimed'",
            ),
            # All but empty: whether there are any is asked every few seconds.
            index(
                "tasks_suspect",
                "queue",
                "position",
                postgresql="state = 'pending' AND crashes > 0",
                sqlite="state = 'pending' AND crashes > 0",
            ),
            floor_index(
                "tasks_pending_xid",
                "pending_xid",
                text(HIDDEN_QUEUE),
                "position",
                postgresql="state LIKE 'pending' AND crashes = 0",
            ),
        ),
        scheduled_tasks=table(
            "scheduled_tasks",
            key("queue"),
            key("task_id"),
            Column("run_at", Timestamp, nullable=False),
            # due: waits for its time; leased: popped, its append has not come yet;
            # parked: failed, its retry has not been scheduled yet.
            Column("kind", Text, nullable=False),
            Column("lease_token", BigInteger),
            # Of the transaction that gave it its run_at; unused on SQLite.
            Column("due_xid", BigInteger),
            place(),
            index("scheduled_tasks_due", "queue", "run_at"),
            floor_index(
                "scheduled_tasks_due_xid", "due_xid", text(HIDDEN_QUEUE), text(HIDDEN_RUN_AT)
            ),
        ),
        results=table(
            "results",
            key("queue"),
            key("id"),
            Column("payload", Text, nullable=False),
            Column("status", Text),
            Column("func", Text),
            Column("claim_token", BigInteger),
            Column("append_token", BigInteger),
            Column("finished_at", Timestamp, nullable=False),
            Column("expires_at", Timestamp),
            place(),
            index(
                "results_expiry",
                "expires_at",
                postgresql="expires_at IS NOT NULL",
                sqlite="expires_at IS NOT NULL",
            ),
        ),
        crons=table(
            "crons",
            key("queue"),
            key("id"),
            Column("expression", Text),
            Column("payload", Text, nullable=False),
            Column("created_at", Timestamp, nullable=False),
        ),
        workflows=table(
            "workflows",
            key("queue"),
            key("id"),
            Column("payload", Text, nullable=False),
            Column("finished", Boolean, nullable=False),
            Column("created_at", Timestamp, nullable=False),
            Column("updated_at", Timestamp),
            index(
                "workflows_unfinished", "queue", postgresql="NOT finished", sqlite="NOT finished"
            ),
        ),
        workflow_tasks=table("workflow_tasks", key("queue"), key("workflow_id"), key("task_id")),
        rate_limits=table(
            "rate_limits",
            key("queue"),
            key("key"),
            Column("next_slot_at", Timestamp),
            Column("window_started_at", Timestamp),
            Column("window_count", BigInteger, nullable=False),
        ),
        rate_limit_entries=table(
            "rate_limit_entries",
            key("queue"),
            key("key"),
            Column("acquired_at", Timestamp, primary_key=True),
            key("task_id"),
        ),
        queues=table("queues", Column("name", Key, primary_key=True)),
        # A backend instance that takes tasks. Only its own heartbeat writes to the row.
        consumers=table(
            "consumers",
            key("id"),
            Column("heartbeat_at", Timestamp, nullable=False),
            # When it counts as dead, unless it beats again before.
            Column("expires_at", Timestamp, nullable=False),
            Column("loop_turned_at", Timestamp),
            Column("on_crash", Text, nullable=False),
            Column("max_crashes", Integer, nullable=False),
            # What tells a process from every other one of its machine, by which its death
            # shows at once; null where the system cannot tell.
            Column("hostname", Text),
            Column("boot_id", Text),
            Column("pid_namespace", Text),
            Column("pid", Integer),
            Column("process_started", Text),
        ),
        # What a rare call answered, so that it answers the same again where the first
        # answer was lost.
        receipts=table(
            "receipts",
            Column("token", BigInteger, primary_key=True, autoincrement=False),
            Column("answer", Text, nullable=False),
            Column("created_at", Timestamp, nullable=False),
            index("receipts_age", "created_at"),
        ),
        # What one instance at a time does now and then: whoever finds it due takes it.
        chores=table("chores", key("name"), Column("due_at", Timestamp, nullable=False)),
        schema=table(
            "schema",
            Column("id", Integer, primary_key=True, autoincrement=False),
            Column("version", Integer, nullable=False),
            Column("oldest_code", Integer, nullable=False),
            # Random, so that two ways to spell one database's URL are known to be one.
            Column("installation", Text, nullable=False),
        ),
        # One value is a whole block of positions: see POSITION_STEP.
        positions=Sequence(f"{prefix}positions", increment=POSITION_STEP, metadata=metadata),
        append=_routine(schema, f"{prefix}append"),
    )
    _alter(tables.tasks, f"SET ({TASKS_STORAGE})", f"ALTER pending_xid SET DEFAULT {XID}")
    _alter(tables.scheduled_tasks, f"SET ({SCHEDULE_STORAGE})", f"ALTER due_xid SET DEFAULT {XID}")
    _alter(tables.results, f"SET ({RESULTS_STORAGE})")
    for name in _names(metadata, prefix):
        check_identifier("table_prefix", name)
    return tables


def _routine(schema: str | None, name: str) -> Routine:
    # SQLAlchemy formats what it makes of the names once more.
    whole, *within = (
        quoted_name(part.replace("%", "%%"), quote=True) for part in (name, schema) if part
    )
    return Routine(whole, tuple(within))


def version_table(prefix: str) -> str:
    """The table in which Alembic keeps our revision, apart from the application's own."""
    return f"{prefix}alembic_version"


def _alter(table: Table, *actions: str) -> None:
    # SQLAlchemy 2.0 knows no storage parameters, and no default of one database alone.
    alter = DDL(f"ALTER TABLE %(fullname)s {', '.join(actions)}")  # type: ignore[no-untyped-call]  # not yet typed
    event.listen(table, "after_create", alter.execute_if(dialect="postgresql"))


def _names(metadata: MetaData, prefix: str) -> list[str]:
    names = [version_table(prefix), f"{version_table(prefix)}_pkc", f"{prefix}positions"]
    names.append(f"{prefix}append")
    for table in metadata.tables.values():
        names += [table.name, f"{table.name}_pkey", *(str(index.name) for index in table.indexes)]
    return names
