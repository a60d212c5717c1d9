"""A task's rows, its result and the end of its claim: all of it, or nothing."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timezone
from typing import Any

import pytest
from pydantic import ValidationError
from sheppy import BackendError, Queue, Task
from sqlalchemy import select
from sqlalchemy.exc import InvalidRequestError

from sheppy_sql import Completion, SqlBackend, _wakeups
from tests.completing.conftest import Orders, backend_of, begin, complete, fail, run
from tests.completing.tasks import (
    Order,
    act,
    act_and_retry,
    actions,
    backends,
    completing,
    order,
    plain,
    receipt,
)
from tests.host.support import MakeBackend
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase


async def is_claimed(database: TestDatabase) -> bool:
    return bool(await database.fetch("SELECT 1 FROM sheppy_tasks WHERE state = 'claimed'"))


async def test_rows_result_and_end_of_the_claim_come_together(
    app: Queue, orders: Orders, database: TestDatabase
) -> None:
    seen: list[Any] = []

    async def work(self: Task) -> None:
        async with backend_of(app).complete(self) as tx:
            tx.add(Order(id=1, task=str(self.id)))
            await tx.flush()
            tx.set_result("ordered")
            seen.append(await orders())
            seen.append((await app.get_task(self) or self).status)
        seen.append(await orders())
        seen.append((await app.get_task(self) or self).result)
        seen.append(await is_claimed(database))

    actions["work"] = work
    [done] = await run(app, act("work"))
    assert seen == [[], "new", [1], "ordered", False]
    assert (done.status, done.result, done.error) == ("completed", "ordered", None)


async def test_what_is_stored_is_what_the_worker_would_have_stored(app: Queue) -> None:
    usual, own = [task.model_dump(mode="json") for task in await run(app, plain(1), completing(1))]
    stored = await app.backend.get_tasks("test", [usual["id"], own["id"]])
    assert list(stored[own["id"]]) == list(stored[usual["id"]])
    differing = {"id": None, "created_at": None, "finished_at": None, "spec": None}
    assert {**stored[own["id"]], **differing} == {**stored[usual["id"]], **differing}
    finished_at = Task.model_validate(stored[own["id"]]).finished_at
    assert finished_at is not None
    assert 0 <= (datetime.now(timezone.utc) - finished_at).total_seconds() < 60
    assert stored[own["id"]]["finished_at"].endswith("Z")


async def test_result_is_null_where_none_is_set(app: Queue) -> None:
    async def work(self: Task) -> str:
        async with backend_of(app).complete(self):
            pass
        return "ignored"

    actions["work"] = work
    [done] = await run(app, act("work"))
    assert (done.status, done.result) == ("completed", None)


async def test_backend_is_given_by_depends(app: Queue, orders: Orders) -> None:
    [done] = await run(app, order(7))
    assert (done.status, done.result) == ("completed", 7)
    assert await orders() == [7]


async def test_another_backend_on_the_installation_finds_the_claim(
    make_backend: MakeBackend, orders: Orders, database: TestDatabase
) -> None:
    """sheppy's command line makes the worker's backend from the URL."""
    queue = Queue(await make_backend(), "test")
    backends["app"] = SqlBackend(database.url)  # connected by its first use
    [done] = await run(queue, order(7))
    assert (done.status, done.result) == ("completed", 7)
    assert await orders() == [7]
    await backends["app"].disconnect()


async def test_raising_inside_rolls_all_back(app: Queue, orders: Orders) -> None:
    async def work(self: Task) -> None:
        async with backend_of(app).complete(self) as tx:
            tx.add(Order(id=1))
            await tx.flush()
            tx.set_result("ordered")
            raise KeyError("broken")

    actions["work"] = work
    [done] = await run(app, act("work"))
    assert (done.status, done.result, done.error) == ("failed", None, "KeyError: 'broken'")
    assert await orders() == []


async def test_a_run_that_raised_is_retried_and_then_completes(app: Queue, orders: Orders) -> None:
    async def work(self: Task) -> None:
        async with backend_of(app).complete(self) as tx:
            tx.add(Order(id=1 + self.retry_count))
            if self.retry_count == 0:
                raise RuntimeError("not yet")

    actions["work"] = work
    task = act_and_retry("work")
    await app.add(task)
    await run_worker(make_worker(app.backend), max_tasks=2)
    assert (await app.get_task(task) or task).status == "completed"
    assert await orders() == [2]


@pytest.mark.parametrize("how", ["raises", "fails its timeout"])
async def test_what_fails_after_the_completion_changes_nothing(
    app: Queue, orders: Orders, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(self: Task) -> None:
        async with backend_of(app).complete(self) as tx:
            tx.add(Order(id=1))
            tx.set_result("ordered")
        if how == "raises":
            raise RuntimeError("too late")
        raise asyncio.TimeoutError

    actions["work"] = work
    await app.add(act_and_retry("work"))
    [task] = await app._pop_pending(limit=1)
    with caplog.at_level(logging.WARNING, "sheppy_sql"):
        # It raises nothing either: then a workflow would not hear of its task.
        assert (await make_worker(app.backend).process_task(task, app)).status == "failed"
    done = await app.get_task(task) or task
    assert (done.status, done.result, done.error) == ("completed", "ordered", None)
    assert await app.get_scheduled() == []
    assert await app.size() == 0
    assert await orders() == [1]
    assert [record for record in caplog.records if record.name == "sheppy_sql"] == []


@pytest.mark.parametrize("status", ["completed", "failed", "retrying", "crashed"])
async def test_whatever_the_host_says_afterwards_changes_nothing(
    app: Queue, database: TestDatabase, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend, self = backend_of(app), await begin(app)
    task = self.model_dump(mode="json")
    async with backend.complete(self) as tx:
        tx.set_result("ordered")
    before = await database.fetch("SELECT * FROM sheppy_results")
    now = datetime.now(timezone.utc)
    ended = {"status": status, "finished_at": None if status == "retrying" else now.isoformat()}
    moments = {"last_retry_at": now.isoformat(), "next_retry_at": now.isoformat()}
    said = {**task, **ended, **moments, "result": "x" * 100, "retry_count": 1}
    assert await backend.store_result("test", said) is True
    if status == "retrying":
        assert await backend.schedule("test", said, now, unique=False) is True
    await backend.acknowledge("test", [task["id"]])
    assert await database.fetch("SELECT * FROM sheppy_results") == before
    assert await database.fetch("SELECT * FROM sheppy_tasks") == []
    assert await database.fetch("SELECT * FROM sheppy_scheduled_tasks") == []
    assert caplog.records == []


async def test_task_that_is_taken_anew_has_a_new_result(app: Queue) -> None:
    self = await begin(app)
    async with backend_of(app).complete(self) as tx:
        tx.set_result(1)
    await app.retry(self.id, force=True)
    [again] = await app._pop_pending(limit=1)
    async with backend_of(app).complete(again) as tx:
        tx.set_result(2)
    await app.retry(self.id, force=True)
    [payload] = await backend_of(app).pop("test")
    ended = {"status": "completed", "finished_at": "2030-01-01T00:00:00Z", "result": 3}
    await backend_of(app).store_result("test", {**payload, **ended})
    assert (await app.get_task(self) or self).result == 3


@pytest.mark.parametrize("how", ["clear", "retry", "delete", "disconnect"])
async def test_lost_claim_raises_before_the_commit(
    app: Queue, make_backend: MakeBackend, orders: Orders, how: str
) -> None:
    other, self = Queue(await make_backend(), "test"), await begin(app)
    backend = backend_of(app)

    async def lose(_: Completion) -> None:
        if how == "clear":
            await other.clear()
        elif how == "retry":
            await other.retry(self)
        elif how == "delete":
            await backend_of(other).delete_task("test", str(self.id))
        else:
            await backend.disconnect()

    with pytest.raises(BackendError, match="was retried, cleared or taken over meanwhile"):
        await complete(backend, self, 1, then=lose)
    assert await orders() == []
    found = await other.get_task(self)
    if how in ("clear", "delete"):
        assert found is None
    else:
        assert found is not None
        assert found.status == "new"
        assert await other.size() == 1
    await backend.connect()
    with pytest.raises(BackendError, match="was retried, cleared or taken over meanwhile"):
        await complete(backend, self)


async def test_commit_is_once(app: Queue, orders: Orders) -> None:
    self = await begin(app)
    async with backend_of(app).complete(self) as tx:
        tx.add(known := Order(id=1))
        await tx.commit()
        assert await orders() == [1]
        assert known.id == 1
        with pytest.raises(BackendError, match="has been completed"):
            await tx.commit()
        with pytest.raises(InvalidRequestError, match=r"[Aa]utobegin"):
            await tx.execute(select(Order))
    for queue in (None, "test"):
        with pytest.raises(BackendError, match="has been completed already"):
            await complete(backend_of(app), self, queue=queue)
    assert await orders() == [1]


async def test_task_completes_in_one_block_at_a_time(app: Queue, orders: Orders) -> None:
    self = await begin(app)
    async with backend_of(app).complete(self) as tx:
        tx.add(Order(id=1))
        with pytest.raises(BackendError, match="is about to complete already"):
            await complete(backend_of(app), self)
    assert await orders() == [1]


async def test_session_can_do_what_sessions_can(app: Queue, orders: Orders) -> None:
    self = await begin(app)
    async with backend_of(app).complete(self) as tx:
        tx.add(Order(id=1))
        await tx.rollback()
        tx.add(Order(id=2))
        async with tx.begin_nested():
            tx.add(Order(id=3))
        savepoint = await tx.begin_nested()
        tx.add(Order(id=4))
        await tx.flush()
        await savepoint.rollback()
        await tx.run_sync(lambda session: session.add(Order(id=5)))
        found = await tx.scalars(select(Order.id).order_by(Order.id))
        assert found.all() == [2, 3, 5]
        assert await orders() == []
    assert await orders() == [2, 3, 5]
    assert (await app.get_task(self) or self).status == "completed"


async def test_commit_by_whatever_way_has_the_result_in_it(app: Queue, orders: Orders) -> None:
    first, second = await begin(app), await begin(app)
    async with backend_of(app).complete(first) as tx:
        async with tx.begin():
            tx.add(Order(id=1))
            tx.set_result(1)
        assert (await app.get_task(first) or first).result == 1
    async with backend_of(app).complete(second) as tx:
        tx.set_result(2)
        await tx.run_sync(lambda session: session.commit())
        assert (await app.get_task(second) or second).result == 2
    assert await orders() == [1]


async def test_block_may_be_left_and_entered_again(app: Queue, orders: Orders) -> None:
    self = await begin(app)
    with pytest.raises(RuntimeError):
        await complete(backend_of(app), self, 1, then=fail)
    await complete(backend_of(app), self, 2)
    assert await orders() == [2]


async def test_only_a_task_that_is_running_here_completes(
    app: Queue, make_backend: MakeBackend, database: TestDatabase
) -> None:
    backend = backend_of(app)
    waiting, gone = act("waiting"), act("gone")
    for task in (waiting, gone):
        await app.add(task)
    await backend.delete_task("test", str(gone.id))
    for task in (waiting, gone, act("never")):
        with pytest.raises(BackendError, match="is none that a worker with this backend is run"):
            await complete(backend, task)
    wrong: Any = str(waiting.id)
    with pytest.raises(ValueError, match="CURRENT_TASK"):
        await complete(backend, wrong)
    assert await app.size() == 1


async def test_queue_is_asked_for_where_several_hold_the_id(app: Queue) -> None:
    backend, other = backend_of(app), Queue(app.backend, "other")
    task = act("task")
    for queue in (app, other):
        await queue.add(task)
        await queue._pop_pending(limit=1)
    with pytest.raises(ValueError, match=r"other, test: say which one with complete\(task, queue"):
        await complete(backend, task)
    with pytest.raises(ValueError, match="queue name"):
        await complete(backend, task, queue="\0")
    with pytest.raises(BackendError, match="is none that a worker"):
        await complete(backend, task, queue="third")
    async with backend.complete(task, "other") as tx:
        tx.set_result("other")
    async with backend.complete(task) as tx:
        tx.set_result("test")
    assert [(await q.get_task(task) or task).result for q in (other, app)] == ["other", "test"]


async def test_result_that_does_not_fit_is_refused_where_it_is_set(
    make_backend: MakeBackend, orders: Orders
) -> None:
    backend = backends["app"] = await make_backend(max_payload_bytes=3000)
    queue = Queue(backend, "test")
    await queue.add(completing(1))
    [self] = await queue._pop_pending(limit=1)
    for value, error, text in [
        ("no receipt", ValidationError, "Receipt"),
        ({"number": "many"}, ValidationError, "number"),
        (receipt(1).model_copy(update={"lines": ["x" * 4000]}), ValueError, "max_payload_bytes"),
    ]:

        async def set_result(tx: Completion, value: Any = value) -> None:
            await tx.flush()
            tx.set_result(value)

        with pytest.raises(error, match=text):
            await complete(backend, self, 1, then=set_result)
    assert await orders() == []
    async with backend.complete(self) as tx:
        tx.set_result({"number": 5, "lines": []})
        tx.set_result({"number": 6, "lines": []})
    assert (await queue.get_task(self) or self).result.number == 6


async def test_whoever_waits_is_woken(app: Queue) -> None:
    self = await begin(app)
    topic = _wakeups.finished("test", str(self.id))
    with backend_of(app)._connected.wakeups.waiting([topic]) as waiter:
        async with backend_of(app).complete(self):
            await asyncio.sleep(0)
            assert waiter.take_signals() == set()
        await waiter.wait(20)
        assert waiter.take_signals() == {topic}


async def test_under_the_next_sheppy_it_is_the_same(
    make_next_backend: MakeBackend, orders: Orders, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker renews the claims itself, and takes over those that are stale."""
    backend, other = await make_next_backend(), await make_next_backend()
    queue = Queue(backend, "test")
    first, second = await begin(queue), await begin(queue)

    async def go_on(tx: Completion) -> None:
        await backend.heartbeat("test", [str(first.id)])
        await tx.flush()

    await complete(backend, first, 1, then=go_on)
    crashed = {"status": "crashed", "finished_at": "2030-01-01T00:00:00Z"}
    await backend.store_result("test", {**first.model_dump(mode="json"), **crashed})
    assert (await queue.get_task(first) or first).status == "completed"
    assert len(await other.get_stale_messages("test", 0)) == 1
    with pytest.raises(BackendError, match="taken over"):
        await complete(backend, second, 2)
    assert await orders() == [1]
    assert caplog.records == []


async def test_memory_is_refused(memory_url: str) -> None:
    backend = SqlBackend(memory_url)
    await backend.connect()
    self = await begin(Queue(backend, "test"))
    with pytest.raises(BackendError, match="use a file"):
        await complete(backend, self)
    await backend.disconnect()
