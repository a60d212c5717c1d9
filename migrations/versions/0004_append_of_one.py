"""A faster append of one task, and autovacuum for results."""

from alembic import op

from sheppy_sql.migrate import as_string, execute, quoted, short_locks, stamp

revision = "sheppy_sql_0004"
down_revision = "sheppy_sql_0003"
branch_labels = None
depends_on = None

VERSION = 4
OLDEST_CODE = 1

# It grows until its first rows expire, and then loses as many as it gets. By the server's own
# settings a fifth of it would have to change before it is vacuumed.
RESULTS_STORAGE = (
    "autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05, "
    "autovacuum_analyze_scale_factor = 0.05"
)

ARRAYS = "text[], text[], text[], text[], timestamptz[], bigint[]"
ARGUMENTS = f"text, bigint, text, boolean, {ARRAYS}, text, text"

IS_TAKEN = """
(
    result.append_token = token
    OR result.expires_at IS NULL
    OR result.expires_at > statement_timestamp()
    OR (
        result.id LIKE '________-____-5___-____-____________'
        AND result.expires_at > statement_timestamp() - interval '1 day'
    )
)
"""

# As in revision 0003, with the same answers. One task, as most calls bring, has statements of its
# own, and the others are searched for one by one, which OFFSET 0 keeps from being made a join: for
# `= ANY` of an array the server makes a new plan at each call, and may read all of the queue where
# its statistics are of a drained one. And nothing is performed that can be assigned, which needs no
# executor.
APPEND = """
DECLARE
    of_queue ALIAS FOR $1;
    token ALIAS FOR $2;
    lock_timeout ALIAS FOR $3;
    registers ALIAS FOR $4;
    ids ALIAS FOR $5;
    channel ALIAS FOR $11;
    notice ALIAS FOR $12;
    own_xid bigint;
    done text;
    stored text[] := '{{}}';
    taken text[] := '{{}}';
BEGIN
    IF lock_timeout IS NOT NULL THEN
        done := set_config('lock_timeout', lock_timeout, true);
    END IF;
    own_xid := pg_current_xact_id()::text::bigint;
    IF cardinality(ids) = 1 THEN
        INSERT INTO {tasks} (
            queue, id, payload, func, status, created_at, append_token, state, position,
            pending_xid
        )
        VALUES (
            of_queue, ids[1], $6[1], $7[1], $8[1], $9[1], token, 'pending',
            nextval({positions}) + $10[1], own_xid
        )
        ON CONFLICT DO NOTHING;
        IF FOUND THEN
            stored := ids;
        END IF;
        IF EXISTS (
            SELECT FROM {results} AS result
            WHERE result.queue = of_queue AND result.id = ids[1] AND {is_taken}
        ) THEN
            taken := stored;
        END IF;
    ELSE
        WITH added AS (
            INSERT INTO {tasks} (
                queue, id, payload, func, status, created_at, append_token, state, position,
                pending_xid
            )
            SELECT
                of_queue, item.id, item.payload, item.func, item.status, item.created_at, token,
                'pending', (SELECT nextval({positions})) + item.place, own_xid
            FROM unnest($5, $6, $7, $8, $9, $10) WITH ORDINALITY
                AS item (id, payload, func, status, created_at, place, ordinal)
            ORDER BY item.ordinal
            ON CONFLICT DO NOTHING
            RETURNING id
        )
        SELECT coalesce(array_agg(added.id), '{{}}') INTO stored FROM added;
        taken := ARRAY(
            SELECT ended.id FROM unnest(stored) AS new (id), LATERAL (
                SELECT result.id FROM {results} AS result
                WHERE result.queue = of_queue AND result.id = new.id AND {is_taken}
                OFFSET 0
            ) AS ended
        );
    END IF;
    IF cardinality(taken) > 0 THEN
        -- By their places on disk, which nobody else can change: they are not committed.
        DELETE FROM {tasks} WHERE ctid = ANY (ARRAY(
            SELECT own.place FROM unnest(taken) AS again (id), LATERAL (
                SELECT task.ctid AS place FROM {tasks} AS task
                WHERE task.queue = of_queue AND task.id = again.id AND task.append_token = token
                OFFSET 0
            ) AS own
        ));
    END IF;
    IF channel IS NOT NULL THEN
        done := pg_notify(channel, notice);
    END IF;
    IF registers THEN
        INSERT INTO {queues} (name) VALUES (of_queue) ON CONFLICT DO NOTHING;
    END IF;
    IF cardinality(taken) = 0 AND cardinality(stored) = cardinality(ids) THEN
        RETURN stored;
    END IF;
    RETURN ARRAY(
        SELECT mine.id FROM unnest(ids) AS given (id), LATERAL (
            SELECT task.id FROM {tasks} AS task
            WHERE task.queue = of_queue AND task.id = given.id AND task.append_token = token
            UNION
            SELECT result.id FROM {results} AS result
            WHERE result.queue = of_queue AND result.id = given.id AND result.append_token = token
            OFFSET 0
        ) AS mine
    );
END
"""


@short_locks
def upgrade() -> None:
    if is_postgresql():
        tables = {name: quoted(name) for name in ("tasks", "results", "queues")}
        positions = as_string(quoted("positions"))
        source = as_string(APPEND.format(**tables, positions=positions, is_taken=IS_TAKEN.strip()))
        create = f"CREATE OR REPLACE FUNCTION {quoted('append')} ({ARGUMENTS}) RETURNS text[]"
        execute(f"{create} LANGUAGE plpgsql AS {source}")
        execute(f"ALTER TABLE {quoted('results')} SET ({RESULTS_STORAGE})")
    stamp(VERSION, OLDEST_CODE)


@short_locks
def downgrade() -> None:
    # The function stays: it does what that of the revision before does.
    if is_postgresql():
        settings = ", ".join(setting.split(" = ")[0] for setting in RESULTS_STORAGE.split(", "))
        execute(f"ALTER TABLE {quoted('results')} RESET ({settings})")
    stamp(3, 1)


def is_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"
