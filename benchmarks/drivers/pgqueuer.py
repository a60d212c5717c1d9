"""pgqueuer, on an asyncpg pool for adding and one connection for its worker.

Its worker takes batches of 100, ten times its default: it is faster so. It keeps no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries

from ..tally import Tally
from ._peers import count_in, done
from .raw import CLIENTS, plain_url

BATCH = 100


class PgQueuerDriver:
    """A PgQueuer with one entrypoint, named as the queue."""

    def __init__(self, url: str, queue: str) -> None:
        self._url = plain_url(url)
        self._queue = queue
        self._pool: Any = None
        self._queries: Any = None

    async def open(self) -> None:
        self._pool = await asyncpg.create_pool(self._url, min_size=1, max_size=CLIENTS)
        self._queries = Queries(AsyncpgPoolDriver(self._pool))

    async def close(self) -> None:
        await self._pool.close()

    def build(self, count: int, *, stamped: bool = False) -> list[bytes | None]:
        return [str(number).encode() if stamped else None for number in range(count)]

    async def add(self, task: bytes | None) -> None:
        await self._queries.enqueue(self._queue, task)

    async def add_many(self, tasks: Sequence[bytes | None]) -> None:
        names = [self._queue] * len(tasks)
        await self._queries.enqueue(names, list(tasks), [0] * len(tasks))

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        count_in(tally)
        connection = await asyncpg.connect(self._url)
        try:
            app = PgQueuer(AsyncpgDriver(connection))

            async def job(job: Any) -> None:
                done(int(job.payload) if job.payload else None)

            app.entrypoint(self._queue)(job)
            await app.run(batch_size=BATCH)
        finally:
            await connection.close()


async def install(url: str) -> None:
    """Make its tables."""
    connection = await asyncpg.connect(plain_url(url))
    try:
        await Queries(AsyncpgDriver(connection)).install()
    finally:
        await connection.close()
