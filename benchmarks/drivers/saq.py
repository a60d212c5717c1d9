"""SAQ on PostgreSQL, with its pool as it comes. It has no way to enqueue in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saq import Job, Queue, Worker

from ..tally import Tally
from ._peers import count_in, done
from .raw import plain_url


async def job(context: Any, *, number: int | None = None) -> None:
    """What the worker runs."""
    done(number)


class SaqDriver:
    """A Queue, and its Worker."""

    def __init__(self, url: str, queue: str) -> None:
        self._queue: Any = Queue.from_url(plain_url(url), name=queue)

    async def open(self) -> None:
        await self._queue.connect()

    async def close(self) -> None:
        await self._queue.disconnect()

    def build(self, count: int, *, stamped: bool = False) -> list[Any]:
        numbers = [{"number": number} if stamped else {} for number in range(count)]
        return [Job(function="job", kwargs=each) for each in numbers]

    async def add(self, task: Any) -> None:
        if await self._queue.enqueue(task) is None:
            raise RuntimeError("A job was refused")

    async def add_many(self, tasks: Sequence[Any]) -> None:
        for task in tasks:
            await self.add(task)

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        count_in(tally)
        worker: Any = Worker(self._queue, functions=[job], concurrency=concurrency)
        try:
            await worker.start()
        finally:
            await worker.stop()


async def install(url: str) -> None:
    """Make its tables, which it does when it connects."""
    driver = SaqDriver(url, "measured")
    await driver.open()
    await driver.close()
