"""sheppy itself, with each of its backends and with ours, with default options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sheppy import Backend, MemoryBackend, Queue, RedisBackend, Task, Worker

from sheppy_sql import SqlBackend

from .. import jobs
from ..tally import Tally


class SheppyDriver:
    """sheppy's Queue and Worker on a backend."""

    kind: type[Backend]
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, url: str, queue: str) -> None:
        self.tally: Tally | None = None
        self.backend = self._counting(url)
        self.queue = Queue(self.backend, queue)

    async def open(self) -> None:
        await self.backend.connect()

    async def close(self) -> None:
        await self.backend.disconnect()

    def build(self, count: int, *, stamped: bool = False) -> list[Task]:
        if stamped:
            return [jobs.stamp(number) for number in range(count)]
        return [jobs.noop() for _ in range(count)]

    async def add(self, task: Task) -> None:
        if not await self.queue.add(task):
            raise RuntimeError("A task was refused")

    async def add_many(self, tasks: Sequence[Task]) -> None:
        if not all(await self.queue.add(list(tasks))):
            raise RuntimeError("A task was refused")

    async def work(self, concurrency: int, tally: Tally | None = None) -> None:
        self.tally = tally
        worker = Worker(self.queue.name, self.backend, max_concurrent_tasks=concurrency)
        await worker.work(register_signal_handlers=False)
        # It ends by itself only after an error, which it has logged.
        raise RuntimeError("The worker has stopped")

    def _counting(self, url: str) -> Backend:
        """The backend, with stored results counted once they are stored."""
        driver = self

        class Counting(self.kind):  # type: ignore[name-defined,misc]  # the base is the driver's
            async def store_result(self, queue_name: str, task_data: dict[str, Any]) -> bool:
                stored: bool = await super().store_result(queue_name, task_data)
                if driver.tally is not None:
                    driver.tally.add()
                return stored

        made: Backend = Counting(*([url] if url else []), **self.options)
        return made


class SqlDriver(SheppyDriver):
    """SqlBackend."""

    kind = SqlBackend


class RedisDriver(SheppyDriver):
    """RedisBackend.

    Since redis-py 8 a read gives up after 5 seconds, and sheppy's worker waits just as long for a
    task, so an idle one would end with an error.
    """

    kind = RedisBackend
    options: ClassVar[dict[str, Any]] = {"socket_timeout": None}


class MemoryDriver(SheppyDriver):
    """MemoryBackend: the worker's own ceiling."""

    kind = MemoryBackend
    # By default it runs each task as it is added, as tests like it.
    options: ClassVar[dict[str, Any]] = {"instant_processing": False}
