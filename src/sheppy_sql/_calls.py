"""The calls that need no claim: putting tasks in, looking at them, crons and workflows."""

from __future__ import annotations

from abc import abstractmethod
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from sheppy import Backend

if TYPE_CHECKING:
    from ._definitions import Definitions
    from ._payloads import Payload
    from ._producer import Producer
    from ._remover import Remover
    from ._viewer import Viewer


class Parts(Protocol):
    """Who answers the calls."""

    @property
    def producer(self) -> Producer: ...
    @property
    def remover(self) -> Remover: ...
    @property
    def viewer(self) -> Viewer: ...
    @property
    def definitions(self) -> Definitions: ...


class Calls(Backend):
    """What a backend offers whether its transactions are its own or the caller's."""

    @property
    @abstractmethod
    def _connected(self) -> Parts:
        """BackendError where there is no connection."""

    async def append(
        self, queue_name: str, tasks: list[Payload], unique: bool = True
    ) -> list[bool]:
        """Whether each task was put in line; with `unique` only those whose id was free."""
        return await self._connected.producer.append(queue_name, tasks, unique=unique)

    async def get_pending(self, queue_name: str, count: int = 1) -> list[Payload]:
        """The tasks that pop would return next."""
        return await self._connected.viewer.get_pending(queue_name, count)

    async def size(self, queue_name: str) -> int:
        """How many tasks wait in line; claimed and scheduled ones do not count."""
        return await self._connected.viewer.size(queue_name)

    async def get_tasks(self, queue_name: str, task_ids: list[str]) -> dict[str, Payload]:
        """Those of the tasks that exist, in whatever state, by id."""
        return await self._connected.viewer.get_tasks(queue_name, task_ids)

    async def get_all_tasks(self, queue_name: str) -> list[Payload]:
        """Every task of the queue, finished ones included."""
        return await self._connected.viewer.get_all_tasks(queue_name)

    async def schedule(
        self, queue_name: str, task_data: Payload, at: datetime, unique: bool = True
    ) -> bool:
        """Have a task become due at `at` (aware); with `unique` only if its id is free."""
        return await self._connected.producer.schedule(queue_name, task_data, at, unique=unique)

    async def get_scheduled(self, queue_name: str) -> list[Payload]:
        """Scheduled tasks, due or not, the earliest first."""
        return await self._connected.viewer.get_scheduled(queue_name)

    async def cancel(self, queue_name: str, task_id: str) -> Payload | None:
        """The task, now finished as "cancelled"; None unless it was pending or scheduled."""
        return await self._connected.remover.cancel(queue_name, task_id)

    async def delete_task(self, queue_name: str, task_id: str) -> bool:
        """Delete a task in whatever state; False where there was none."""
        return await self._connected.remover.delete_task(queue_name, task_id)

    async def get_stats(self, queue_name: str) -> dict[str, int]:
        """Numbers of tasks: "pending", "completed" (finished, not expired) and "scheduled"."""
        return await self._connected.viewer.get_stats(queue_name)

    async def list_queues(self) -> dict[str, int]:
        """How many tasks wait in each queue that was used since it was last cleared."""
        return await self._connected.viewer.list_queues()

    async def clear(self, queue_name: str) -> int:
        """Delete everything in a queue but its workflows; how many tasks and crons there were."""
        return await self._connected.producer.clear(queue_name)

    async def add_cron(self, queue_name: str, deterministic_id: str, task_cron: Payload) -> bool:
        """Store a cron; False where it is already there. A bad expression is a ValueError."""
        return await self._connected.definitions.add_cron(queue_name, deterministic_id, task_cron)

    async def delete_cron(self, queue_name: str, deterministic_id: str) -> bool:
        """Delete a cron; False where there was none."""
        return await self._connected.definitions.delete_cron(queue_name, deterministic_id)

    async def get_crons(self, queue_name: str) -> list[Payload]:
        """The queue's crons, the oldest first."""
        return await self._connected.definitions.get_crons(queue_name)

    async def store_workflow(self, queue_name: str, workflow_data: Payload) -> bool:
        """Store a workflow and what it waits for, in place of an earlier state; always True."""
        return await self._connected.definitions.store_workflow(queue_name, workflow_data)

    async def get_workflows(self, queue_name: str, workflow_ids: list[str]) -> dict[str, Payload]:
        """Those of the workflows that exist, by id."""
        return await self._connected.definitions.get_workflows(queue_name, workflow_ids)

    async def get_all_workflows(self, queue_name: str) -> list[Payload]:
        """Every workflow of the queue, the oldest first."""
        return await self._connected.definitions.get_all_workflows(queue_name)

    async def get_pending_workflows(self, queue_name: str) -> list[Payload]:
        """Workflows that have neither completed nor failed, the oldest first."""
        return await self._connected.definitions.get_pending_workflows(queue_name)

    async def delete_workflow(self, queue_name: str, workflow_id: str) -> bool:
        """Delete a workflow; False where there was none."""
        return await self._connected.definitions.delete_workflow(queue_name, workflow_id)

    async def mark_workflow_task_complete(
        self, queue_name: str, workflow_id: str, task_id: str
    ) -> int:
        """How many tasks the workflow still waits for; -1 if it did not wait for this one."""
        return await self._connected.definitions.complete_task(queue_name, workflow_id, task_id)
