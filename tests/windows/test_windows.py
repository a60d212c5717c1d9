"""Processes killed between two calls of the host, or in the middle of one: every task still runs.

The windows have the numbers of docs/durability.md.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
from sheppy import Queue, Task

from sheppy_sql import SqlBackend
from tests.host.support import all_finished, running
from tests.support import make_worker
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner
from tests.windows import jobs

MakeBackend = Callable[..., Awaitable[SqlBackend]]
Die = Callable[..., Awaitable[None]]

INSIDE = ["before the commit", "after the commit"]

pytestmark = pytest.mark.posix


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jobs.DIRECTORY, str(tmp_path))


@pytest.fixture
def die(database: TestDatabase, spawn: Spawner) -> Die:
    """Runs a process to its death."""

    async def run(target: Callable[..., object], *args: str) -> None:
        child = spawn(target, database.url, *args)
        status = await asyncio.to_thread(child.wait, 60)
        assert status == -signal.SIGKILL, child.report()

    return run


@pytest.fixture
async def queue(make_backend: MakeBackend) -> Queue:
    return Queue(await make_backend(lease=jobs.LEASE), jobs.QUEUE)


async def finish(queue: Queue, *tasks: Task) -> None:
    """Let a worker that lives run what is left."""
    async with running(make_worker(queue.backend)):
        done = await all_finished(queue, list(tasks))
    assert {task.status for task in done} == {"completed"}
    assert await queue.size() == 0
    assert await queue.get_scheduled() == []


@pytest.mark.torture
@pytest.mark.parametrize("moment", INSIDE)
@pytest.mark.parametrize("call", ["add", "schedule"])
async def test_w1_producer_dies_as_it_adds_a_task(
    queue: Queue, die: Die, call: str, moment: str
) -> None:
    task = jobs.once("task")
    await die(jobs.produce, str(task.id), call, moment)
    # Either all of it has happened or nothing.
    assert await queue.add(task) is (moment == "before the commit")
    await finish(queue, task)
    assert jobs.runs() == ["task"]


@pytest.mark.torture
@pytest.mark.parametrize(
    ("method", "moment"),
    [
        *(("pop_scheduled", moment) for moment in [*INSIDE, "after"]),
        *(("append", moment) for moment in ["before", *INSIDE]),
    ],
)
async def test_w2_and_w3_scheduler_dies_with_a_due_task(
    queue: Queue, die: Die, method: str, moment: str
) -> None:
    task = jobs.once("task")
    await queue.schedule(task, datetime.now(timezone.utc))
    await die(jobs.work, method, moment)
    await finish(queue, task)
    assert jobs.runs() == ["task"]


@pytest.mark.parametrize(
    ("method", "moment", "times"),
    [
        ("pop", "before the commit", 1),
        ("pop", "after the commit", 1),
        ("pop", "after", 1),
        ("store_result", "before", 2),
        ("store_result", "before the commit", 2),
        ("store_result", "after the commit", 1),
    ],
)
async def test_w4_and_w5_worker_dies_with_a_task(
    queue: Queue, die: Die, method: str, moment: str, times: int
) -> None:
    task = jobs.once("task")
    await queue.add(task)
    await die(jobs.work, method, moment)
    await finish(queue, task)
    assert jobs.runs() == ["task"] * times


async def test_w6_task_that_outlasts_its_workers_shutdown_runs_again(
    make_backend: MakeBackend, queue: Queue
) -> None:
    from tests.host import tasks

    tasks.gates.clear()
    task = tasks.wait_at("gate")
    await queue.add(task)
    leaving = await make_backend()
    worker = make_worker(leaving, shutdown_timeout=0.01)
    work = asyncio.create_task(worker.work(register_signal_handlers=False))
    await tasks.gates["gate"].entered.wait()
    worker._shutdown_event.set()
    await work
    await leaving.disconnect()
    tasks.gates["gate"].open.set()
    await finish(queue, task)


@pytest.mark.torture
@pytest.mark.parametrize(
    ("method", "moment"),
    [
        ("store_result", "before the commit"),
        ("store_result", "after the commit"),
        ("schedule", "before"),
        ("schedule", "before the commit"),
        ("schedule", "after the commit"),
    ],
)
async def test_w7_worker_dies_between_a_failure_and_its_retry(
    queue: Queue, die: Die, method: str, moment: str
) -> None:
    task = jobs.at_second_attempt("task")
    await queue.add(task)
    await die(jobs.work, method, moment)
    await finish(queue, task)
    first_again = (method, moment) == ("store_result", "before the commit")
    assert jobs.runs() == ["task"] * (3 if first_again else 2)


@pytest.mark.torture
@pytest.mark.parametrize(
    ("method", "moment"),
    [
        ("acquire_rate_limit", "after"),
        ("schedule", "before the commit"),
        ("schedule", "after the commit"),
        ("acknowledge", "before"),
        ("acknowledge", "after"),
    ],
)
async def test_w8_worker_dies_with_a_task_that_must_wait(
    queue: Queue, die: Die, method: str, moment: str
) -> None:
    task = jobs.limited("task")
    await queue.add(task)
    began = time.monotonic()
    await die(jobs.work, method, moment)
    await finish(queue, task)
    assert jobs.runs() == ["task"]
    assert time.monotonic() - began >= jobs.PERIOD


@pytest.mark.torture
@pytest.mark.parametrize("moment", INSIDE)
async def test_w13_process_dies_as_it_cancels_a_task(queue: Queue, die: Die, moment: str) -> None:
    task = jobs.once("task")
    await queue.add(task)
    await die(jobs.produce, str(task.id), "cancel", moment)
    if moment == "before the commit":
        await finish(queue, task)
        assert jobs.runs() == ["task"]
    else:
        done = await queue.wait_for(task, timeout=-1)
        assert done is not None
        assert done.status == "cancelled"
        assert await queue.size() == 0


@pytest.mark.torture
@pytest.mark.parametrize("moment", ["before the result", "before the retry"])
async def test_w14_process_dies_with_a_task_that_it_took_over(
    make_backend: MakeBackend, queue: Queue, die: Die, moment: str
) -> None:
    task = jobs.once("task")
    await queue.add(task)
    holding = await make_backend()
    [taken] = await holding.pop(queue.name)
    await die(jobs.take_over, taken["id"], moment)
    await finish(queue, task)
    assert jobs.runs() == ["task"]
