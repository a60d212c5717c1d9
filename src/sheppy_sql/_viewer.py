"""Looking at queues, and waiting for results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _wakeups
from ._payloads import Payload, decode
from ._stores import queues as queue_store
from ._stores import results as result_store
from ._stores import scheduled as schedule_store
from ._stores import tasks as task_store
from ._validation import check_keys, check_limit, check_queue, check_timeout

if TYPE_CHECKING:
    from ._database import Database
    from ._options import Options
    from ._wakeups import Wakeups


class Viewer:
    """Everything that reads tasks and changes nothing."""

    def __init__(self, database: Database, wakeups: Wakeups, options: Options) -> None:
        self._database = database
        self._wakeups = wakeups
        self._max_poll_interval = options.max_poll_interval

    async def get_pending(self, queue: str, count: int) -> list[Payload]:
        check_queue(queue)
        limit = check_limit(count, "count")
        if limit <= 0:
            return []
        texts = await self._database.read("get tasks", task_store.get_pending, queue, limit)
        return [decode(text) for text in texts]

    async def size(self, queue: str) -> int:
        return await self._database.read("count tasks", task_store.size, check_queue(queue))

    async def get_tasks(self, queue: str, ids: Sequence[str]) -> dict[str, Payload]:
        check_queue(queue)
        wanted = check_keys(ids, "task id")
        if not wanted:
            return {}
        texts = await self._database.read("get tasks", task_store.get, queue, wanted)
        return {task_id: decode(text) for task_id, text in texts.items()}

    async def get_all_tasks(self, queue: str) -> list[Payload]:
        texts = await self._database.read("get tasks", task_store.get_all, check_queue(queue))
        return [decode(text) for text in texts]

    async def get_scheduled(self, queue: str) -> list[Payload]:
        texts = await self._database.read("get tasks", schedule_store.get_all, check_queue(queue))
        return [decode(text) for text in texts]

    async def get_stats(self, queue: str) -> dict[str, int]:
        return await self._database.read("count tasks", queue_store.get_stats, check_queue(queue))

    async def list_queues(self) -> dict[str, int]:
        return await self._database.read("list queues", queue_store.list_all)

    async def get_results(
        self, queue: str, ids: Sequence[str], timeout: float | None
    ) -> dict[str, Payload]:
        """Finished tasks by id; with a timeout all of them, or TimeoutError."""
        check_queue(queue)
        missing, seconds = check_keys(ids, "task id"), check_timeout(timeout)
        found: dict[str, Payload] = {}

        async def look(signals: set[_wakeups.Topic]) -> dict[str, Payload] | None:
            wanted = [
                task_id
                for task_id in ([topic[-1] for topic in signals] or missing)
                if task_id not in found
            ]
            texts = await self._database.read("get results", result_store.get, queue, wanted)
            found.update({task_id: decode(text) for task_id, text in texts.items()})
            return found if len(found) == len(missing) else None

        if not missing:
            return {}
        topics = [_wakeups.finished(queue, task_id) for task_id in missing]
        with self._wakeups.waiting(topics) as waiter:
            complete = await _wakeups.poll(
                look,
                waiter,
                timeout=_wakeups.wait_seconds(seconds, zero_means_forever=True),
                max_interval=self._max_poll_interval,
            )
        if complete is None and seconds is not None and seconds >= 0:
            raise TimeoutError(f"Did not complete within {timeout} seconds")
        return found
