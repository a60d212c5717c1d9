"""Workflows that nobody will resume, because a process died between two steps.

sheppy resumes a workflow when its worker has stored the last task that the
workflow waits for, and adds the next tasks after storing what it waits for now.
In each gap between these calls a death leaves a workflow that waits for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from sheppy import BackendError

from . import _chores
from ._payloads import decode
from ._stores import workflows as workflow_store

if TYPE_CHECKING:
    from ._database import Database

logger = logging.getLogger("sheppy_sql")

T = TypeVar("T")
Resume = Callable[[str, str], Awaitable[object]]
"""Resumes the workflow of a queue by its id."""

LONGEST_INTERVAL = 15.0  # seconds
PAGE = 100
MOST_REMEMBERED = 10_000


class Sweeper:
    """Resumes workflows whose tasks have all ended and which nobody has touched for a while.

    Args:
        database: Where they are.
        resume: What resumes one; it may raise anything, which is logged.
        grace: Seconds without a change after which nobody else is at it. A process that
            stops for longer between two steps, and then goes on, may run a step twice.
    """

    def __init__(self, database: Database, resume: Resume, *, grace: float) -> None:
        self._database = database
        self._resume = resume
        self._grace = grace
        self.interval = min(LONGEST_INTERVAL, grace / 2)
        """Seconds between two sweeps."""
        self._left_alone: dict[tuple[str, str], datetime] = {}
        self._complaints: dict[tuple[str, str], str] = {}

    async def sweep(self, queues: Iterable[str]) -> None:
        """Resume what is stuck in these queues, where no other instance is at it.

        Their workflows' functions must be this process's to run.
        """
        for queue in queues:
            if not await self._stalled(queue, ""):
                continue
            chore = f"resume workflows of {queue}"
            if await _chores.take(self._database, "take a chore", chore, self.interval):
                await self._sweep(queue)

    async def _sweep(self, queue: str) -> None:
        last = ""
        while page := await self._stalled(queue, last):
            last = page[-1].id
            for row in page:
                await self._look_after(queue, row)

    async def _look_after(self, queue: str, row: workflow_store.Stalled) -> None:
        found = await self._database.read("get a workflow", workflow_store.get, queue, [row.id])
        if row.id not in found:
            return
        workflow = decode(found[row.id])
        pending = workflow.get("pending_task_ids") or []
        if not pending or await self._database.read(
            "look for live tasks", workflow_store.any_unsettled, queue, pending, self._grace
        ):
            return
        function = workflow.get("func")
        if can_import(function):
            await self._take_and_resume(queue, row.id)
        else:
            self._leave_alone(queue, row, function)

    async def _stalled(self, queue: str, after: str) -> list[workflow_store.Stalled]:
        """Some that may be stuck, in the order of their ids; those that are left alone are not."""
        while True:
            page = await self._database.read(
                "look for stuck workflows",
                workflow_store.stalled,
                queue,
                self._grace,
                after,
                PAGE,
            )
            new = [row for row in page if self._left_alone.get((queue, row.id)) != row.touched_at]
            if new or len(page) < PAGE:
                return new
            after = page[-1].id

    async def _take_and_resume(self, queue: str, workflow_id: str) -> None:
        taken = await self._database.write(
            "resume a workflow", workflow_store.touch_stalled, queue, workflow_id, self._grace
        )
        if not taken:
            return
        logger.info("Resuming workflow %s, which has been stuck", workflow_id)
        try:
            await self._resume(queue, workflow_id)
        except BackendError as error:
            self._complain(queue, workflow_id, str(error))
        except Exception as error:  # noqa: BLE001  # one broken workflow must not stop the others
            # Without its words: the host's errors quote what it was given.
            self._complain(queue, workflow_id, type(error).__name__)

    def _leave_alone(self, queue: str, row: workflow_store.Stalled, function: object) -> None:
        _remember(self._left_alone, (queue, row.id), row.touched_at)
        self._complain(queue, row.id, f"its function {function!r:.200} cannot be imported here")

    def _complain(self, queue: str, workflow_id: str, complaint: str) -> None:
        if self._complaints.get((queue, workflow_id)) != complaint:
            logger.warning("Failed to resume workflow %s: %s", workflow_id, complaint)
        _remember(self._complaints, (queue, workflow_id), complaint)


def can_import(function: object) -> bool:
    """Whether sheppy can find a workflow's function, "module:name", in this process.

    Where it cannot, it would end the workflow with that as its error.
    """
    if not isinstance(function, str):
        return False
    module_name, _, name = function.partition(":")
    # SystemExit: a program without a guard, imported.
    with contextlib.suppress(Exception, SystemExit):
        if hasattr(importlib.import_module(module_name), name):
            return True
    return module_name == _main_module() and hasattr(sys.modules["__main__"], name)


def _main_module() -> str | None:
    """What sheppy calls the program that was started: its path from here, without ".py"."""
    try:
        return os.path.relpath(sys.argv[0])[:-3].replace(os.sep, ".")
    except (IndexError, ValueError):  # none, or on another Windows drive
        return None


def _remember(memory: dict[tuple[str, str], T], key: tuple[str, str], value: T) -> None:
    memory.pop(key, None)
    memory[key] = value
    if len(memory) > MOST_REMEMBERED:
        del memory[next(iter(memory))]
