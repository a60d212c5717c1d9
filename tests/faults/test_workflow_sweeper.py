"""Workflows go on though a process dies between two of their steps."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sheppy import Queue, Workflow

from sheppy_sql import SqlBackend
from sheppy_sql._stores import chores as chore_store
from sheppy_sql._sweeper import PAGE, can_import
from tests.concurrency import jobs
from tests.faults import dying
from tests.faults.dying import two_steps
from tests.host.support import MakeBackend, running, until
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner

GRACE = 0.3  # seconds; what takes a live worker milliseconds

Resumed = Counter[str]


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> Resumed:
    """How often each workflow has been resumed."""
    counts: Resumed = Counter()
    resume = Queue.resume_workflow

    async def counted(self: Queue, workflow: Any, *args: Any) -> Any:
        counts[str(workflow)] += 1
        return await resume(self, workflow, *args)

    monkeypatch.setattr(Queue, "resume_workflow", counted)
    return counts


async def sweep(backend: SqlBackend) -> None:
    sweeper = backend._connected.sweeper
    assert sweeper is not None
    await sweeper.sweep(["test"])


async def pass_time(database: TestDatabase) -> None:
    """Everything that is stored has been so for years, and every chore is due."""
    long_ago = "'2020-01-01 00:00:00'"
    await database.execute(
        f"UPDATE sheppy_workflows SET created_at = {long_ago}, updated_at = {long_ago}"
        " WHERE updated_at IS NULL OR updated_at < '9000-01-01 00:00:00'"
    )
    await database.execute(f"UPDATE sheppy_results SET finished_at = {long_ago}")
    await database.execute("DELETE FROM sheppy_chores")


async def add_stuck(queue: Queue, database: TestDatabase, count: int = 1) -> list[str]:
    """Workflows that were stored long ago, and whose first tasks were never added."""
    workflows = [two_steps() for _ in range(count)]
    for workflow in workflows:
        await queue.add_workflow(workflow)
    await database.execute("DELETE FROM sheppy_tasks")
    await pass_time(database)
    return [str(workflow.id) for workflow in workflows]


async def ended(queue: Queue, workflow_id: Any) -> Workflow:
    async def has_ended() -> bool:
        found = await queue.get_workflow(workflow_id)
        return found is not None and found.finished_at is not None

    await until(has_ended)
    found: Workflow | None = await queue.get_workflow(workflow_id)
    assert found is not None
    return found


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The steps that ran, here and in children, once for each run."""
    directory = tmp_path / "ran"
    directory.mkdir()
    monkeypatch.setenv(jobs.TRACES, str(directory))
    return lambda: jobs.traces(directory)


@pytest.mark.torture
@pytest.mark.posix
@pytest.mark.parametrize(
    ("method", "nth", "done"),
    [
        ("mark_workflow_task_complete", 1, [1]),
        ("mark_workflow_task_complete", 2, [1, 2]),
        ("store_workflow", 1, [1]),
        ("store_workflow", 2, [1, 2]),
        ("append", 1, [1]),
    ],
)
async def test_workflow_goes_on_after_its_worker_was_killed(
    make_backend: MakeBackend,
    database: TestDatabase,
    spawn: Spawner,
    ran: Callable[[], list[int]],
    tmp_path: Path,
    method: str,
    nth: int,
    done: list[int],
) -> None:
    queue = Queue(await make_backend(resume_workflows_after=GRACE), "test")
    workflow = two_steps()
    await queue.add_workflow(workflow)
    env = {jobs.TRACES: str(tmp_path / "ran")}
    child = spawn(dying.work_until, database.url, "test", method, str(nth), env=env)
    assert await asyncio.to_thread(child.wait) == -9, child.report()
    assert ran() == done
    async with running(make_worker(queue.backend)):
        assert (await ended(queue, workflow)).final_result == 20
    assert ran() == [1, 2]


@pytest.mark.posix
async def test_workflow_starts_though_its_producer_was_killed(
    make_backend: MakeBackend,
    database: TestDatabase,
    spawn: Spawner,
    ran: Callable[[], list[int]],
) -> None:
    queue = Queue(await make_backend(resume_workflows_after=GRACE), "test")
    child = spawn(dying.add_workflow_until, database.url, "test", "append", "1")
    assert await asyncio.to_thread(child.wait) == -9, child.report()
    [workflow] = await queue.get_pending_workflows()
    async with running(make_worker(queue.backend)):
        assert (await ended(queue, workflow.id)).final_result == 20
    assert ran() == [1, 2]


async def test_switched_off_nothing_is_resumed(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    queue = Queue(await make_backend(resume_workflows_after=None), "test")
    [workflow_id] = await add_stuck(queue, database)
    before = await queue.get_workflow(workflow_id)
    await run_worker(make_worker(queue.backend), oneshot=True)
    assert queue.backend._connected.sweeper is None  # type: ignore[attr-defined]  # a SqlBackend
    assert await queue.get_workflow(workflow_id) == before
    assert await queue.size() == 0


async def test_instance_that_takes_no_tasks_of_a_queue_resumes_nothing_in_it(
    make_backend: MakeBackend, database: TestDatabase, resumed: Resumed
) -> None:
    backend = await make_backend()
    await add_stuck(Queue(backend, "test"), database)
    await backend.pop("another queue")
    await backend._connected._sweep()
    assert not resumed
    await backend.pop("test")
    await backend._connected._sweep()
    assert resumed.total() == 1


@pytest.mark.parametrize("shared_chore", [True, False])
async def test_of_two_that_sweep_at_once_one_resumes_a_workflow(
    make_backend: MakeBackend,
    database: TestDatabase,
    resumed: Resumed,
    monkeypatch: pytest.MonkeyPatch,
    shared_chore: bool,
) -> None:
    if not shared_chore:  # as if one had been at it for longer than the chore is its own

        async def take(*_: object) -> bool:
            return True

        monkeypatch.setattr(chore_store, "is_due", take)
        monkeypatch.setattr(chore_store, "take", take)
    backends = [await make_backend() for _ in range(2)]
    queue = Queue(backends[0], "test")
    ids = await add_stuck(queue, database, 20)
    await asyncio.gather(*(sweep(backend) for backend in backends))
    assert resumed == Counter(ids)
    assert await queue.size() == 20
    await pass_time(database)
    await asyncio.gather(*(sweep(backend) for backend in backends))
    assert resumed == Counter(ids)


@pytest.mark.torture
async def test_more_workflows_than_one_look_finds_are_resumed(
    backend: SqlBackend, database: TestDatabase, resumed: Resumed
) -> None:
    count = PAGE + 7
    ids = await add_stuck(Queue(backend, "test"), database, count)
    await sweep(backend)
    assert resumed == Counter(ids)


async def unfinished(backend: SqlBackend, workflow: Workflow) -> str:
    [task_id] = (await backend.get_workflows("test", [str(workflow.id)]))[str(workflow.id)][
        "pending_task_ids"
    ]
    return str(task_id)


async def leave(backend: SqlBackend) -> None:
    pass


async def take(backend: SqlBackend) -> None:
    assert await backend.pop("test")


async def schedule(backend: SqlBackend) -> None:
    [task] = await backend.pop("test")
    later = datetime.now(timezone.utc) + timedelta(days=1)
    await backend.schedule("test", task, later, unique=False)


async def retry_later(backend: SqlBackend) -> None:
    [task] = await backend.pop("test")
    now = datetime.now(timezone.utc)
    await backend.store_result(
        "test",
        {
            **task,
            "status": "retrying",
            "error": "RuntimeError: not yet",
            "finished_at": None,
            "last_retry_at": now.isoformat(),
            "next_retry_at": (now + timedelta(days=1)).isoformat(),
        },
    )


@pytest.mark.parametrize("state", [leave, take, schedule, retry_later])
@pytest.mark.parametrize("is_marked", [False, True])
async def test_workflow_with_a_live_task_is_left_alone(
    backend: SqlBackend,
    database: TestDatabase,
    resumed: Resumed,
    state: Callable[[SqlBackend], Awaitable[None]],
    is_marked: bool,
) -> None:
    """Marked as complete, too: sheppy 0.0.7 does that before a retry."""
    queue, workflow = Queue(backend, "test"), two_steps()
    await queue.add_workflow(workflow)
    await state(backend)
    if is_marked:
        task_id = await unfinished(backend, workflow)
        await backend.mark_workflow_task_complete("test", str(workflow.id), task_id)
    await pass_time(database)
    await sweep(backend)
    assert not resumed


@pytest.mark.parametrize("status", ["completed", "failed"])
async def test_workflow_goes_on_after_a_task_that_ended_without_a_worker(
    make_backend: MakeBackend, database: TestDatabase, resumed: Resumed, status: str
) -> None:
    backend, other = await make_backend(), await make_backend()
    queue, workflow = Queue(backend, "test"), two_steps()
    await queue.add_workflow(workflow)
    [task] = await other.pop("test")
    outcome = {"result": 1} if status == "completed" else {"error": "it crashed"}
    now = datetime.now(timezone.utc).isoformat()
    await other.store_result("test", {**task, "status": status, "finished_at": now, **outcome})
    await sweep(backend)
    # A worker that has just stored a result, or just gone on, must not be overtaken.
    await database.execute("UPDATE sheppy_workflows SET updated_at = '2020-01-01 00:00:00'")
    await sweep(backend)
    assert not resumed
    await pass_time(database)
    await backend.mark_workflow_task_complete("test", str(workflow.id), task["id"])
    await sweep(backend)
    assert not resumed
    await pass_time(database)
    await sweep(backend)
    assert resumed == {str(workflow.id): 1}
    stored = await queue.get_workflow(workflow)
    assert stored is not None
    if status == "completed":
        assert await queue.size() == 1
    else:
        assert stored.error is not None


async def test_worker_between_storing_a_workflow_and_adding_its_tasks_is_not_overtaken(
    backend: SqlBackend, database: TestDatabase, resumed: Resumed
) -> None:
    ids = await add_stuck(Queue(backend, "test"), database)
    await backend.store_workflow("test", (await backend.get_workflows("test", ids))[ids[0]])
    await sweep(backend)
    assert not resumed


async def test_function_that_cannot_be_imported_is_logged_once(
    make_backend: MakeBackend,
    database: TestDatabase,
    resumed: Resumed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, other = await make_backend(), await make_backend()
    queue = Queue(backend, "test")
    ids = await add_stuck(queue, database, 2)
    payload = (await backend.get_workflows("test", ids))[ids[0]]
    strange = {**payload, "func": "no_such_module:function"}
    await backend.store_workflow("test", strange)
    for _ in range(3):
        await pass_time(database)
        await sweep(backend)
    assert resumed == {ids[1]: 1}
    assert (await backend.get_workflows("test", ids))[ids[0]] == strange
    [record] = [record for record in caplog.records if record.name == "sheppy_sql"]
    assert record.levelno == logging.WARNING
    assert ids[0] in record.getMessage()
    assert "no_such_module:function" in record.getMessage()
    # It is still there for whoever can import it.
    await database.execute("DELETE FROM sheppy_chores")
    await sweep(other)
    assert len([record for record in caplog.records if record.name == "sheppy_sql"]) == 2


async def test_workflow_that_cannot_be_resumed_keeps_no_other_from_it(
    backend: SqlBackend,
    database: TestDatabase,
    resumed: Resumed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue = Queue(backend, "test")
    ids = sorted(await add_stuck(queue, database, 3))
    payload = (await backend.get_workflows("test", ids))[ids[1]]
    await backend.store_workflow("test", {**payload, "unknown to sheppy": "secret"})
    for _ in range(2):
        await pass_time(database)
        await sweep(backend)
    assert resumed == {ids[0]: 1, ids[1]: 2, ids[2]: 1}
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == f"Failed to resume workflow {ids[1]}: ValidationError"


async def test_cleared_tasks_of_a_workflow_do_not_come_back(
    backend: SqlBackend, database: TestDatabase, resumed: Resumed
) -> None:
    queue, workflow = Queue(backend, "test"), two_steps()
    await queue.add_workflow(workflow)
    task_id = await unfinished(backend, workflow)
    await queue.clear()
    await pass_time(database)
    await sweep(backend)
    # A worker was at it when it was cleared.
    assert await backend.mark_workflow_task_complete("test", str(workflow.id), task_id) == 0
    await pass_time(database)
    await sweep(backend)
    assert not resumed
    await queue.resume_workflow(workflow.id)
    assert await queue.size() == 1
    await database.execute("DELETE FROM sheppy_tasks")
    await pass_time(database)
    await sweep(backend)
    assert resumed == {str(workflow.id): 2}


async def test_workflow_that_waits_for_nothing_is_left_alone(
    backend: SqlBackend, database: TestDatabase, resumed: Resumed
) -> None:
    await backend.store_workflow("test", {"id": "wf", "func": "tests.faults.dying:two_steps"})
    await pass_time(database)
    await sweep(backend)
    assert not resumed


def test_functions_are_found_as_sheppy_finds_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('broken')")
    (tmp_path / "unguarded_module.py").write_text("raise SystemExit(1)")
    monkeypatch.syspath_prepend(tmp_path)
    assert can_import("tests.faults.dying:two_steps")
    for unknown in (
        None,
        "",
        "nonsense",
        ":two_steps",
        "tests.faults.dying:",
        "tests.faults.dying:unknown",
        "tests.faults.dying:two_steps:more",
        ".dying:two_steps",
        "broken_module:function",
        "unguarded_module:function",
        "program.started:main",
    ):
        assert not can_import(unknown), unknown
    main = ModuleType("__main__")
    main.main = two_steps  # type: ignore[attr-defined]  # a program's function
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [str(Path("program", "started.py"))])
    assert can_import("program.started:main")
    assert not can_import("program.started:other")
    monkeypatch.setattr(sys, "argv", [])
    assert not can_import("program.started:main")
