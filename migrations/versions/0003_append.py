"""Append in one statement."""

import sqlalchemy as sa
from alembic import op

from sheppy_sql.migrate import names_in_use, short_locks

revision = "sheppy_sql_0003"
down_revision = "sheppy_sql_0002"
branch_labels = None
depends_on = None

VERSION = 3
OLDEST_CODE = 1
"""Older code does without the function."""

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


@short_locks
def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        names = quoted()
        body = APPEND.format(**names).replace("'", "''")
        create = f"CREATE OR REPLACE FUNCTION {names['append']} ({ARGUMENTS}) RETURNS text[]"
        op.execute(as_written(f"{create} LANGUAGE plpgsql AS '{body}'"))
    stamp(VERSION, OLDEST_CODE)


@short_locks
def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute(as_written(f"DROP FUNCTION {quoted()['append']} ({ARGUMENTS})"))
    stamp(2, 1)


def quoted() -> dict[str, str]:
    """The names, as SQL has them; the sequence's as a string."""
    schema, prefix = names_in_use()
    quote = op.get_context().dialect.identifier_preparer.quote_identifier

    def whole(name: str) -> str:
        return ".".join(quote(part) for part in (schema, prefix + name) if part)

    positions = whole("positions").replace("'", "''")
    names = {name: whole(name) for name in ("append", "tasks", "results", "queues")}
    return {**names, "positions": f"'{positions}'"}


def as_written(statement: str) -> sa.TextClause:
    """In which no colon begins a parameter."""
    return sa.text(statement.replace(":", r"\:"))


def stamp(version: int, oldest_code: int) -> None:
    schema, prefix = names_in_use()
    columns = [sa.column("version", sa.Integer), sa.column("oldest_code", sa.Integer)]
    table = sa.table(f"{prefix}schema", *columns, schema=schema)
    op.execute(table.update().values(version=version, oldest_code=oldest_code))
