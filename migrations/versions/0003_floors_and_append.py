"""Floors for taking tasks, and a function that appends them."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.sql import quoted_name

from sheppy_sql.migrate import (
    add_column,
    as_string,
    create_index,
    execute,
    names_in_use,
    quoted,
    short_locks,
    stamp,
)

revision = "sheppy_sql_0003"
down_revision = "sheppy_sql_0002"
branch_labels = None
depends_on = None

VERSION = 3
OLDEST_CODE = 1
"""Older code leaves the new columns to their defaults, and does without the function."""

FLOORS = (("tasks", "pending_xid"), ("scheduled_tasks", "due_xid"))
QUEUE = 'queue COLLATE "POSIX"'
XID = "pg_current_xact_id()::text::bigint"

ARRAYS = "text[], text[], text[], text[], timestamptz[], bigint[]"
ARGUMENTS = f"text, bigint, text, boolean, {ARRAYS}, text, text"

# Its statements each have a snapshot of their own: an INSERT that has waited for a task to end does
# not see the result that has taken its place, the SELECT after it does. Asked again under the same
# token, it answers the same.
APPEND = """
DECLARE
    of_queue ALIAS FOR $1;
    token ALIAS FOR $2;
    lock_timeout ALIAS FOR $3;
    registers ALIAS FOR $4;
    ids ALIAS FOR $5;
    channel ALIAS FOR $11;
    notice ALIAS FOR $12;
    stored text[];
    taken text[];
BEGIN
    IF lock_timeout IS NOT NULL THEN
        PERFORM set_config('lock_timeout', lock_timeout, true);
    END IF;
    WITH added AS (
        INSERT INTO {tasks} (
            queue, id, payload, func, status, created_at, append_token, state, position
        )
        SELECT
            of_queue, item.id, item.payload, item.func, item.status, item.created_at, token,
            'pending', (SELECT nextval({positions})) + item.place
        FROM unnest($5, $6, $7, $8, $9, $10) WITH ORDINALITY
            AS item (id, payload, func, status, created_at, place, ordinal)
        ORDER BY item.ordinal
        ON CONFLICT DO NOTHING
        RETURNING id
    )
    SELECT coalesce(array_agg(added.id), '{{}}') INTO stored FROM added;
    taken := ARRAY(
        SELECT result.id FROM {results} AS result
        WHERE result.queue = of_queue AND result.id = ANY (stored) AND (
            result.append_token = token
            OR result.expires_at IS NULL
            OR result.expires_at > statement_timestamp()
            OR (
                result.id LIKE '________-____-5___-____-____________'
                AND result.expires_at > statement_timestamp() - interval '1 day'
            )
        )
    );
    IF cardinality(taken) > 0 THEN
        DELETE FROM {tasks} AS task
        WHERE task.queue = of_queue AND task.id = ANY (taken) AND task.append_token = token;
    END IF;
    IF channel IS NOT NULL THEN
        PERFORM pg_notify(channel, notice);
    END IF;
    IF registers THEN
        INSERT INTO {queues} (name) VALUES (of_queue) ON CONFLICT DO NOTHING;
    END IF;
    IF cardinality(taken) = 0 AND cardinality(stored) = cardinality(ids) THEN
        RETURN stored;
    END IF;
    RETURN ARRAY(
        SELECT task.id FROM {tasks} AS task
        WHERE task.queue = of_queue AND task.id = ANY (ids) AND task.append_token = token
        UNION
        SELECT result.id FROM {results} AS result
        WHERE result.queue = of_queue AND result.id = ANY (ids) AND result.append_token = token
    );
END
"""


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
        tables = {name: quoted(name) for name in ("tasks", "results", "queues")}
        source = as_string(APPEND.format(**tables, positions=as_string(quoted("positions"))))
        create = f"CREATE OR REPLACE FUNCTION {quoted('append')} ({ARGUMENTS}) RETURNS text[]"
        execute(f"{create} LANGUAGE plpgsql AS {source}")
    stamp(VERSION, OLDEST_CODE)


@short_locks
def downgrade() -> None:
    schema, prefix, postgresql = names()
    if postgresql:
        execute(f"DROP FUNCTION {quoted('append')} ({ARGUMENTS})")
    for table, column in reversed(FLOORS):
        if postgresql:
            op.drop_index(f"{prefix}{table}_{column}", f"{prefix}{table}", schema=schema)
        op.drop_column(whole(prefix + table), column, schema=schema)
    stamp(2, 1)
