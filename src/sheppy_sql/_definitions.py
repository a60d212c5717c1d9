"""Crons and workflows: what the host keeps beside its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _wakeups
from ._payloads import Payload, decode, encode
from ._stores import crons as cron_store
from ._stores import workflows as workflow_store
from ._stores.receipts import once
from ._validation import check_cron_expression, check_key, check_keys, check_queue

if TYPE_CHECKING:
    from ._options import Options
    from ._transaction import Operations
    from ._wakeups import Signals


class Definitions:
    """The crons and workflows of one installation."""

    def __init__(self, database: Operations, wakeups: Signals, options: Options) -> None:
        self._database = database
        self._wakeups = wakeups
        self._max_bytes = options.max_payload_bytes

    async def add_cron(self, queue: str, cron_id: str, cron: Payload) -> bool:
        check_queue(queue)
        check_key(cron_id, "cron id")
        text = encode(cron, "cron", self._max_bytes)
        expression = check_cron_expression(cron)
        return await self._database.write(
            "add a cron", once(cron_store.add), queue, cron_id, expression, text
        )

    async def delete_cron(self, queue: str, cron_id: str) -> bool:
        check_queue(queue)
        check_key(cron_id, "cron id")
        return await self._database.write("delete a cron", once(cron_store.remove), queue, cron_id)

    async def get_crons(self, queue: str) -> list[Payload]:
        texts = await self._database.read("get crons", cron_store.get_all, check_queue(queue))
        return [decode(text) for text in texts]

    async def store_workflow(self, queue: str, workflow: Payload) -> bool:
        check_queue(queue)
        text = encode(workflow, "workflow", self._max_bytes)
        if "id" not in workflow:
            raise ValueError("workflow has no 'id'")
        workflow_id = check_key(workflow["id"], "workflow id")
        # sheppy 0.0.7 says "error"; its next release, "exception".
        finished = any(workflow.get(key) for key in ("completed", "error", "exception"))
        await self._database.write(
            "store a workflow",
            once(workflow_store.put),
            queue,
            workflow_id,
            text,
            finished=finished,
            waits_for=check_keys(workflow.get("pending_task_ids") or [], "task id"),
        )
        if finished:
            self._wakeups.wake([_wakeups.ended(queue, workflow_id)])
        return True

    async def get_workflows(self, queue: str, ids: Sequence[str]) -> dict[str, Payload]:
        check_queue(queue)
        wanted = check_keys(ids, "workflow id")
        if not wanted:
            return {}
        texts = await self._database.read("get workflows", workflow_store.get, queue, wanted)
        return {workflow_id: decode(text) for workflow_id, text in texts.items()}

    async def get_all_workflows(self, queue: str) -> list[Payload]:
        check_queue(queue)
        texts = await self._database.read("get workflows", workflow_store.get_all, queue)
        return [decode(text) for text in texts]

    async def get_pending_workflows(self, queue: str) -> list[Payload]:
        check_queue(queue)
        texts = await self._database.read(
            "get workflows", workflow_store.get_all, queue, unfinished=True
        )
        return [decode(text) for text in texts]

    async def delete_workflow(self, queue: str, workflow_id: str) -> bool:
        check_queue(queue)
        check_key(workflow_id, "workflow id")
        return await self._database.write(
            "delete a workflow", once(workflow_store.remove), queue, workflow_id
        )

    async def complete_task(self, queue: str, workflow_id: str, task_id: str) -> int:
        check_queue(queue)
        check_key(workflow_id, "workflow id")
        check_key(task_id, "task id")
        return await self._database.write(
            "complete a workflow's task",
            once(workflow_store.complete_task),
            queue,
            workflow_id,
            task_id,
        )
