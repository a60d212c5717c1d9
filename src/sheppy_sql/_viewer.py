"""Looking at queues, and waiting for results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from sheppy import BackendError

from . import _waiting, _wakeups
from ._lookout import Lookout
from ._payloads import Payload, decode
from ._reader import Reader
from ._stores import queues as queue_store
from ._stores import results as result_store
from ._stores import scheduled as schedule_store
from ._stores import tasks as task_store
from ._stores import workflows as workflow_store
from ._validation import check_keys, check_limit, check_queue, check_timeout

if TYPE_CHECKING:
    from ._reader import Find
    from ._transaction import Operations
    from ._waiting import Pace
    from ._wakeups import Topic, Wakeups

Ended: TypeAlias = "Callable[[str, str], Topic]"
"""The topic of the end of something in a queue."""


class Viewer:
    """Everything that reads tasks and changes nothing."""

    def __init__(
        self, database: Operations, wakeups: Wakeups, pace: Pace, reader: Reader | None = None
    ) -> None:
        """`reader` is how tasks are found by their ids; None for each call by itself."""
        self._database = database
        self._wakeups = wakeups
        self._pace = pace
        reader = reader or Reader(database)
        self._find_tasks = reader.finding("get tasks", task_store.get)
        self._find_results = reader.finding("get results", result_store.get)
        self._find_workflows = reader.finding("get workflows", workflow_store.get_finished)
        self._lookouts: dict[tuple[Ended, str], Lookout] = {}

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
        texts = await self._find_tasks(queue, wanted)
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
        return await self._get_ended(queue, wanted, timeout, _wakeups.finished, self._find_results)

    async def get_workflow_results(
        self, queue: str, ids: Sequence[str], timeout: float | None
    ) -> dict[str, Payload]:
        """Workflows that have completed or failed, like get_results."""
        check_queue(queue)
        wanted = check_keys(ids, "workflow id")
        return await self._get_ended(queue, wanted, timeout, _wakeups.ended, self._find_workflows)

    def close(self) -> None:
        """Have all who wait get an error."""
        for lookout in self._lookouts.values():
            lookout.close(
                BackendError("Failed to get results: the backend was disconnected meanwhile")
            )

    async def _get_ended(
        self,
        queue: str,
        ids: Sequence[str],
        timeout: float | None,
        topic_of: Ended,
        find: Find,
    ) -> dict[str, Payload]:
        """What `find` finds of the ids, the end of each of which has a topic of its own."""
        seconds = _waiting.wait_seconds(check_timeout(timeout), zero_means_forever=True)
        if not ids:
            return {}
        if seconds <= 0:
            texts = await find(queue, ids)
        else:
            await self._pace.check()
            texts = await self._lookout(queue, topic_of, find).wait(ids, seconds)
            if len(texts) < len(ids):
                raise TimeoutError(f"Did not complete within {timeout} seconds")
        return {one: decode(texts[one]) for one in ids if one in texts}

    def _lookout(self, queue: str, topic_of: Ended, find: Find) -> Lookout:
        key = (topic_of, queue)
        if key not in self._lookouts:
            self._lookouts[key] = Lookout(
                partial(find, queue), partial(topic_of, queue), self._wakeups, self._pace
            )
        return self._lookouts[key]
