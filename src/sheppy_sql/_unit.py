"""What a running task enqueues, held back until its result is stored.

A unit belongs to one run of one task. It travels in a contextvar from the middleware that
begins it to the `append` calls of the task, made through whichever backend of the installation,
and to the `store_result` of that task, which ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING

from . import _wakeups
from ._stores import children as child_store
from ._stores import tasks as task_store
from ._stores.children import Child
from ._transaction import new_token

if TYPE_CHECKING:
    from ._payloads import Payload, TaskRow
    from ._transaction import Operations, Transaction
    from ._wakeups import Signals, Topic

COMPLETED = "completed"


class Children:
    """What a task that has completed wanted enqueued, in its order."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self._token = new_token()

    async def finish(
        self, tx: Transaction, queue: str, row: TaskRow, token: int | None, ttl: float | None
    ) -> bool:
        """Store the parent's result as `finishing.finish` does, and enqueue what it wanted."""
        children, append_token = self._children, self._token
        return await child_store.finish(tx, queue, row, token, ttl, children, append_token)

    @property
    def topics(self) -> list[Topic]:
        """Whom to wake once they are enqueued."""
        queues = {child.queue for child in self._children if child.run_at is None}
        return [_wakeups.pending(queue) for queue in sorted(queues)]


class Unit:
    """The children of one run of a task."""

    def __init__(self, wakeups: Signals, queue: str, task_id: str) -> None:
        self._wakeups = wakeups
        self._parent = (queue, task_id)
        self._run = asyncio.current_task()
        self._children: list[Child] = []
        self._ids: set[tuple[str, str]] = set()
        self._ended = False

    def is_open_in(self, wakeups: Signals) -> bool:
        """Whether a task enqueued now in that installation can still go with the result.

        No longer once the run is over, however it ended: what the task has left running
        enqueues as everybody does.
        """
        is_over = self._ended or (self._run is not None and self._run.done())
        # One installation, one hub in this process, however many backends.
        return self._wakeups is wakeups and not is_over

    def is_of(self, queue: str, task: Payload) -> bool:
        """Whether it is this task's."""
        return isinstance(task, dict) and self._parent == (queue, task.get("id"))

    async def take(
        self,
        database: Operations,
        queue: str,
        rows: Sequence[TaskRow],
        run_at: datetime | None = None,
    ) -> list[bool] | None:
        """Which of the tasks are new, in the caller's order; those will be enqueued.

        None where the run has ended meanwhile, and they will not.
        """
        is_new = []
        for row in rows:
            is_new.append((queue, row.id) not in self._ids)
            self._ids.add((queue, row.id))
        reserved = {row.id for row, new in zip(rows, is_new, strict=True) if new}
        taken: set[str] = set()
        try:
            if reserved:
                ids = sorted(reserved)
                taken = await database.read("look for tasks", task_store.find, queue, ids)
        except BaseException:
            self._ids -= {(queue, task_id) for task_id in reserved}
            raise
        if not self.is_open_in(self._wakeups):
            return None
        self._ids -= {(queue, task_id) for task_id in taken}
        answers = [new and row.id not in taken for row, new in zip(rows, is_new, strict=True)]
        self._children += [
            Child(queue, row, run_at) for row, answer in zip(rows, answers, strict=True) if answer
        ]
        return answers

    def hand_over(self) -> Children | None:
        """Hold back nothing more; what is to be stored with the task as it completes."""
        self._ended = True
        return Children(self._children) if self._children else None

    def take_back(self) -> None:
        """Hold back again: what was handed over is not stored."""
        self._ended = False

    def end(self, task: Payload) -> Children | None:
        """Hold back nothing more; what is to be stored with the task's result, if it completed."""
        self._ended = True
        # What the task has left running may keep the unit for long.
        children, self._children, self._ids = self._children, [], set()
        is_completed = task.get("finished_at") and task.get("status") == COMPLETED
        return Children(children) if is_completed and children else None


_unit: ContextVar[Unit | None] = ContextVar("sheppy_sql_unit", default=None)


def begin(wakeups: Signals, queue: str, task_id: str) -> None:
    """Hold back, from now on in this context, what is enqueued until the task has its result."""
    unit = _unit.get()
    # The middleware may be both the worker's and the task's.
    if unit is None or not (unit.is_open_in(wakeups) and unit.is_of(queue, {"id": task_id})):
        _unit.set(Unit(wakeups, queue, task_id))


def for_children(wakeups: Signals, tasks: Sequence[Payload]) -> Unit | None:
    """The unit of the task that is running here and enqueues these, if there is one.

    None for the steps of a workflow, as its record, which waits for them, is stored at once.
    """
    unit = _current(wakeups)
    return None if unit is None or any(task.get("workflow_id") for task in tasks) else unit


def of(wakeups: Signals, queue: str, task_id: str) -> Unit | None:
    """The unit of that task, if it runs here under one."""
    unit = _current(wakeups)
    return unit if unit is not None and unit.is_of(queue, {"id": task_id}) else None


def end(wakeups: Signals, queue: str, task: Payload) -> Children | None:
    """End the unit if it is that of the task, which is about to be stored."""
    unit = _current(wakeups)
    if unit is None or not unit.is_of(queue, task):
        return None
    _unit.set(None)
    return unit.end(task)


def _current(wakeups: Signals) -> Unit | None:
    unit = _unit.get()
    return unit if unit is not None and unit.is_open_in(wakeups) else None
