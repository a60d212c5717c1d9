"""procrastinate, with psycopg's pool as it comes, and LISTEN on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import procrastinate

from ..tally import Tally
from ._peers import count_in, done
from .raw import plain_url


class ProcrastinateDriver:
    """An App, and its worker."""

    def __init__(self, url: str, queue: str) -> None:
        connector = procrastinate.PsycopgConnector(conninfo=plain_url(url))
        self._app = procrastinate.App(connector=connector)
        self._queue = queue

        async def job(number: int | None = None) -> None:
            done(number)

        self._task: Any = self._app.task(name="job", queue=queue)(job)

    async def open(self) -> None:
        await self._app.open_async()

    async def close(self) -> None:
        await self._app.close_async()

    def build(self, count: int, *, stamped: bool = False) -> list[dict[str, int]]:
        return [{"number": number} if stamped else {} for number in range(count)]

    async def add(self, task: dict[str, int]) -> None:
        await self._task.defer_async(**task)

    async def add_many(self, tasks: Sequence[dict[str, int]]) -> None:
        await self._task.batch_defer_async(*tasks)

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        count_in(tally)
        await self._app.run_worker_async(
            queues=[self._queue], concurrency=concurrency, install_signal_handlers=False
        )


async def install(url: str) -> None:
    """Make its tables."""
    connector = procrastinate.PsycopgConnector(conninfo=plain_url(url))
    async with procrastinate.App(connector=connector).open_async() as app:
        await app.schema_manager.apply_schema_async()
