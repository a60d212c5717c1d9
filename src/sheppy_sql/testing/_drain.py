"""Running what is due, here and now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

from sheppy import Queue, Task, Worker

from .. import _host
from ._clock import Clock
from ._enqueued import due_at


async def drain(
    queue: Queue | Sequence[Queue],
    *,
    until: datetime | timedelta | None = None,
    clock: Clock | None = None,
    raise_errors: bool = True,
    max_tasks: int = 1000,
    middleware: list[Any] | None = None,
    dependency_overrides: dict[Callable[..., Any], Callable[..., Any]] | None = None,
) -> list[Task]:
    """Run what is due, one task after the other, in this event loop; what ran, in that order.

    With it runs what those tasks enqueue, chained tasks and steps of workflows among it. A task
    that was retried meanwhile is there once for each run. It is sheppy's worker that runs them,
    but rate limits hold nothing back.

    Args:
        queue: One or several; where several have tasks, the first goes first.
        until: Move the clock up to this moment, or by this much, from one scheduled task, retry
            or run of a cron to the next, each of which then runs when it is due. None: run only
            what is due at once.
        clock: Says what is due; None for the one in use, else a clock that stands still at the
            machine's time.
        raise_errors: Raise what a task raised that failed for good. The tasks behind it stay in
            line. False: it is told by the returned task's `status` and `error`.
        max_tasks: RuntimeError when more than so many ran: one that enqueues itself has no end.
        middleware: As of sheppy's Worker.
        dependency_overrides: As of sheppy's Worker.
    """
    queues = [queue] if isinstance(queue, Queue) else list(queue)
    clock = clock or Clock.in_use() or Clock()
    with ExitStack() as stack:
        if Clock.in_use() is not clock:
            stack.enter_context(clock)
        end = clock.now() + until if isinstance(until, timedelta) else until
        runners = [_Runner(each, middleware, dependency_overrides) for each in queues]
        ran: list[Task] = []
        while True:
            taken = await _take(runners, clock.now())
            if taken is not None:
                runner, task = taken
                if len(ran) >= max_tasks:
                    await runner.put_back(task)
                    raise RuntimeError(
                        f"{max_tasks} tasks ran and more are due: does a task enqueue itself? "
                        "If it should be so many, give drain a larger max_tasks"
                    )
                ran.append(await runner.run(task, raise_errors=raise_errors))
                continue
            if end is None:
                return ran
            following = [await runner.next_after(clock.now(), end) for runner in runners]
            clock.advance_to(min((moment for moment in following if moment), default=end))
            if not any(following):
                return ran


async def _take(runners: Sequence[_Runner], now: datetime) -> tuple[_Runner, Task] | None:
    for runner in runners:
        if (task := await runner.take(now)) is not None:
            return runner, task
    return None


class _Runner:
    """What a worker of one queue does, step by step."""

    def __init__(
        self,
        queue: Queue,
        middleware: list[Any] | None,
        dependency_overrides: dict[Callable[..., Any], Callable[..., Any]] | None,
    ) -> None:
        self._queue = queue
        self._backend = queue.backend
        self._worker = Worker(
            queue.name,
            queue.backend,
            middleware=middleware,
            dependency_overrides=dependency_overrides,
        )
        self._processor = _host.Processor(self._worker)

    async def take(self, now: datetime) -> Task | None:
        if not self._backend.is_connected:
            await self._backend.connect()
        taken = await self._backend.pop(self._queue.name, 1)
        # Only then: it would cost each task as much as taking it.
        if not taken and await self._promote(now):
            taken = await self._backend.pop(self._queue.name, 1)
        return Task.model_validate(taken[0]) if taken else None

    async def _promote(self, now: datetime) -> bool:
        """Put in line what is due, by this clock and not by the database's."""
        due = await self._backend.pop_scheduled(self._queue.name, now)
        if due:
            due = [{**task, "status": "pending"} for task in due]
            await self._backend.append(self._queue.name, due, unique=False)
        return bool(due)

    async def put_back(self, task: Task) -> None:
        await self._backend.append(self._queue.name, [task.model_dump(mode="json")], unique=False)

    async def run(self, task: Task, *, raise_errors: bool) -> Task:
        # A task of its own, as in a worker: what it sets in its context must not stay here.
        run = asyncio.create_task(self._worker.process_task(task, self._queue))
        done = await run
        at = due_at(done)
        if done.status == "retrying" and at is not None:
            # The backend makes a worker's retry due by the database's clock. Whoever schedules a
            # task once more decides by the time given; the worker leaves the last retry out.
            for _ in range(1 if done.should_retry else 2):
                payload = done.model_dump(mode="json")
                await self._backend.schedule(self._queue.name, payload, at, unique=False)
        elif raise_errors and self._processor.raised is not None:
            raise self._processor.raised
        return done

    async def next_after(self, now: datetime, end: datetime) -> datetime | None:
        """When something is due next, if it is by `end`."""
        for cron in await self._queue.get_crons():
            if (moment := cron.next_run(now)) <= end:
                await self._queue.schedule(cron.create_task(moment), moment)
        moments = [due_at(task) for task in await self._queue.get_scheduled()]
        later = [moment for moment in moments if moment is not None and now < moment <= end]
        return min(later, default=None)
