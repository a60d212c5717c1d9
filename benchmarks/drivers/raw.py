"""asyncpg without a queue library: what PostgreSQL gives for the least that a queue must do."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg
from sqlalchemy import make_url

from ..tally import Tally

CLIENTS = 16
TABLES = """
CREATE TABLE raw_tasks (
    position bigserial PRIMARY KEY, id text UNIQUE, queue text, payload text, state text
);
CREATE INDEX raw_pending ON raw_tasks (queue, position) WHERE state = 'pending';
CREATE TABLE raw_results (id text PRIMARY KEY, queue text, payload text);
"""
INSERT = "INSERT INTO raw_tasks (id, queue, payload, state) VALUES ($1, $2, $3, 'pending')"
CLAIM = """
WITH picked AS MATERIALIZED (
    SELECT position FROM raw_tasks WHERE queue = $1 AND state = 'pending'
    ORDER BY position LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE raw_tasks SET state = 'claimed' FROM picked WHERE raw_tasks.position = picked.position
RETURNING id, payload
"""
FINISH = """
WITH done AS (DELETE FROM raw_tasks WHERE id = ANY($1::text[]) RETURNING id, queue, payload)
INSERT INTO raw_results (id, queue, payload) SELECT id, queue, payload FROM done
"""


def plain_url(url: str) -> str:
    """A URL of SQLAlchemy as drivers alone know it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


class RawDriver:
    """Commits of single rows, COPY in bulk, and claims finished a batch at a time."""

    def __init__(self, url: str, queue: str) -> None:
        self._url = plain_url(url)
        self._queue = queue
        self._pool: Any = None

    async def open(self) -> None:
        self._pool = await asyncpg.create_pool(self._url, min_size=1, max_size=CLIENTS)

    async def close(self) -> None:
        await self._pool.close()

    def build(self, count: int, *, stamped: bool = False) -> list[tuple[str, str, str]]:
        # As long as sheppy's payload of a task without arguments.
        body = json.dumps({"stamped": stamped, "filling": "." * 700})
        return [(str(uuid.uuid4()), self._queue, body) for _ in range(count)]

    async def add(self, task: tuple[str, str, str]) -> None:
        async with self._pool.acquire() as connection:
            await connection.execute(INSERT, *task)

    async def add_many(self, tasks: Sequence[tuple[str, str, str]]) -> None:
        async with self._pool.acquire() as connection:
            await connection.copy_records_to_table(
                "raw_tasks",
                records=[(*task, "pending") for task in tasks],
                columns=["id", "queue", "payload", "state"],
            )

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        assert tally is not None
        async with self._pool.acquire() as connection:
            while True:
                rows = await connection.fetch(CLAIM, self._queue, concurrency)
                await connection.execute(FINISH, [row["id"] for row in rows])
                tally.add(len(rows))


async def install(url: str) -> None:
    """Make the tables."""
    connection = await asyncpg.connect(plain_url(url))
    try:
        await connection.execute(TABLES)
    finally:
        await connection.close()
