"""What a task enqueues is enqueued if and only if its result is stored."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sheppy import MemoryBackend, Queue, Task, Worker
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sheppy_sql import SqlBackend, _unit, _wakeups
from sheppy_sql._payloads import encode_task
from sheppy_sql._stores import tasks as task_store
from sheppy_sql._stores.children import Child
from sheppy_sql._transaction import Transaction
from sheppy_sql.middleware import children_with_result
from tests.concurrency import jobs
from tests.faults import dying, parents
from tests.faults.parents import (
    act,
    actions,
    add_and_wait,
    add_under_its_own_middleware,
    answers,
    fail_once,
    gates,
    have_children,
    leaf,
    left_running,
    queues,
)
from tests.host.support import MakeBackend, finished, running, until
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner


@pytest.fixture(autouse=True)
def _fresh() -> None:
    for memory in (queues, answers, left_running, gates, actions):
        memory.clear()


@pytest.fixture
def app(queue: Queue) -> Queue:
    """The queue that tasks use, on the worker's own backend."""
    queues["test"] = queue
    return queue


def worker_of(backend: Any, names: str | list[str] = "test", **options: Any) -> Worker:
    return make_worker(backend, names, middleware=[children_with_result], **options)


async def run_one(queue: Queue, task: Task) -> Task:
    """One task, run; what it enqueued is still there."""
    await queue.add(task)
    await run_worker(worker_of(queue.backend, queue.name, enable_scheduler=False), max_tasks=1)
    return await finished(queue, task)


async def waiting(queue: Queue) -> list[int]:
    """The numbers of the leaves in line, in order."""
    return [task.spec.args[0] for task in await queue.get_pending(100)]


@pytest.mark.posix
@pytest.mark.parametrize("is_used", [True, False])
async def test_children_exist_once_though_their_parents_worker_was_killed(
    make_backend: MakeBackend,
    database: TestDatabase,
    spawn: Spawner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_used: bool,
) -> None:
    """Without the middleware, twice: that is what it is for."""
    directory = tmp_path / "ran"
    directory.mkdir()
    monkeypatch.setenv(jobs.TRACES, str(directory))
    queue = queues["test"] = Queue(await make_backend(lease=1), "test")
    await queue.add(have_children())
    arguments = [database.url, *(["middleware"] if is_used else [])]
    child = spawn(parents.work_until_it_stores, *arguments, env={jobs.TRACES: str(directory)})
    assert await asyncio.to_thread(child.wait) == -9, child.report()
    expected = [0, 0, 1, 2, 3, 4] if is_used else [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    middleware: Any = [children_with_result] if is_used else []

    async def has_all() -> bool:
        return len(await queue.get_all_tasks()) == len(expected) - 1 and all(
            task.status == "completed" for task in await queue.get_all_tasks()
        )

    async with running(make_worker(queue.backend, middleware=middleware)):
        await until(has_all)
    assert jobs.traces(directory) == expected


async def test_children_are_not_there_before_their_parent_has_its_result(app: Queue) -> None:
    known, child = leaf(0), leaf(1)
    await app.add(known)
    await app.backend.pop("test")

    async def look(queue: Queue) -> None:
        answers.append(await queue.add([child, known, child, leaf(2)]))
        answers.append(await queue.add(child))
        answers.append(await queue.schedule(child, timedelta(hours=1)))
        answers.append(await queue.get_task(child))
        answers.append(await queue.size())

    actions["look"] = look
    assert (await run_one(app, act("look"))).error is None
    assert answers == [[True, False, False, True], False, False, None, 0]
    assert await waiting(app) == [1, 2]
    found = await app.get_task(child)
    assert found is not None
    assert (found.status, found.scheduled_at) == ("new", None)


async def test_scheduled_children_are_scheduled_with_the_result(app: Queue) -> None:
    child, at = leaf(1), datetime(2099, 1, 1, tzinfo=timezone.utc)

    async def schedule(queue: Queue) -> None:
        answers.append(await queue.schedule(child, at))
        answers.append(await queue.schedule(child, at))
        answers.append(await queue.get_scheduled())
        await queue.add(leaf(2))

    actions["schedule"] = schedule
    assert (await run_one(app, act("schedule"))).error is None
    assert answers == [True, False, []]
    [scheduled] = await app.get_scheduled()
    assert (scheduled.id, scheduled.scheduled_at) == (child.id, at)
    assert await app.backend.pop_scheduled("test") == []
    assert len(await app.backend.pop_scheduled("test", at)) == 1
    assert await waiting(app) == [2]


async def test_what_is_bound_to_a_transaction_goes_with_that_and_not_with_the_result(
    app: Queue, backend: SqlBackend, database: TestDatabase
) -> None:
    engine = create_async_engine(database.worker_url)

    async def enqueue(queue: Queue) -> None:
        async with AsyncSession(engine) as session:
            await Queue(backend.bind(session), "test").add(leaf(1))
            await session.commit()
            await Queue(backend.bind(session), "test").add(leaf(2))
            await session.rollback()
        await queue.add(leaf(3))
        answers.append(await waiting(queue))

    actions["enqueue"] = enqueue
    assert (await run_one(app, act("enqueue"))).error is None
    await engine.dispose()
    assert answers == [[1]]
    assert await waiting(app) == [1, 3]


@pytest.mark.parametrize("children", [1, 3])
async def test_chained_tasks_go_with_the_result_as_well(
    app: Queue, monkeypatch: pytest.MonkeyPatch, children: int
) -> None:
    async def chain(_: Queue) -> Task | list[Task]:
        tasks = [leaf(number) for number in range(children)]
        return tasks[0] if children == 1 else tasks

    stored = []
    store_result = app.backend.store_result

    async def look_first(*args: Any) -> bool:
        stored.append(await app.size())
        return await store_result(*args)

    actions["chain"] = chain
    monkeypatch.setattr(app.backend, "store_result", look_first)
    await run_one(app, act("chain"))
    assert stored == [0]
    assert await waiting(app) == list(range(children))


async def test_a_parent_that_fails_has_no_children(app: Queue) -> None:
    assert (await run_one(app, add_under_its_own_middleware(fails=True))).status == "failed"
    assert await app.size() == 0
    assert (await run_one(app, add_under_its_own_middleware(fails=False))).status == "completed"
    assert await waiting(app) == [1]


async def test_a_parent_that_is_retried_has_the_children_of_its_last_run(app: Queue) -> None:
    parent = fail_once()
    await app.add(parent)
    async with running(worker_of(app.backend)):
        assert (await finished(app, parent)).status == "completed"
    assert len(await app.get_all_tasks()) == 2


async def test_the_tasks_own_middleware_is_enough(app: Queue) -> None:
    for fails in (True, False):
        await app.add(add_under_its_own_middleware(fails=fails))
    await run_worker(make_worker(app.backend, enable_scheduler=False), max_tasks=2)
    assert await waiting(app) == [1]


async def test_a_parent_that_was_taken_over_has_no_children(
    app: Queue, make_backend: MakeBackend
) -> None:
    other = await make_backend()
    parent = act("lose")

    async def lose(queue: Queue) -> None:
        await queue.add(leaf(1))
        if not answers:
            answers.append("lost")
            await other.append("test", [parent.model_dump(mode="json")], unique=False)

    actions["lose"] = lose
    await app.add(parent)
    worker = worker_of(app.backend, enable_scheduler=False)
    await run_worker(worker, max_tasks=1)
    [task] = await app.get_pending(10)
    assert task.id == parent.id
    await run_worker(worker, max_tasks=1)
    assert await waiting(app) == [1]


async def test_another_backend_on_the_installation_takes_part(
    make_backend: MakeBackend, tmp_path: Path
) -> None:
    """And one on another installation does not."""
    queue, foreign = Queue(await make_backend(), "test"), SqlBackend(f"sqlite:///{tmp_path}/x.db")
    elsewhere = Queue(foreign, "test")
    queues["test"] = Queue(await make_backend(), "test")

    async def add(queue: Queue) -> None:
        await queue.add(leaf(1))
        await elsewhere.add(leaf(2))
        answers.append([await queue.size(), await elsewhere.size()])

    actions["add"] = add
    await run_one(queue, act("add"))
    assert answers == [[0, 1]]
    assert await waiting(queue) == [1]
    await foreign.disconnect()


async def test_tasks_that_run_at_once_do_not_mix_their_children(app: Queue) -> None:
    count = 10
    tasks = [add_and_wait(number, fails=number % 2 == 1) for number in range(count)]
    await app.add(tasks)
    worker = worker_of(app.backend, max_concurrent_tasks=count, enable_scheduler=False)
    working = asyncio.create_task(run_worker(worker, max_tasks=count))
    for number in range(count):
        await asyncio.wait_for(gates[f"{number} has added"].wait(), 30)
    assert await app.size() == 0
    gates["go on"].set()
    await working
    assert sorted(await waiting(app)) == [0, 2, 4, 6, 8]


async def test_what_a_task_leaves_running_enqueues_by_itself(app: Queue) -> None:
    async def later(queue: Queue) -> None:
        await gates["ended"].wait()
        answers.append(await queue.add(leaf(2)))

    async def leave(queue: Queue) -> None:
        await queue.add(leaf(1))
        left_running.append(asyncio.create_task(later(queue)))

    actions["leave"] = leave
    await run_one(app, act("leave"))
    gates["ended"].set()
    await left_running[0]
    assert answers == [True]
    assert await waiting(app) == [1, 2]


async def test_what_a_cancelled_task_leaves_running_enqueues_by_itself(app: Queue) -> None:
    async def later(queue: Queue) -> None:
        await gates["ended"].wait()
        answers.append(await queue.add(leaf(2)))

    async def leave(queue: Queue) -> None:
        await queue.add(leaf(1))
        left_running.append(asyncio.create_task(later(queue)))
        gates["left"].set()
        await asyncio.Event().wait()

    actions["leave"] = leave
    await app.add(act("leave"))
    [popped] = await app._pop_pending(limit=1)
    run = asyncio.create_task(worker_of(app.backend).process_task(popped, app))
    await gates["left"].wait()
    run.cancel()
    await asyncio.wait([run])
    gates["ended"].set()
    await left_running[0]
    assert answers == [True]
    assert await waiting(app) == [2]


async def test_what_comes_too_late_enqueues_by_itself(
    backend: SqlBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is stored while it is being looked whether a child's id is free."""
    wakeups, find = backend._connected.wakeups, task_store.find

    async def find_late(*args: Any) -> set[str]:
        _unit.end(wakeups, "test", {"id": "parent"})
        return await find(*args)

    monkeypatch.setattr(task_store, "find", find_late)
    _unit.begin(wakeups, "test", "parent")
    assert await backend.append("test", [{"id": "child"}]) == [True]
    assert await backend.size("test") == 1
    monkeypatch.undo()
    assert await backend.append("test", [{"id": "child"}]) == [False]


async def test_enqueueing_afterwards_is_as_ever(app: Queue) -> None:
    """In the very context in which the task ran."""
    actions["nothing"] = lambda _: asyncio.sleep(0)
    await app.add(act("nothing"))
    [popped] = await app._pop_pending(limit=1)
    await worker_of(app.backend).process_task(popped, app)
    assert await app.add(leaf(1))
    assert await waiting(app) == [1]


async def test_task_whose_result_cannot_be_stored_holds_nothing_back_afterwards(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    queue = queues["test"] = Queue(await make_backend(max_payload_bytes=3000), "test")

    async def grow(queue: Queue) -> str:
        await queue.add(leaf(1))
        return "x" * 4000

    actions["grow"] = grow
    await queue.add(act("grow"))
    [popped] = await queue._pop_pending(limit=1)
    await worker_of(queue.backend).process_task(popped, queue)
    assert "max_payload_bytes" in caplog.text
    assert await queue.size() == 0
    assert await queue.add(leaf(2))
    assert await waiting(queue) == [2]


async def test_whoever_waits_for_tasks_is_woken(backend: SqlBackend) -> None:
    queues["test"] = Queue(backend, "other")

    async def add(queue: Queue) -> None:
        await queue.add(leaf(1))

    actions["add"] = add
    topic = _wakeups.pending("other")
    with backend._connected.wakeups.waiting([topic]) as waiter:
        await run_one(Queue(backend, "test"), act("add"))
        await waiter.wait(20)
        assert waiter.take_signals() == {topic}


async def test_answer_that_was_lost_enqueues_nothing_twice(backend: SqlBackend) -> None:
    [kept, later] = [
        encode_task(task.model_dump(mode="json"), 10_000) for task in (leaf(1), leaf(2))
    ]
    parent = {"id": "parent", "status": "completed", "finished_at": "now"}
    await backend.append("test", [parent])
    await backend.pop("test")
    at = datetime(2099, 1, 1, tzinfo=timezone.utc)
    children = _unit.Children([Child("test", kept, None), Child("test", later, at)])
    token = backend._claims.token("test", "parent")

    async def finish(tx: Transaction, repeated: bool) -> bool:
        row = encode_task(parent, 10_000)
        again = dataclasses.replace(tx, repeated=repeated)
        return await children.finish(again, "test", row, token, None)

    database = backend._connected.database
    assert await database.write("store a result", finish, False)
    [child] = await backend.pop("test")
    await backend.store_result("test", {**child, "status": "completed", "finished_at": "now"})
    assert len(await backend.pop_scheduled("test", at)) == 1
    assert await database.write("store a result", finish, True)
    assert await backend.size("test") == 0
    assert await backend.get_scheduled("test") == []
    assert await database.write("store a result", finish, False) is False
    assert await backend.size("test") == 0


async def test_workflow_of_tasks_under_the_middleware_goes_on(
    app: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "ran"
    directory.mkdir()
    monkeypatch.setenv(jobs.TRACES, str(directory))
    workflow = dying.two_steps()
    await app.add_workflow(workflow)
    await run_worker(worker_of(app.backend, enable_scheduler=False), max_tasks=2)
    found = await app.get_workflow(workflow)
    assert found is not None
    assert found.final_result == 20


@pytest.mark.parametrize("fails", [False, True])
async def test_workflow_that_a_task_adds_starts_at_once(app: Queue, fails: bool) -> None:
    """For its record is stored at once, and would wait for its first tasks."""

    async def add(queue: Queue) -> None:
        await queue.add_workflow(dying.two_steps())
        await queue.add(leaf(0))
        answers.append(await waiting(queue))
        if fails:
            raise RuntimeError("broken")

    actions["add"] = add
    await run_one(app, act("add"))
    assert answers == [[1]]
    assert await waiting(app) == ([1] if fails else [1, 0])


async def test_other_backends_are_left_alone() -> None:
    backend = MemoryBackend(instant_processing=False)
    await backend.connect()
    queue = queues["test"] = Queue(backend, "test")

    async def add(queue: Queue) -> None:
        await queue.add(leaf(1))
        answers.append(await queue.size())

    actions["add"] = add
    await queue.add(act("add"))
    await run_worker(worker_of(backend, enable_scheduler=False), max_tasks=1)
    assert answers == [1]
