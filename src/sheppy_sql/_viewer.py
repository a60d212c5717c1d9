"""Looking at queues, and waiting for results."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from . import _wakeups
from ._payloads import Payload, decode
from ._stores import queues as queue_store
from ._stores import results as result_store
from ._stores import scheduled as schedule_store
from ._stores import tasks as task_store
from ._stores import workflows as workflow_store
from ._validation import check_keys, check_limit, check_queue, check_timeout

if TYPE_CHECKING:
    from ._database import Operations
    from ._options import Options
    from ._wakeups import Wakeups


class Viewer:
    """Everything that reads tasks and changes nothing."""

    def __init__(self, database: Operations, wakeups: Wakeups, options: Options) -> None:
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
        wanted = check_keys(ids, "task id")

        async def find(missing: Sequence[str]) -> dict[str, str]:
            return await self._database.read("get results", result_store.get, queue, missing)

        return await self._await_all(
            {_wakeups.finished(queue, task_id): task_id for task_id in wanted}, find, timeout
        )

    async def get_workflow_results(
        self, queue: str, ids: Sequence[str], timeout: float | None
    ) -> dict[str, Payload]:
        """Workflows that have completed or failed, like get_results."""
        check_queue(queue)
        wanted = check_keys(ids, "workflow id")

        async def find(missing: Sequence[str]) -> dict[str, str]:
            return await self._database.read(
                "get workflows", workflow_store.get, queue, missing, finished=True
            )

        return await self._await_all(
            {_wakeups.ended(queue, workflow_id): workflow_id for workflow_id in wanted},
            find,
            timeout,
        )

    async def _await_all(
        self,
        ids: Mapping[_wakeups.Topic, str],
        find: Callable[[Sequence[str]], Awaitable[dict[str, str]]],
        timeout: float | None,
    ) -> dict[str, Payload]:
        """What `find` finds of the ids, each of which has a topic of its own."""
        seconds = check_timeout(timeout)
        found: dict[str, Payload] = {}

        async def look(signals: set[_wakeups.Topic]) -> dict[str, Payload] | None:
            hinted = [ids[topic] for topic in signals] or ids.values()
            texts = await find([one for one in hinted if one not in found])
            found.update({one: decode(text) for one, text in texts.items()})
            return found if len(found) == len(ids) else None

        if not ids:
            return {}
        with self._wakeups.waiting(ids) as waiter:
            complete = await _wakeups.poll(
                look,
                waiter,
                timeout=_wakeups.wait_seconds(seconds, zero_means_forever=True),
                max_interval=self._max_poll_interval,
            )
        if complete is None and seconds is not None and seconds >= 0:
            raise TimeoutError(f"Did not complete within {timeout} seconds")
        return found
