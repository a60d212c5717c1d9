"""Random calls of two backends on one queue, against a model of plain dicts.

`SHEPPY_SQL_FUZZ=1` searches longer, from another seed every time.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.property.model import Model, Payload
from tests.property.support import CancelledAt, Machine, needs_time, numbers, run_machine

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase

LEAST_RULES = 5000

NOW = datetime.now(timezone.utc)
LETTERS = list("abcd")  # few, so that calls meet

who = st.integers(0, 1)
letter = st.sampled_from(LETTERS)
batch = st.lists(letter, min_size=1, max_size=4)
some = st.lists(st.sampled_from([*LETTERS, "unknown"]), max_size=4)
days = st.sampled_from([-3, -2, -1, 1, 2, 3])
limit = st.sampled_from([1, 1, 2, 3, 10, 0, -1])
flag = st.booleans()
often = st.sampled_from([True, True, True, False])

RETRY = {
    "status": "retrying",
    "config": {"retry": 1},
    "last_retry_at": NOW.isoformat(),
    "next_retry_at": (NOW + timedelta(days=1)).isoformat(),
}
OUTCOMES: dict[str, Payload] = {
    "finished": {"status": "completed", "finished_at": NOW.isoformat()},
    "failed": {"status": "failed", "finished_at": NOW.isoformat()},
    "to be retried": {**RETRY, "retry_count": 0},
    "to be retried for the last time": {
        **RETRY,
        "retry_count": 1,
        "next_retry_at": NOW.isoformat(),
    },
    "unfinished": {},
}
RETRY_IN_DAYS = {"to be retried": 1.0, "to be retried for the last time": 0.0}


def to_end(tasks: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Without what a pop that waits begins for as long as its backend is connected."""
    return {one for one in tasks if getattr(one.get_coro(), "__qualname__", "") != "Line._listen"}


class QueueMachine(Machine):
    """Two backends that append, pop and finish tasks of a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def ids(self, letters: list[str]) -> list[str]:
        """Ids of this example's own: a claim bars its id from other queues."""
        return [f"{letter} of {self.queue}" for letter in letters]

    def task(self, letter: str, **changes: Any) -> Payload:
        """A payload unlike any other."""
        [task_id] = self.ids([letter])
        task = {"id": task_id, "status": "new", "finished_at": None, "number": next(numbers)}
        return {**task, **changes}

    @rule(who=who, batch=batch)
    def append(self, who: int, batch: list[str]) -> None:
        tasks = [self.task(letter) for letter in batch]
        answer = self.run(self.backend(who).append(self.queue, tasks))
        assert answer == self.model.append(tasks)

    @rule(who=who, batch=batch)
    def append_again(self, who: int, batch: list[str]) -> None:
        tasks = [self.task(letter) for letter in batch]
        answer = self.run(self.backend(who).append(self.queue, tasks, unique=False))
        assert answer == [True] * len(tasks)
        self.model.append_again(who, tasks)

    @rule(who=who, letter=letter, days=days, unique=flag)
    def schedule(self, who: int, letter: str, days: int, unique: bool) -> None:
        task = self.task(letter, status="scheduled")
        at = NOW + timedelta(days=days)
        answer = self.run(self.backend(who).schedule(self.queue, task, at, unique))
        assert answer is self.model.schedule(who, task, days, unique=unique)

    @rule(who=who, days=st.one_of(st.none(), days), appended_by=who, late=flag)
    def promote(self, who: int, days: int | None, appended_by: int, late: bool) -> None:
        """Pop from the schedule; append at once, by either backend, or not."""
        now = None if days is None else NOW + timedelta(days=days)
        due = self.run(self.backend(who).pop_scheduled(self.queue, now))
        assert due == self.model.pop_scheduled(who, days or 0)
        if due and not late:
            self._append_popped(appended_by, due)

    @precondition(lambda self: any(map(self.model.leases_of, (0, 1))))
    @rule(who=who, index=st.integers(0, 3))
    def promote_late(self, who: int, index: int) -> None:
        """Append what was popped from the schedule some time ago, perhaps too late."""
        leases = self.model.leases_of(who) or self.model.leases_of(1 - who)
        owner = who if self.model.leases_of(who) else 1 - who
        self._append_popped(owner, [list(leases.values())[index % len(leases)]])

    def _append_popped(self, who: int, due: list[Payload]) -> None:
        tasks = [{**task, "status": "pending"} for task in due]
        answer = self.run(self.backend(who).append(self.queue, tasks, unique=False))
        assert answer == [True] * len(tasks)
        self.model.append_again(who, tasks)

    @rule(who=who, limit=limit)
    def pop(self, who: int, limit: int) -> None:
        answer = self.run(self.backend(who).pop(self.queue, limit))
        assert answer == self.model.pop(who, limit)

    @rule(who=who)
    def pop_one(self, who: int) -> None:
        self.pop(who, 1)

    @rule(who=who, limit=limit, times=st.sets(st.integers(0, 3), min_size=1), waits=flag)
    def cancelled_pop(self, who: int, limit: int, times: set[int], waits: bool) -> None:
        """It gives back what it took, or had its tasks before it could be cancelled."""
        # Where it waits at once, it may not come as far as it was to be cancelled at.
        pop = self.backend(who).pop(self.queue, limit, 0.1 if waits else None)

        async def popped() -> list[Payload] | None:
            before = asyncio.all_tasks()
            popping = asyncio.ensure_future(CancelledAt(pop, times))
            await asyncio.wait([popping])
            # A second cancellation sends it away before all is handed back.
            while len(times) > 1 and (under_way := to_end(asyncio.all_tasks() - before)):
                await asyncio.wait(under_way)
            return None if popping.cancelled() else popping.result()

        answer = self.run(popped())
        if answer is not None:
            assert answer == self.model.pop(who, limit)

    @rule(who=who, letter=letter, claimed=often, outcome=st.sampled_from(list(OUTCOMES)))
    def store_result(self, who: int, letter: str, claimed: bool, outcome: str) -> None:
        """Mostly of a task that this backend has popped, whatever happened to it since."""
        held = [task_id[0] for task_id in self.model.claims_of(who)]
        if claimed and held:
            letter = held[LETTERS.index(letter) % len(held)]
        task = self.task(letter, **OUTCOMES[outcome])
        assert self.run(self.backend(who).store_result(self.queue, task)) is True
        self.model.store_result(who, task, retry_in_days=RETRY_IN_DAYS.get(outcome))

    @rule(who=who, some=some, claimed=flag)
    def acknowledge(self, who: int, some: list[str], claimed: bool) -> None:
        ids = self.model.claims_of(who) if claimed else self.ids(some)
        self.run(self.backend(who).acknowledge(self.queue, ids))
        self.model.acknowledge(who, ids)

    # Not too often: it ends whatever was interesting.
    @precondition(lambda self: self.ran % 6 == 0)
    @rule(who=who)
    def clear(self, who: int) -> None:
        assert self.run(self.backend(who).clear(self.queue)) == self.model.clear()

    @precondition(lambda self: self.ran % 6 == 3)
    @rule(who=who)
    def reconnect(self, who: int) -> None:
        self.run(self.backend(who).disconnect())
        self.model.disconnect(who)
        self.run(self.backend(who).connect())

    @rule(who=who, cron_id=letter)
    def add_cron(self, who: int, cron_id: str) -> None:
        cron = {"expression": "* * * * *", "number": next(numbers)}
        answer = self.run(self.backend(who).add_cron(self.queue, cron_id, cron))
        assert answer is self.model.add_cron(cron_id, cron)

    @precondition(lambda self: self.ran % 2)
    @rule(who=who, cron_id=letter)
    def delete_cron(self, who: int, cron_id: str) -> None:
        answer = self.run(self.backend(who).delete_cron(self.queue, cron_id))
        assert answer is self.model.delete_cron(cron_id)

    @rule(who=who, some=some, count=st.integers(-1, 4))
    def look_at_some(self, who: int, some: list[str], count: int) -> None:
        ids = self.ids(some)
        backend, stored, results = self.backend(who), self.model.tasks(), self.model.results()
        tasks, finished, pending = self.all(
            backend.get_tasks(self.queue, ids),
            backend.get_results(self.queue, ids),
            backend.get_pending(self.queue, count),
        )
        assert tasks == {task_id: stored[task_id] for task_id in ids if task_id in stored}
        assert finished == {task_id: results[task_id] for task_id in ids if task_id in results}
        assert pending == self.model.pending()[: max(count, 0)]

    def look_at_one_thing(self) -> None:
        if self.ran % 2:
            self._compare_pending(self.run(self.backend(0).get_pending(self.queue, 10)))
        else:
            self._compare_stored(self.run(self.backend(1).get_all_tasks(self.queue)))

    def look_at_everything(self) -> None:
        backend, model, queue = self.backend(self.ran % 2), self.model, self.queue
        pending, stored, scheduled, stats, size, queues, crons = self.all(
            backend.get_pending(queue, 10),
            backend.get_all_tasks(queue),
            backend.get_scheduled(queue),
            backend.get_stats(queue),
            backend.size(queue),
            backend.list_queues(),
            backend.get_crons(queue),
        )
        self._compare_pending(pending)
        self._compare_stored(stored)
        assert scheduled == model.scheduled()
        assert stats == model.stats()
        assert size == model.stats()["pending"]
        assert queues.get(queue) == (size if model.is_listed() else None)
        assert crons == list(model.crons.values())

    def _compare_pending(self, pending: list[Payload]) -> None:
        assert pending == self.model.pending()

    def _compare_stored(self, stored: list[Payload]) -> None:
        assert sorted(stored, key=lambda task: str(task["id"])) == [
            task for _, task in sorted(self.model.tasks().items())
        ]


@needs_time
@pytest.mark.torture
def test_two_backends_do_with_tasks_what_the_model_does(database: TestDatabase) -> None:
    run_machine(QueueMachine, database, LEAST_RULES)
