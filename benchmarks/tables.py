"""Filling sheppy-sql's tables by SQL, past the backend, and leaving dead rows in them.

Rows are copies of one that the backend itself has written, so whatever columns its tables have
get plausible values; those with a default get that.
"""

from __future__ import annotations

from typing import Any

CHUNK = 100_000  # rows in one INSERT
CHURN = 1_000  # tasks in one transaction that leaves dead rows

# What differs from one copy to the next.
NEW_ID = "md5(number::text)::uuid::text"
COPIED = {
    "id": NEW_ID,
    "payload": f"replace(model.payload, model.id, {NEW_ID})",
    "position": "model.position + number",
}
COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped
  AND NOT atthasdef AND attidentity = ''
ORDER BY attnum
"""
CLAIM = """
UPDATE sheppy_tasks SET state = 'claimed', owner = 'benchmark', claim_token = -1,
                        heartbeat_at = now()
WHERE queue = $1 AND state = 'pending'
"""
SCHEDULE = """
INSERT INTO sheppy_scheduled_tasks (queue, task_id, run_at, kind)
SELECT queue, id, now(), 'due' FROM sheppy_tasks WHERE queue = $1 AND state = 'claimed'
"""
UNSCHEDULE = "DELETE FROM sheppy_scheduled_tasks WHERE queue = $1"
# Positions come from the sequence: none is beyond what it has given out.
ADVANCE = """
SELECT setval('sheppy_positions', greatest(last_value, (SELECT max(position) FROM sheppy_tasks)))
FROM sheppy_positions
"""
FINISH = """
WITH done AS (DELETE FROM sheppy_tasks WHERE queue = $1 AND owner = 'benchmark'
              RETURNING queue, id, payload, status, func, claim_token)
INSERT INTO sheppy_results (queue, id, payload, status, func, claim_token, finished_at)
SELECT queue, id, payload, status, func, claim_token, now() FROM done
"""


class Filler:
    """Writes rows of one queue on an asyncpg connection."""

    def __init__(self, connection: Any, queue: str) -> None:
        self._connection = connection
        self._queue = queue
        self._number = 1

    def skip(self, number: int) -> None:
        """Let ids differ from those that another filler has made of the first numbers."""
        self._number += number

    async def remember(self, table: str, row_id: str) -> None:
        """Take the row with this id as the model of all copies in its table."""
        await self._connection.execute(f"DROP TABLE IF EXISTS model_of_{table}")
        await self._connection.execute(
            f"CREATE TABLE model_of_{table} AS SELECT * FROM {table}"
            f" WHERE queue = '{self._queue}' AND id = '{row_id}'"
        )

    async def copy(self, table: str, count: int) -> None:
        """Add `count` copies of the model, 100,000 in a transaction."""
        columns = [row["attname"] for row in await self._connection.fetch(COLUMNS, table)]
        values = [COPIED.get(column, f"model.{column}") for column in columns]
        insert = f"""
            INSERT INTO {table} ({", ".join(columns)}) SELECT {", ".join(values)}
            FROM model_of_{table} AS model, generate_series($1::bigint, $2::bigint) AS number
        """
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            await self._connection.execute(insert, self._number, self._number + size - 1)
            self._number += size
        if table == "sheppy_tasks":
            await self._connection.execute(ADVANCE)

    async def churn(self, count: int) -> None:
        """Enqueue, claim, schedule, unschedule and finish `count` tasks, 1,000 at a time.

        Each leaves two dead rows in the tasks and one in the schedule, as one that was retried
        does.
        """
        for start in range(0, count, CHURN):
            await self.copy("sheppy_tasks", min(CHURN, count - start))
            for statement in (CLAIM, SCHEDULE, UNSCHEDULE, FINISH):
                await self._connection.execute(statement, self._queue)
