"""Taking tasks out of a queue without running them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from . import _wakeups
from ._payloads import Payload, decode, encode_task
from ._stores import finishing
from ._stores import tasks as task_store
from ._stores.receipts import once
from ._validation import check_key, check_queue

if TYPE_CHECKING:
    from ._options import Options
    from ._transaction import Operations, Transaction
    from ._wakeups import Signals


class Remover:
    """cancel and delete_task of one backend instance."""

    def __init__(self, database: Operations, wakeups: Signals, options: Options) -> None:
        self._database = database
        self._wakeups = wakeups
        self._options = options

    async def cancel(self, queue: str, task_id: str) -> Payload | None:
        """End a task that nobody has begun; None where it is not to be had."""
        check_queue(queue)
        check_key(task_id, "task id")
        texts: list[str] = []

        async def cancel(tx: Transaction) -> bool:
            # Told to us and not answered: the receipt is kept, and is not for payloads.
            texts[:] = await self._cancel(tx, queue, task_id)
            return bool(texts)

        if not await self._database.write("cancel a task", once(cancel)):
            return None
        self._wakeups.wake([_wakeups.finished(queue, task_id)])
        return decode(texts[0])

    async def delete_task(self, queue: str, task_id: str) -> bool:
        """Forget a task, whatever its state; False where there was none."""
        check_queue(queue)
        check_key(task_id, "task id")
        return await self._database.write("delete a task", once(task_store.remove), queue, task_id)

    async def _cancel(self, tx: Transaction, queue: str, task_id: str) -> list[str]:
        """The payload of the task that was cancelled, if it was."""
        payload = await task_store.lock_waiting(tx, queue, task_id)
        if payload is None:
            return []
        ended = {"status": "cancelled", "finished_at": datetime.now(timezone.utc).isoformat()}
        task = {**decode(payload), **ended}
        # What is stored already is not refused for its size.
        row = encode_task(task, len(payload) * 2 + 1000)
        await finishing.finish(tx, queue, row, None, self._options.ttl_for(task))
        return [row.payload]
