"""Every method that writes, what must be there before it, and what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.contract.tasks import FUTURE, PAST, finished, make_task, make_tasks, retrying

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend
    from tests.support.databases import TestDatabase

Payload = dict[str, Any]
Step = Callable[["SqlBackend", str], Awaitable[Any]]

A, B, C, D = make_tasks(4)
RETRYING = retrying(A)
CRON = {"expression": "0 * * * *", "spec": {"func": "app.jobs:send"}}
WORKFLOW = {"id": "workflow", "completed": False, "pending_task_ids": ["task-0", "task-1"]}
# A lost message strikes what the test does, and not what a backend does in the background.
OURS = "sheppy_(?!consumers|chores)"


@dataclass(frozen=True)
class Case:
    """A call, after some others; `str(case)` names it."""

    name: str
    call: Step
    prepare: tuple[Step, ...] = ()
    unclaimed: bool = False
    """Stores a task that was never taken, which an instance that holds its id elsewhere refuses."""

    changes: bool = True
    """Something, so that there is a commit to wait for."""
    skips: bool = False
    """What another transaction has locked, and so may find less than all there is."""

    def __str__(self) -> str:
        return self.name

    async def set_up(self, backend: SqlBackend, queue: str) -> None:
        for step in self.prepare:
            await step(backend, queue)


def append(*tasks: Payload, unique: bool = True) -> Step:
    return lambda backend, queue: backend.append(queue, list(tasks), unique=unique)


def schedule(task: Payload, at: Any = FUTURE, *, unique: bool = True) -> Step:
    return lambda backend, queue: backend.schedule(queue, task, at, unique=unique)


def pop(limit: int = 1) -> Step:
    return lambda backend, queue: backend.pop(queue, limit)


async def pop_scheduled(backend: SqlBackend, queue: str) -> list[Payload]:
    return await backend.pop_scheduled(queue)


def store_result(task: Payload) -> Step:
    return lambda backend, queue: backend.store_result(queue, task)


def acknowledge(*ids: str) -> Step:
    return lambda backend, queue: backend.acknowledge(queue, list(ids))


async def clear(backend: SqlBackend, queue: str) -> int:
    return await backend.clear(queue)


async def add_cron(backend: SqlBackend, queue: str) -> bool:
    return await backend.add_cron(queue, "cron", CRON)


async def delete_cron(backend: SqlBackend, queue: str) -> bool:
    return await backend.delete_cron(queue, "cron")


def store_workflow(**changes: Any) -> Step:
    return lambda backend, queue: backend.store_workflow(queue, {**WORKFLOW, **changes})


async def delete_workflow(backend: SqlBackend, queue: str) -> bool:
    return await backend.delete_workflow(queue, "workflow")


def complete(task_id: str) -> Step:
    return lambda backend, queue: backend.mark_workflow_task_complete(queue, "workflow", task_id)


def acquire(strategy: str) -> Step:
    """Two starts where two are allowed: the second tells whether the first was counted twice."""

    async def call(backend: SqlBackend, queue: str) -> list[float | None]:
        return [
            await backend.acquire_rate_limit(queue, "key", 2, 600.0, task_id, strategy)
            for task_id in ("a", "b")
        ]

    return call


def in_turn(*steps: Step) -> Step:
    async def call(backend: SqlBackend, queue: str) -> list[Any]:
        return [await step(backend, queue) for step in steps]

    return call


CASES = [
    Case("append: new tasks", append(A, B, A, C)),
    Case("append: some known", append(A, B, C), (append(B),)),
    Case("append: all known", append(A), (append(A, B), pop()), changes=False),
    Case("append again: new and pending", append(C, A, unique=False), (append(A, B),)),
    Case(
        "append again: finished",
        append(A, unique=False),
        (store_result(finished(A)),),
        unclaimed=True,
    ),
    Case("append again: claimed", append(A, unique=False), (append(A, B), pop())),
    Case(
        "append: what was due",
        append({**A, "status": "pending"}, unique=False),
        (schedule(A, PAST), pop_scheduled),
    ),
    Case("schedule: new", schedule(A)),
    Case("schedule: known", schedule(A), (append(A),), changes=False),
    Case("schedule again: scheduled", schedule(A, PAST, unique=False), (schedule(A),)),
    Case("schedule again: claimed", schedule(A, unique=False), (append(A), pop())),
    Case("pop: some", pop(2), (append(A, B, C),), skips=True),
    Case("pop: none", pop(2), (append(A), pop()), changes=False),
    Case(
        "pop, then finish",
        in_turn(pop(2), store_result(finished(A))),
        (append(A, B),),
        skips=True,
    ),
    Case(
        "pop_scheduled",
        pop_scheduled,
        (schedule(A, PAST), schedule(B), schedule(C, PAST)),
        skips=True,
    ),
    Case("store_result: claimed", store_result(finished(A)), (append(A, B), pop(2))),
    Case("store_result: unknown", store_result(finished(A)), unclaimed=True),
    Case("store_result: scheduled", store_result(finished(A)), (schedule(A),), unclaimed=True),
    Case("store_result: retrying", store_result(RETRYING), (append(A, B), pop(2))),
    Case(
        "store_result: retrying, then scheduled",
        in_turn(store_result(RETRYING), schedule(RETRYING, unique=False)),
        (append(A), pop()),
    ),
    Case("store_result: set aside", store_result({**A, "result": 1}), (append(A), pop())),
    Case("store_result: set aside, unknown", store_result({**A, "result": 1}), unclaimed=True),
    Case("acknowledge", acknowledge("task-0", "task-1"), (append(A, B, C), pop(2))),
    Case(
        "clear",
        clear,
        (append(A, B), pop(), schedule(C), store_result(finished(D)), add_cron),
    ),
    Case("add_cron: new", add_cron),
    Case("add_cron: known", add_cron, (add_cron,), changes=False),
    Case("delete_cron: known", delete_cron, (add_cron,)),
    Case("delete_cron: unknown", delete_cron, changes=False),
    Case("store_workflow: new", store_workflow()),
    Case("store_workflow: known", store_workflow(pending_task_ids=["x"]), (store_workflow(),)),
    Case("delete_workflow: known", delete_workflow, (store_workflow(),)),
    Case("delete_workflow: unknown", delete_workflow, changes=False),
    Case("mark_workflow_task_complete: one of two", complete("task-0"), (store_workflow(),)),
    Case(
        "mark_workflow_task_complete: the last",
        complete("task-1"),
        (store_workflow(), complete("task-0")),
    ),
    Case("acquire_rate_limit: sliding", acquire("sliding_window")),
    Case("acquire_rate_limit: fixed", acquire("fixed_window")),
]

# Of numbers and times that differ anyway only what does not: whether there is one, which comes
# first, and whether it has passed.
SEEN = """
    SELECT queue, 'task', ROW(row_number() OVER (PARTITION BY queue ORDER BY position, id),
        id, payload, state, position IS NULL, owner IS NULL, claim_token IS NULL, func, status,
        crashes)::text FROM sheppy_tasks
    UNION ALL SELECT queue, 'scheduled', ROW(task_id, kind, lease_token IS NULL, run_at > now(),
        CASE WHEN kind = 'due' THEN run_at END)::text FROM sheppy_scheduled_tasks
    UNION ALL SELECT queue, 'result', ROW(id, payload, status, func, claim_token IS NULL,
        expires_at IS NULL)::text FROM sheppy_results
    UNION ALL SELECT queue, 'cron', ROW(id, expression, payload)::text FROM sheppy_crons
    UNION ALL SELECT queue, 'workflow', ROW(id, payload, finished)::text FROM sheppy_workflows
    UNION ALL SELECT queue, 'wait', ROW(workflow_id, task_id)::text FROM sheppy_workflow_tasks
    UNION ALL SELECT queue, 'limit', ROW(key, window_count)::text FROM sheppy_rate_limits
    UNION ALL SELECT queue, 'start', ROW(key, task_id)::text FROM sheppy_rate_limit_entries
    UNION ALL SELECT name, 'queue', '' FROM sheppy_queues
    ORDER BY 1, 2, 3"""


async def stored(database: TestDatabase) -> dict[str, list[tuple[str, str]]]:
    """All that the tables hold, by queue."""
    found: dict[str, list[tuple[str, str]]] = {}
    for queue, what, row in await database.fetch(SEEN):
        found.setdefault(queue, []).append((what, row))
    return found


READS: dict[str, Step] = {
    "get_pending": lambda backend, queue: backend.get_pending(queue, 10),
    "size": lambda backend, queue: backend.size(queue),
    "get_tasks": lambda backend, queue: backend.get_tasks(queue, ["task-0", "done"]),
    "get_all_tasks": lambda backend, queue: backend.get_all_tasks(queue),
    "get_scheduled": lambda backend, queue: backend.get_scheduled(queue),
    "get_results": lambda backend, queue: backend.get_results(queue, ["done"]),
    "get_results in time": lambda backend, queue: backend.get_results(queue, ["done"], 30),
    "get_stats": lambda backend, queue: backend.get_stats(queue),
    "list_queues": lambda backend, _: backend.list_queues(),
    "get_crons": lambda backend, queue: backend.get_crons(queue),
    "get_workflows": lambda backend, queue: backend.get_workflows(queue, ["workflow"]),
    "get_all_workflows": lambda backend, queue: backend.get_all_workflows(queue),
    "get_pending_workflows": lambda backend, queue: backend.get_pending_workflows(queue),
}


async def store_one_of_each(backend: SqlBackend, queue: str) -> None:
    """So that every read finds something."""
    steps = (
        append(A, B),
        store_result(finished(make_task("done"))),
        schedule(C),
        add_cron,
        store_workflow(),
    )
    for step in steps:
        await step(backend, queue)


class Everything:
    """Every method at once, each write on a queue of its own, and what it must answer.

    The second backend makes those calls that the first refuses because of what it holds.
    """

    def __init__(self, backend: SqlBackend, second: SqlBackend, database: TestDatabase) -> None:
        self._backend = backend
        self._second = second
        self._database = database
        self._reads = {name: read for name, read in READS.items() if name != "list_queues"}
        self._expected: dict[str, Any] = {}

    async def prepare(self) -> None:
        for case in CASES:
            for queue in (f"calm {case}", str(case)):
                await case.set_up(self._backend_of(case), queue)
            self._expected[str(case)] = await case.call(self._backend_of(case), f"calm {case}")
        await store_one_of_each(self._second, "read")
        for name, read in self._reads.items():
            self._expected[name] = await read(self._backend, "read")

    def start(self) -> list[asyncio.Future[Any]]:
        writes = [case.call(self._backend_of(case), str(case)) for case in CASES]
        reads = [read(self._backend, "read") for read in self._reads.values()]
        return [asyncio.ensure_future(call) for call in (*writes, *reads)]

    async def check(self, answers: list[Any]) -> None:
        assert dict(zip(self._expected, answers, strict=True)) == self._expected
        found = await stored(self._database)
        for case in CASES:
            assert found.get(str(case)) == found.get(f"calm {case}"), case.name

    def _backend_of(self, case: Case) -> SqlBackend:
        return self._second if case.unclaimed else self._backend


async def assert_that_no_claim_is_forgotten(
    backend: SqlBackend, database: TestDatabase, queue: str
) -> None:
    """What stands as claimed is held by the backend: it can finish it."""
    sql = "SELECT id FROM sheppy_tasks WHERE queue = :queue AND state = 'claimed' ORDER BY id"
    claimed = [task_id for (task_id,) in await database.fetch(sql, queue=queue)]
    for task_id in claimed:
        await backend.store_result(queue, finished(make_task(task_id)))
    assert list(await backend.get_results(queue, claimed)) == claimed
