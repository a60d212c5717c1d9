"""What the demo puts into its queues, and whether all of it came to its end."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from sheppy import Queue, Task

from . import tasks

if TYPE_CHECKING:
    from sheppy import Backend

    from .source import Source, SourceFile

DELAY = timedelta(seconds=3)
# The sixth field is seconds. A worker looks for crons every ten of them and then schedules
# three runs, so that shorter pauses would not be kept.
CRON = "* * * * * */4"
RATE_LIMITED = 8

Found = Mapping[UUID, Task]


class Jobs:
    """The demo's tasks, in two queues so that none of the timed ones waits behind the files."""

    def __init__(self, source: Source) -> None:
        name = f"sheppy-sql-demo-{secrets.token_hex(4)}"
        self.file_queue = f"{name}-files"
        self.timed_queue = f"{name}-timed"
        self.queues = (self.file_queue, self.timed_queue)
        self.source = source
        self.analyses = [tasks.analyse(str(source.root), file.name) for file in source.files]
        self.files: dict[UUID, SourceFile] = {
            task.id: file for task, file in zip(self.analyses, source.files, strict=True)
        }
        self.flaky = tasks.flaky()
        self.scheduled = tasks.scheduled()
        self.rate_limited = [tasks.rate_limited(number) for number in range(RATE_LIMITED)]
        self.collect = tasks.collect()  # type: ignore[call-arg]  # the worker gives the queue

    async def add_files(self, backend: Backend) -> None:
        """Put all file tasks in line by one call."""
        await Queue(backend, self.file_queue).add(self.analyses)

    async def add_timed(self, backend: Backend) -> None:
        """Put the others in line but the chain, which needs the files' results.

        Before the workers start: they look for crons at once, and then every ten seconds.
        """
        timed = Queue(backend, self.timed_queue)
        await timed.add([self.flaky, *self.rate_limited])
        await timed.add_cron(tasks.heartbeat(), CRON)
        await timed.schedule(self.scheduled, DELAY)

    async def add_chain(self, backend: Backend) -> None:
        """Put the first task of the chain in line; its result is the second."""
        await Queue(backend, self.timed_queue).add(self.collect)

    async def remove_cron(self, backend: Backend) -> None:
        await Queue(backend, self.timed_queue).delete_cron(tasks.heartbeat(), CRON)

    def unfinished_files(self, found: Found) -> list[str]:
        """The names of files whose tasks have not ended, `found` being the queue's tasks."""
        return [
            file.name for task_id, file in self.files.items() if not _has_ended(found.get(task_id))
        ]

    def unfinished(self, found: Found) -> list[str]:
        """Which of the other kinds of tasks have not ended, `found` being the queue's tasks."""
        first = found.get(self.collect.id)
        # What fails is not followed by the next.
        chain = [first] if first and first.error else [first, self.summary(found)]
        waited_for = {
            "the flaky task": [found.get(self.flaky.id)],
            "the scheduled task": [found.get(self.scheduled.id)],
            "the rate-limited tasks": [found.get(task.id) for task in self.rate_limited],
            "the cron": [next((task for task in heartbeats(found) if _has_ended(task)), None)],
            "the chained tasks": chain,
        }
        return [name for name, kind in waited_for.items() if not all(map(_has_ended, kind))]

    def summary(self, found: Found) -> Task | None:
        """The chain's second task, once the first has returned it."""
        first = found.get(self.collect.id)
        if first is None or not isinstance(first.result, Task):
            return None
        return found.get(first.result.id)

    @property
    def expected_runs(self) -> Counter[str]:
        """How often each function runs if nothing is lost and nothing runs twice."""
        return Counter(
            analyse=len(self.files),
            flaky=tasks.FAILURES + 1,
            scheduled=1,
            rate_limited=len(self.rate_limited),
            collect=1,
            summarise=1,
        )


def heartbeats(found: Found) -> Iterator[Task]:
    """The cron's runs, those to come included."""
    return (task for task in found.values() if task.spec.func.endswith(f":{tasks.HEARTBEAT}"))


def _has_ended(task: Task | None) -> bool:
    return task is not None and task.finished_at is not None
