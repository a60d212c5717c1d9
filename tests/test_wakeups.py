"""Whoever waits hears at once of what another process has done.

Two backends stand for two processes where each has signals of its own. Looks that anybody makes by
himself are a minute apart, so that what comes sooner was told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sheppy import BackendError
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sheppy_sql import SqlBackend, _announcer, _listener, _waiting, _wakeups
from sheppy_sql._listener import Line
from sheppy_sql._stores import notifications as notification_store
from tests.contract.tasks import FUTURE, QUEUE, MakeBackend, finished, ids, make_task, make_tasks
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner

SOON = 20.0  # seconds, a ceiling: it takes milliseconds
NEVER = 60.0  # seconds

LISTENING = """SELECT pid FROM pg_stat_activity
               WHERE datname = current_database() AND query LIKE 'LISTEN%'"""
OTHERS = """SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid()
              AND backend_type = 'client backend'"""

Strangers = Callable[..., Awaitable[SqlBackend]]


@pytest.fixture
def strangers(make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> Strangers:
    """Makes backends that know nothing of each other, as in different processes."""
    monkeypatch.setattr(_waiting, "FIRST_POLL", NEVER)
    monkeypatch.setattr(_listener, "LONGEST_POLL", NEVER)
    hubs = []

    def hub(_installation: str) -> _wakeups.Wakeups:
        hubs.append(_wakeups.Wakeups())
        return hubs[-1]

    monkeypatch.setattr(_wakeups, "hub", hub)

    async def make(**options: Any) -> SqlBackend:
        return await make_backend(**{"max_poll_interval": NEVER, **options})

    return make


def line(backend: SqlBackend) -> Line:
    [one] = backend._connected.wakeups.lines
    assert isinstance(one, Line)
    return one


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async def look() -> None:
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)

    await asyncio.wait_for(look(), SOON)


async def soon(waiting: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(waiting, SOON)


async def begin(backend: SqlBackend, waiting: Any) -> asyncio.Task[Any]:
    """The call under way, and told of what others do."""
    task = asyncio.create_task(waiting)
    await until(lambda: line(backend).is_told)
    await until(lambda: backend._connected.wakeups.anybody)
    return task


async def test_another_process_takes_a_task_at_once(strangers: Strangers) -> None:
    worker, user = await strangers(), await strangers()
    taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
    await user.append(QUEUE, [make_task("one")])
    assert ids(await soon(taking)) == ["one"]


async def test_another_process_hears_of_results(strangers: Strangers) -> None:
    worker, user = await strangers(), await strangers()
    tasks = make_tasks(3)
    await user.append(QUEUE, tasks)
    waiting = await begin(user, user.get_results(QUEUE, ids(tasks), timeout=NEVER))
    for task in await worker.pop(QUEUE, 3):
        await worker.store_result(QUEUE, finished(task))
    assert set(await soon(waiting)) == {*ids(tasks)}


async def test_results_beyond_what_a_notification_can_name_are_heard_of(
    strangers: Strangers,
) -> None:
    worker, user = await strangers(), await strangers()
    tasks = make_tasks(3 * _announcer.MOST_MARKS)
    await user.append(QUEUE, tasks)
    waiting = await begin(user, user.get_results(QUEUE, ids(tasks), timeout=NEVER))
    taken = await worker.pop(QUEUE, len(tasks))
    await asyncio.gather(*(worker.store_result(QUEUE, finished(task)) for task in taken))
    assert len(await soon(waiting)) == len(tasks)


async def test_another_process_hears_of_a_workflow(strangers: Strangers) -> None:
    worker, user = await strangers(), await strangers()
    workflow = {"id": "w", "completed": False, "error": None, "pending_task_ids": []}
    await user.store_workflow(QUEUE, workflow)
    waiting = await begin(user, user.get_workflow_results(QUEUE, ["w"], timeout=NEVER))
    await worker.store_workflow(QUEUE, {**workflow, "completed": True})
    assert set(await soon(waiting)) == {"w"}


async def test_another_process_hears_of_a_cancellation(strangers: Strangers) -> None:
    one, other = await strangers(), await strangers()
    await one.append(QUEUE, [make_task("one")])
    waiting = await begin(one, one.get_results(QUEUE, ["one"], timeout=NEVER))
    await other.cancel(QUEUE, "one")
    assert (await soon(waiting))["one"]["status"] == "cancelled"


@pytest.mark.parametrize(
    "name", ["'; NOTIFY x --", 'a "b" c', "ü" * 256, "\n\t \x01", "pending", "%s {} $1", "-"]
)
async def test_queues_may_be_called_anything(strangers: Strangers, name: str) -> None:
    worker, user = await strangers(), await strangers()
    taking = await begin(worker, worker.pop(name, timeout=NEVER))
    await user.append(name, [make_task("one")])
    assert ids(await soon(taking)) == ["one"]


async def test_the_last_of_many_news_is_told_as_well(strangers: Strangers) -> None:
    """All but the first come while a notification is being sent, or just after."""
    worker, user = await strangers(), await strangers()
    queues = [f"queue {number}" for number in range(40)]
    taking = [await begin(worker, worker.pop(queue, timeout=NEVER)) for queue in queues]
    await until(lambda: all(worker._connected.wakeups.count(("pending", q)) for q in queues))
    await asyncio.gather(*(user.append(queue, [make_task("one")]) for queue in queues))
    for one in taking:
        assert ids(await soon(one)) == ["one"]


async def test_a_cancelled_callers_task_is_told(strangers: Strangers) -> None:
    worker, user = await strangers(), await strangers()
    taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
    while not taking.done():
        appending = asyncio.create_task(user.append(QUEUE, [make_task("one")]))
        await asyncio.sleep(0)
        appending.cancel()
        await asyncio.wait([appending])
        if await user.get_tasks(QUEUE, ["one"]):
            # Whether or not it was committed before its caller had gone, the next one tells of it.
            await user.append(QUEUE, [make_task("two")])
            break
    assert ids(await soon(taking))[0] == "one"


async def test_tasks_of_a_callers_transaction_are_told_after_its_commit(
    strangers: Strangers, database: TestDatabase
) -> None:
    worker, user = await strangers(), await strangers()
    taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
    engine = create_async_engine(database.worker_url)
    async with AsyncSession(engine) as session:
        bound = user.bind(session)
        await bound.connect()
        await bound.append(QUEUE, [make_task("one")])
        await session.commit()
    assert ids(await soon(taking)) == ["one"]
    await engine.dispose()


@pytest.mark.parametrize("option", ["yes", 1, None])
async def test_bind_takes_a_wish_to_notify_as_a_bool(backend: SqlBackend, option: Any) -> None:
    with pytest.raises(ValueError, match="notify"):
        backend.bind(AsyncSession(), notify=option)


class TestPostgreSQL:
    """LISTEN and NOTIFY."""

    @pytest.fixture
    def database(self, postgres_database: TestDatabase) -> TestDatabase:
        return postgres_database

    @pytest.fixture
    async def eavesdropper(self, database: TestDatabase) -> AsyncIterator[list[str]]:
        """All that is said on the installation's channel."""
        [(name,)] = await database.fetch("SELECT installation FROM sheppy_schema")
        connection = await asyncpg.connect(database.url.replace("+asyncpg", ""))
        heard: list[str] = []
        channel = notification_store.channel_of(name)
        await connection.add_listener(channel, lambda *args: heard.append(args[3]))
        yield heard
        await connection.close()

    async def test_a_bound_transaction_notifies_with_its_own_commit(
        self, strangers: Strangers, database: TestDatabase, eavesdropper: list[str]
    ) -> None:
        # Off: nothing else says anything.
        user = await strangers(notify="off")
        engine = create_async_engine(database.worker_url)
        async with AsyncSession(engine) as session:
            bound = user.bind(session, notify=True)
            await bound.connect()
            await bound.append(QUEUE, [make_task("one")])
            assert eavesdropper == []
            await session.rollback()
            await bound.append(QUEUE, [make_task("two")])
            await session.commit()
        await engine.dispose()
        await until(lambda: bool(eavesdropper))
        [said] = eavesdropper
        assert said.split(" ")[1:] == [_wakeups.mark(_wakeups.pending(QUEUE))]

    async def test_nothing_of_a_task_is_said(
        self, strangers: Strangers, eavesdropper: list[str]
    ) -> None:
        user = await strangers()
        await user.append("secret queue", [make_task("secret task")])
        await until(lambda: bool(eavesdropper))
        assert len(eavesdropper[0]) < 100
        assert "secret" not in eavesdropper[0]

    async def test_many_appends_are_told_by_few_notifications(
        self, strangers: Strangers, eavesdropper: list[str]
    ) -> None:
        user = await strangers()
        await asyncio.gather(*(user.append(QUEUE, [task]) for task in make_tasks(200)))
        await user.disconnect()
        await until(lambda: bool(eavesdropper))
        assert len(eavesdropper) < 100

    async def test_whoever_only_enqueues_has_no_connection_for_it(
        self, strangers: Strangers, database: TestDatabase
    ) -> None:
        user = await strangers()
        await user.append(QUEUE, [make_task("one")])
        await user.get_results(QUEUE, ["one"])
        await user.pop(QUEUE)
        assert line(user)._listening is None
        assert await database.fetch(LISTENING) == []

    async def test_a_lost_connection_comes_back(
        self, strangers: Strangers, database: TestDatabase
    ) -> None:
        worker, user = await strangers(), await strangers()
        taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
        [(pid,)] = await database.fetch(LISTENING)
        await database.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
        await user.append(QUEUE, [make_task("one")])
        assert ids(await soon(taking)) == ["one"]
        await until(lambda: line(worker).is_told)
        taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
        await user.append(QUEUE, [make_task("two")])
        assert ids(await soon(taking)) == ["two"]
        assert pid not in [row[0] for row in await database.fetch(LISTENING)]

    async def test_disconnect_leaves_no_connection(
        self, strangers: Strangers, database: TestDatabase
    ) -> None:
        worker = await strangers()
        taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
        assert len(await database.fetch(LISTENING)) == 1
        await worker.disconnect()
        with pytest.raises(BackendError, match="disconnected"):
            await soon(taking)

        async def all_gone() -> bool:
            return await database.fetch(OTHERS) == []

        await until(all_gone)

    async def test_backends_of_one_process_share_a_connection(
        self, make_backend: MakeBackend, database: TestDatabase
    ) -> None:
        backends = [await make_backend() for _ in range(3)]
        taking = [asyncio.create_task(b.pop(QUEUE, timeout=NEVER)) for b in backends]
        await until(lambda: line(backends[0]).is_told)
        assert len(await database.fetch(LISTENING)) == 1
        await backends[0].disconnect()
        assert len(await database.fetch(LISTENING)) == 1
        await backends[1].append(QUEUE, make_tasks(2))
        for one in taking[1:]:
            assert len(await soon(one)) == 1
        await asyncio.wait(taking)
        assert isinstance(taking[0].exception(), BackendError)

    async def test_off_means_looks_alone(
        self, make_backend: MakeBackend, eavesdropper: list[str]
    ) -> None:
        worker, user = await make_backend(notify="off"), await make_backend(notify="off")
        taking = asyncio.create_task(worker.pop(QUEUE, timeout=NEVER))
        await until(lambda: worker._connected.wakeups.anybody)
        await user.append(QUEUE, [make_task("one")])
        assert ids(await soon(taking)) == ["one"]
        assert worker._connected.wakeups.lines == ()
        await user.disconnect()
        assert eavesdropper == []

    @pytest.fixture
    def deaf(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A way to the server on which no notification comes back."""

        async def send(*_args: Any) -> None:
            pass

        monkeypatch.setattr(notification_store, "send", send)
        monkeypatch.setattr(_listener, "PROOF", 0.05)

    async def test_where_no_notification_comes_back_looks_go_on(
        self, deaf: None, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "sheppy_sql")
        worker, user = await make_backend(), await make_backend()
        taking = asyncio.create_task(worker.pop(QUEUE, timeout=NEVER))
        await until(lambda: line(worker)._tried.is_set())
        assert not line(worker).is_told
        assert worker._connected.consumer._pace.longest == 0.25
        await user.append(QUEUE, [make_task("one")])
        assert ids(await soon(taking)) == ["one"]
        [said] = [one for one in caplog.messages if "notification" in one]
        assert "none comes back" in said

    async def test_where_they_are_required_whoever_waits_hears_of_it(
        self, deaf: None, make_backend: MakeBackend
    ) -> None:
        backend = await make_backend(notify="on")
        await backend.append(QUEUE, [make_task("one")])
        assert await backend.get_results(QUEUE, ["one"]) == {}
        for waiting in (
            backend.pop(QUEUE, timeout=1),
            backend.get_results(QUEUE, ["one"], timeout=1),
        ):
            with pytest.raises(BackendError, match="none comes back"):
                await asyncio.wait_for(waiting, SOON)

    async def test_notifications_may_be_required(self, strangers: Strangers) -> None:
        worker, user = await strangers(notify="on"), await strangers(notify="on")
        taking = await begin(worker, worker.pop(QUEUE, timeout=NEVER))
        await user.append(QUEUE, [make_task("one")])
        assert ids(await soon(taking)) == ["one"]

    async def test_a_busy_worker_has_six_connections_at_most(
        self, make_backend: MakeBackend, database: TestDatabase
    ) -> None:
        worker = await make_backend()
        tasks = make_tasks(300)
        await worker.append(QUEUE, tasks)
        waiting = [
            asyncio.create_task(worker.get_results(QUEUE, [task["id"]], timeout=NEVER))
            for task in tasks
        ]
        most = 0

        async def work(task: Any) -> None:
            nonlocal most
            await worker.get_tasks(QUEUE, [task["id"]])
            await worker.schedule(QUEUE, make_task(f"later {task['id']}"), FUTURE)
            await worker.store_result(QUEUE, finished(task))
            most = max(most, len(await database.fetch(OTHERS)) if task["id"] == "task-9" else 0)

        while taken := await worker.pop(QUEUE, 100):
            await asyncio.gather(*map(work, taken))
        await asyncio.wait_for(asyncio.gather(*waiting), SOON)
        assert 0 < most <= 6


WAITER = """
import asyncio, sys
from sheppy_sql import SqlBackend, _waiting
_waiting.FIRST_POLL = 60.0
async def main():
    backend = SqlBackend(sys.argv[1], max_poll_interval=60.0, notify=sys.argv[2])
    await backend.connect()
    await backend.append("ready", [{"id": "told", "status": "new", "finished_at": None}])
    [task] = await backend.pop("test", timeout=60)
    print("took", task["id"], flush=True)
asyncio.run(main())
"""


async def test_another_process_is_told_indeed(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    user = await make_backend()
    child = spawn.script(WAITER, database.worker_url, "on")
    # Before it listens as well: whoever comes to listen looks once more.
    assert ids(await user.pop("ready", timeout=NEVER)) == ["told"]
    await user.append(QUEUE, [make_task("one")])
    assert await asyncio.wait_for(asyncio.to_thread(child.wait_for, "took"), SOON) == "took one"
    await asyncio.to_thread(child.wait)


FORK = """
import asyncio, os, sys
from sheppy_sql import SqlBackend, _waiting
_waiting.FIRST_POLL = 60.0
backend = SqlBackend(sys.argv[1], max_poll_interval=60.0)

def take(queue):
    return asyncio.create_task(backend.pop(queue, timeout=60))

async def told():
    while not backend._connected.wakeups.lines[0].is_told:
        await asyncio.sleep(0.01)

async def child():
    await backend.connect()
    taking = take("child")
    await told()
    print("child waits", flush=True)
    print("child took", (await taking)[0]["id"], flush=True)
    await backend.disconnect()

async def parent():
    await backend.connect()
    taking = take("parent")
    await told()
    if (pid := os.fork()) == 0:
        asyncio._set_running_loop(None)
        try:
            asyncio.run(child())
        finally:
            os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)
    assert backend._connected.wakeups.lines[0].is_told
    print("parent waits", flush=True)
    print("parent took", (await taking)[0]["id"], flush=True)
    await backend.disconnect()
asyncio.run(parent())
"""


@pytest.mark.posix
async def test_forked_child_listens_by_itself_and_its_parent_goes_on(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    user = await make_backend()
    process = spawn.script(FORK, database.worker_url)
    for who in ("child", "parent"):
        await asyncio.to_thread(process.wait_for, f"{who} waits")
        await user.append(who, [make_task("one")])
        assert await asyncio.to_thread(process.wait_for, f"{who} took") == f"{who} took one"
    assert await asyncio.to_thread(process.wait) == 0, process.report()


async def test_one_instance_hears_in_one_event_loop_after_another(
    database: TestDatabase,
) -> None:
    backend, user = SqlBackend(database.worker_url), SqlBackend(database.worker_url)

    async def work(*, leave: bool) -> None:
        await backend.connect()
        await user.connect()
        taking = await begin(backend, backend.pop(QUEUE, timeout=NEVER))
        await user.append(QUEUE, [make_task("one")])
        [task] = await soon(taking)
        await backend.store_result(QUEUE, finished(task))
        await backend.delete_task(QUEUE, "one")
        await user.disconnect()
        if leave:
            await backend.disconnect()

    for leave in (False, True):
        await asyncio.to_thread(asyncio.run, work(leave=leave))


@pytest.mark.torture
async def test_fifty_idle_workers_do_not_all_try_to_take_one_task(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    workers = [await make_backend(pool_size=1) for _ in range(50)]
    user = await make_backend()
    tries: list[str] = []
    for one in workers:
        event.listen(
            one._connected.database.engine.sync_engine,
            "before_cursor_execute",
            lambda *args: tries.append(args[2]) if args[2].startswith(("WITH", "UPDATE")) else None,
        )
    taking = [asyncio.create_task(one.pop(QUEUE, timeout=NEVER)) for one in workers]
    await until(lambda: line(user).is_told)
    wakeups = user._connected.wakeups
    await until(lambda: wakeups.count(_wakeups.pending(QUEUE)) == len(workers))
    await asyncio.sleep(0.5)  # the looks of all who have just begun
    tries.clear()
    for number in range(3):
        await user.append(QUEUE, [make_task(f"task {number}")])
        await asyncio.wait_for(asyncio.wait(taking, return_when=asyncio.FIRST_COMPLETED), SOON)
        await asyncio.sleep(2 * 0.1)  # all others have looked
        done = [one for one in taking if one.done()]
        assert [ids(one.result()) for one in done] == [[f"task {number}"]]
        taking = [one for one in taking if not one.done()]
    claims = [one for one in tries if "sheppy_tasks" in one and "claim_token" in one]
    # 150 if all tried each time; how many do depends on how fast the machine is. A file's writers
    # take turns, so that more of them look before the first has taken it.
    assert 3 <= len(claims) <= (90 if database.dialect == "sqlite" else 30)
    for still_taking in taking:
        still_taking.cancel()
    await asyncio.wait(taking)


async def test_news_go_together_and_none_is_left_out() -> None:
    sent: list[list[str]] = []
    going, released = asyncio.Event(), asyncio.Event()

    async def send(marks: list[str]) -> None:
        sent.append(marks)
        going.set()
        await released.wait()

    announcer = _announcer.Announcer(send)
    first, *others = [_wakeups.pending(f"queue {number}") for number in range(200)]
    announcer.announce([first])
    await asyncio.wait_for(going.wait(), SOON)
    for topic in others * 3:
        announcer.announce([topic])
    assert announcer.carry([first]) is None
    released.set()
    await asyncio.wait_for(announcer.flush(), SOON)
    assert sent[0] == [_wakeups.mark(first)]
    assert sorted(one for marks in sent[1:] for one in marks) == sorted(map(_wakeups.mark, others))
    assert all(len(marks) <= _announcer.MOST_MARKS for marks in sent)


async def test_after_a_flush_news_keep_their_distance() -> None:
    """Another session of the process may have left, while this one goes on."""
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def send(_marks: list[str]) -> None:
        times.append(loop.time())

    announcer = _announcer.Announcer(send)
    announcer.announce([_wakeups.pending("a")])
    await announcer.flush()
    announcer.announce([_wakeups.pending("b")])
    while len(times) < 3:
        announcer.announce([_wakeups.pending("c")])
        await asyncio.sleep(0)
    assert times[2] - times[1] >= _announcer.PAUSE * 0.9
    await announcer.flush()
