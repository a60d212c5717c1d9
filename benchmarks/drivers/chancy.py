"""chancy, with its executor for async jobs, as its default starts processes, and eager polling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from chancy import Chancy, Job, Queue, Worker

from ..tally import Tally
from ._peers import count_in, done
from .raw import plain_url


async def job(*, number: int | None = None) -> None:
    """What the worker runs."""
    done(number)


class ChancyDriver:
    """A Chancy, and its Worker."""

    def __init__(self, url: str, queue: str) -> None:
        # Its own logger writes several lines for each job to the terminal.
        self._app: Any = Chancy(plain_url(url), log=logging.getLogger(__name__))
        self._queue = queue

    async def open(self) -> None:
        await self._app.__aenter__()

    async def close(self) -> None:
        await self._app.__aexit__(None, None, None)

    def build(self, count: int, *, stamped: bool = False) -> list[Any]:
        numbers = [{"number": number} if stamped else {} for number in range(count)]
        return [Job.from_func(job, queue=self._queue, kwargs=each) for each in numbers]

    async def add(self, task: Any) -> None:
        await self._app.push(task)

    async def add_many(self, tasks: Sequence[Any]) -> None:
        async for _ in self._app.push_many(list(tasks)):
            pass

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        count_in(tally)
        await self._app.declare(
            Queue(
                self._queue,
                concurrency=concurrency,
                executor=Chancy.Executor.Async,
                # Without it a queue with a backlog moves on every five seconds.
                eager_polling=True,
            ),
            upsert=True,
        )
        async with Worker(self._app, shutdown_timeout=1, register_signal_handlers=False) as worker:
            await worker.wait_for_shutdown()


async def install(url: str) -> None:
    """Make its tables."""
    async with Chancy(plain_url(url)) as app:
        await app.migrate()
