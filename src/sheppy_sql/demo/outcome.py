"""What the database holds in the end, and whether that is what had to come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from sheppy import Task

from . import tasks
from .jobs import heartbeats
from .tasks import Module, Totals

if TYPE_CHECKING:
    from .jobs import Jobs

T = TypeVar("T")

LARGEST = 5
SHOWN_COMPLAINTS = 5


@dataclass(frozen=True)
class Outcome:
    """All tasks as they are stored, and how often the workers say they ran what."""

    jobs: Jobs
    files: dict[UUID, Task]
    timed: dict[UUID, Task]
    ran: list[Counter[str]]
    clock_tolerance: float  # seconds

    @cached_property
    def modules(self) -> list[Module]:
        results = (task.result for task in self.files.values())
        return [result for result in results if isinstance(result, Module)]

    @cached_property
    def totals(self) -> Totals:
        return tasks.total(self.modules)

    @property
    def largest(self) -> list[Module]:
        """The modules with the most lines."""
        return sorted(self.modules, key=lambda each: (-each.lines, each.name))[:LARGEST]

    @property
    def statuses(self) -> Counter[str]:
        """How many tasks there are of each status."""
        return Counter(task.status for task in [*self.files.values(), *self.timed.values()])

    @property
    def rate(self) -> float:
        """File tasks per second, from the first result to the last."""
        ends = [task.finished_at for task in self.files.values() if task.finished_at]
        seconds = (max(ends) - min(ends)).total_seconds() if ends else 0.0
        return (len(ends) - 1) / seconds if seconds else 0.0

    @property
    def attempts(self) -> int:
        """At which attempt the flaky task succeeded."""
        return _result(self.timed.get(self.jobs.flaky.id), int) or 0

    @property
    def lateness(self) -> float | None:
        """Seconds from the time the scheduled task was to run at to its run; None without one."""
        task = self.timed.get(self.jobs.scheduled.id)
        ran_at = _result(task, datetime)
        if task is None or task.scheduled_at is None or ran_at is None:
            return None
        return (ran_at - task.scheduled_at).total_seconds()

    @property
    def cron_runs(self) -> int:
        return sum(task.status == "completed" for task in heartbeats(self.timed))

    @property
    def limited_seconds(self) -> float:
        """Seconds from when the rate-limited tasks were made to the end of the last one."""
        stored = [self.timed.get(task.id) for task in self.jobs.rate_limited]
        spans = [task.finished_at - task.created_at for task in stored if task and task.finished_at]
        return max(spans, default=timedelta()).total_seconds()

    @property
    def sentence(self) -> str | None:
        """What the chain's second task returned."""
        return _result(self.jobs.summary(self.timed), str)

    def complaints(self) -> list[str]:
        """What is missing or not as it had to be; empty when all is well."""
        found = [*self._wrong_files(), *self._wrong_others(), *self._wrong_runs()]
        more = len(found) - SHOWN_COMPLAINTS
        return [*found[:SHOWN_COMPLAINTS], f"... and {more:,} more"] if more > 0 else found

    def _wrong_files(self) -> Iterator[str]:
        for task_id, file in self.jobs.files.items():
            task = self.files.get(task_id)
            module = _result(task, Module)
            if module is None:
                yield f"{file.name}: {_state(task)}"
            elif (module.name, module.sha256, module.lines) != (file.name, file.sha256, file.lines):
                yield f"{file.name}: the stored result is that of another content"
        if unknown := len(self.files.keys() - self.jobs.files.keys()):
            yield f"the queue of the files holds {unknown:,} tasks that nobody put there"

    def _wrong_others(self) -> Iterator[str]:
        of = self.timed.get
        if self.attempts != tasks.FAILURES + 1:
            yield f"the flaky task: {_state(of(self.jobs.flaky.id))}"
        if self.lateness is None:
            yield f"the scheduled task: {_state(of(self.jobs.scheduled.id))}"
        elif self.lateness < -self.clock_tolerance:
            yield f"the scheduled task: ran {-self.lateness:.1f} s before its time"
        for task in self.jobs.rate_limited:
            stored = of(task.id)
            if _result(stored, int) != task.spec.args[0]:
                yield f"rate-limited task {task.spec.args[0]}: {_state(stored)}"
        # Not from the first one's end, which a busy machine may delay more than the last one's.
        least = (len(self.jobs.rate_limited) / tasks.RATE - 1) * tasks.RATE_PERIOD
        if self.limited_seconds < least:
            yield f"the rate limit: {self.limited_seconds:.1f} s, which is too fast"
        if not self.cron_runs:
            yield "the cron: never ran"
        for task in heartbeats(self.timed):
            if task.error:
                yield f"a run of the cron: {_state(task)}"
        yield from self._wrong_summary()

    def _wrong_summary(self) -> Iterator[str]:
        summary = self.jobs.summary(self.timed)
        files = self.jobs.source.files
        counted = (len(files), sum(file.lines for file in files))
        if self.sentence is None or summary is None:
            yield f"the chained summary: {_state(summary)}"
        elif (
            summary.spec.args != (asdict(self.totals),)
            or (self.totals.files, self.totals.lines) != counted
        ):
            yield "the chained summary: its sums are not those of the files"

    def _wrong_runs(self) -> Iterator[str]:
        """A task that ran twice left one result, but not one trace."""
        expected, ran = self.jobs.expected_runs, sum(self.ran, Counter[str]())
        # A cron goes on: its last run may have been under way when the workers stopped.
        del ran[tasks.HEARTBEAT]
        for function in sorted(expected | ran):
            if expected[function] != ran[function]:
                yield f"{function} ran {ran[function]:,} times instead of {expected[function]:,}"


def _result(task: Task | None, kind: type[T]) -> T | None:
    """What a task returned; None where it has not completed, or returned something else."""
    if task is None or task.status != "completed" or not isinstance(task.result, kind):
        return None
    return task.result


def _state(task: Task | None) -> str:
    if task is None:
        return "is not in the database"
    return f"{task.status}, {task.error}" if task.error else f"is {task.status}"
