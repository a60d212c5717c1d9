"""What a task enqueues as it completes."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sheppy import BackendError, Queue, Task

from sheppy_sql import Completion, _wakeups
from sheppy_sql.middleware import children_with_result
from tests.completing import jobs
from tests.completing.conftest import Orders, backend_of, begin, complete, fail, run
from tests.completing.jobs import child
from tests.completing.tasks import Order, act, actions
from tests.host.support import MakeBackend, until
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner


async def waiting(queue: Queue) -> list[int]:
    """The numbers of the children in line, in order."""
    return [task.spec.args[0] for task in await queue.get_pending(100)]


async def test_children_enqueued_through_the_session_come_with_the_result(app: Queue) -> None:
    self, topic = await begin(app), _wakeups.pending("test")
    with backend_of(app)._connected.wakeups.waiting([topic]) as waiter:
        async with backend_of(app).complete(self) as tx:
            bound = Queue(backend_of(app).bind(tx), "test")
            assert await bound.add([child(1), child(2)]) == [True, True]
            assert await bound.schedule(child(3), timedelta(hours=1))
            assert await waiting(app) == []
            assert waiter.take_signals() == set()
        await waiter.wait(20)
        assert waiter.take_signals() == {topic}
    assert await waiting(app) == [1, 2]
    assert [task.spec.args[0] for task in await app.get_scheduled()] == [3]


@pytest.mark.parametrize("how", ["raises", "has lost its claim"])
async def test_children_are_gone_where_the_task_does_not_complete(
    app: Queue, make_backend: MakeBackend, how: str
) -> None:
    self, other = await begin(app), Queue(await make_backend(), "test")
    if how != "raises":
        await other.clear()

    async def have_child(tx: Completion) -> None:
        await Queue(backend_of(app).bind(tx), "test").add(child(1))
        if how == "raises":
            await fail(tx)

    with pytest.raises(RuntimeError if how == "raises" else BackendError):
        await complete(backend_of(app), self, then=have_child)
    assert await waiting(app) == []


async def run_with_middleware(queue: Queue, task: Task) -> Task:
    await queue.add(task)
    worker = make_worker(queue.backend, middleware=[children_with_result], enable_scheduler=False)
    await run_worker(worker, max_tasks=1)
    return await queue.get_task(task) or task


async def test_children_held_back_by_the_middleware_come_with_the_completion(
    app: Queue, orders: Orders
) -> None:
    seen: list[Any] = []

    async def work(self: Task) -> Task:
        await app.add(child(1))
        async with backend_of(app).complete(self) as tx:
            await app.schedule(child(2), timedelta(0))
            tx.add(Order(id=1))
            await Queue(backend_of(app).bind(tx), "test").add(child(3))
            seen.append(await waiting(app))
        seen.append(await waiting(app))
        seen.append(len(await app.get_scheduled()))
        # From now on nothing is left that they could be stored with.
        await app.add(child(4))
        seen.append(await waiting(app))
        return child(5)

    actions["work"] = work
    done = await run_with_middleware(app, act("work"))
    assert (done.status, done.result) == ("completed", None)
    assert seen == [[], [3, 1], 1, [3, 1, 4]]
    assert await waiting(app) == [3, 1, 4, 5]
    assert await orders() == [1]


async def test_children_held_back_stay_so_where_the_completion_fails(
    app: Queue, make_backend: MakeBackend
) -> None:
    other = Queue(await make_backend(), "test")

    async def work(self: Task) -> str:
        await app.add(child(1))
        with pytest.raises(RuntimeError):
            await complete(backend_of(app), self, then=fail)
        await app.add(child(2))
        return "usual"

    async def lose(self: Task) -> str:
        await app.add(child(3))
        await other.retry(self)
        with pytest.raises(BackendError):
            await complete(backend_of(app), self)
        await app.add(child(4))
        return "lost"

    actions.update(work=work, lose=lose)
    assert (await run_with_middleware(app, act("work"))).result == "usual"
    assert await waiting(app) == [1, 2]
    await app.clear()
    task = act("lose")
    assert (await run_with_middleware(app, task)).status == "new"
    assert [task.id for task in await app.get_pending(10)] == [task.id]


async def test_what_a_task_returns_is_enqueued_after_it_has_completed(app: Queue) -> None:
    async def work(self: Task) -> Task:
        await complete(backend_of(app), self)
        return child(1)

    actions["work"] = work
    await run(app, act("work"))
    assert await waiting(app) == [1]


@pytest.mark.usefixtures("orders")
async def test_sqlite_says_that_the_backend_itself_would_wait_for_the_block(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """PostgreSQL has as many transactions at once as are wanted."""
    queue = Queue(await make_backend(), "test")
    self = await begin(queue)
    is_sqlite = database.dialect == "sqlite"
    async with backend_of(queue).complete(self) as tx:
        assert await queue.add(child(1))
        tx.add(Order(id=1))
        await tx.flush()
        if is_sqlite:
            with pytest.raises(BackendError, match="wait for it; use Queue"):
                await queue.add(child(2))
        else:
            await queue.add(child(2))
        await tx.rollback()
        assert await queue.add(child(3))
    assert await queue.add(child(4))
    assert await waiting(queue) == ([1, 3, 4] if is_sqlite else [1, 2, 3, 4])


@pytest.mark.posix
@pytest.mark.usefixtures("orders")
async def test_workflow_goes_on_whose_worker_died_right_after_the_completion(
    make_backend: MakeBackend,
    database: TestDatabase,
    spawn: Spawner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(jobs.DIRECTORY, str(tmp_path))
    backend = await make_backend(lease=5, resume_workflows_after=0.5)
    queue, workflow = Queue(backend, jobs.QUEUE), jobs.placing()
    await queue.add_workflow(workflow)
    dying = spawn(jobs.work, database.url, env={jobs.DIRECTORY: str(tmp_path)})
    assert await asyncio.to_thread(dying.wait, 60) == -9, dying.report()
    jobs.backends["app"] = backend
    worker = make_worker(backend, max_concurrent_tasks=1)
    working = asyncio.create_task(run_worker(worker, max_tasks=1))

    async def has_ended() -> bool:
        found = await queue.get_workflow(workflow)
        return found is not None and found.completed

    await until(has_ended)
    await working
    found = await queue.get_workflow(workflow)
    assert found is not None
    assert found.final_result == 20
    assert jobs.runs() == ["1after", "2"]
    entries = await database.fetch("SELECT number FROM entries ORDER BY number")
    assert entries == [(1,), (2,)]
