"""Reads that come at a time share statements, and so do all who wait for results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sheppy import BackendError
from sqlalchemy import event

from sheppy_sql import SqlBackend, _waiting
from sheppy_sql._stores import results as result_store
from sheppy_sql._stores import tasks as task_store
from tests.contract.tasks import QUEUE, MakeBackend, finished, ids, make_task, make_tasks

SOON = 20.0  # seconds, a ceiling
NEVER = 60.0  # seconds
COUNT = 200


def statements_of(backend: SqlBackend) -> list[str]:
    """What it executes from now on."""
    seen: list[str] = []
    engine = backend._connected.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    return seen


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks without being told."""
    monkeypatch.setattr(_waiting, "FIRST_POLL", NEVER)


async def finish_all(backend: SqlBackend) -> None:
    while taken := await backend.pop(QUEUE, 50):
        await asyncio.gather(*(backend.store_result(QUEUE, finished(task)) for task in taken))


async def test_tasks_that_are_asked_for_at_a_time_share_statements(backend: SqlBackend) -> None:
    tasks = make_tasks(COUNT)
    await backend.append(QUEUE, tasks)
    seen = statements_of(backend)
    found = await asyncio.gather(*(backend.get_tasks(QUEUE, [one]) for one in ids(tasks)))
    assert found == [{task["id"]: task} for task in tasks]
    assert len(seen) < COUNT / 10


async def test_results_that_are_asked_for_at_a_time_share_statements(backend: SqlBackend) -> None:
    tasks = make_tasks(COUNT)
    await backend.append(QUEUE, tasks)
    await finish_all(backend)
    seen = statements_of(backend)
    asked = [[one, "missing"] for one in ids(tasks)] + [["missing"], ids(tasks)[:5]]
    found = await asyncio.gather(*(backend.get_results(QUEUE, one) for one in asked))
    expected = {task["id"]: finished(task) for task in tasks}
    assert found == [{i: expected[i] for i in one if i in expected} for one in asked]
    assert len(seen) < COUNT / 10


async def test_nobody_shares_what_another_has_been_given(backend: SqlBackend) -> None:
    await backend.append(QUEUE, [make_task("one")])
    one, other = await asyncio.gather(*(backend.get_tasks(QUEUE, ["one"]) for _ in range(2)))
    one["one"]["status"] = "changed"
    assert other == {"one": make_task("one")}


async def test_queues_do_not_mix(backend: SqlBackend) -> None:
    await backend.append("a", [make_task("one", result="a")])
    await backend.append("b", [make_task("one", result="b")])
    found = await asyncio.gather(*(backend.get_tasks(queue, ["one"]) for queue in "abab"))
    assert [one["one"]["result"] for one in found] == list("abab")


async def test_cancelled_reader_leaves_the_others_alone(backend: SqlBackend) -> None:
    tasks = make_tasks(20)
    await backend.append(QUEUE, tasks)
    reading = [asyncio.create_task(backend.get_tasks(QUEUE, [one])) for one in ids(tasks)]
    await asyncio.sleep(0)
    for one in reading[::2]:
        one.cancel()
    outcomes = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(one, asyncio.CancelledError) for one in outcomes[::2])
    assert outcomes[1::2] == [{task["id"]: task} for task in tasks[1::2]]


async def test_what_was_stored_before_a_read_began_is_found_by_it(backend: SqlBackend) -> None:
    """Also where another read is under way, which may have looked before."""

    async def store_and_read(task: dict[str, Any]) -> bool:
        await backend.append(QUEUE, [task])
        return task["id"] in await backend.get_tasks(QUEUE, [task["id"]])

    assert all(await asyncio.gather(*map(store_and_read, make_tasks(COUNT))))


async def test_failing_read_fails_its_callers_and_no_later_ones(
    backend: SqlBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> dict[str, str]:
        raise BackendError("Failed to get tasks: out of order")

    backend_of_the_fault = backend._connected.viewer
    monkeypatch.setattr(task_store, "get", fail)
    monkeypatch.setattr(result_store, "get", fail)
    broken = type(backend_of_the_fault)(
        backend._connected.database,
        backend._connected.wakeups,
        _waiting.Pace(0.25),
    )
    outcomes = await asyncio.gather(
        *(broken.get_tasks(QUEUE, ["one"]) for _ in range(3)),
        *(broken.get_results(QUEUE, ["one"], timeout=NEVER) for _ in range(3)),
        return_exceptions=True,
    )
    assert [str(one) for one in outcomes] == ["Failed to get tasks: out of order"] * 6
    assert len({id(one) for one in outcomes}) == 6
    assert await backend.get_tasks(QUEUE, ["one"]) == {}


@pytest.mark.usefixtures("no_looks")
async def test_a_thousand_waiters_share_looks_and_connections(make_backend: MakeBackend) -> None:
    user, worker = await make_backend(max_poll_interval=NEVER), await make_backend()
    tasks = make_tasks(1000)
    await user.append(QUEUE, tasks)
    seen = statements_of(user)
    waiting = [
        asyncio.create_task(user.get_results(QUEUE, [one], timeout=NEVER)) for one in ids(tasks)
    ]
    await finish_all(worker)
    found = await asyncio.wait_for(asyncio.gather(*waiting), SOON)
    assert found == [{task["id"]: finished(task)} for task in tasks]
    assert len(seen) < 200
    pool: Any = user._connected.database.engine.pool
    assert pool.checkedin() <= 2


async def test_looks_without_a_signal_are_shared_as_well(make_backend: MakeBackend) -> None:
    user = await make_backend(max_poll_interval=0.05, notify="off")
    tasks = make_tasks(COUNT)
    await user.append(QUEUE, tasks)
    seen = statements_of(user)
    loop = asyncio.get_running_loop()
    began = loop.time()
    outcomes = await asyncio.gather(
        *(user.get_results(QUEUE, [one], timeout=1) for one in ids(tasks)), return_exceptions=True
    )
    assert all(isinstance(one, TimeoutError) for one in outcomes)
    assert len(seen) < 100 * (loop.time() - began)


async def test_waiting_ends_for_each_as_it_would_alone(backend: SqlBackend) -> None:
    await backend.append(QUEUE, make_tasks(2))
    [first] = await backend.pop(QUEUE)
    await backend.store_result(QUEUE, finished(first))

    def wait(*wanted: str, timeout: float) -> asyncio.Task[Any]:
        return asyncio.create_task(backend.get_results(QUEUE, [*wanted], timeout=timeout))

    there, never, both, gone = (
        wait("task-0", timeout=NEVER),
        wait("task-1", timeout=0.1),
        wait("task-0", "task-1", timeout=0),
        wait("task-1", timeout=0),
    )
    assert set(await asyncio.wait_for(there, SOON)) == {"task-0"}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(never, SOON)
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    assert not both.done()
    [second] = await backend.pop(QUEUE)
    await backend.store_result(QUEUE, finished(second))
    assert set(await asyncio.wait_for(both, SOON)) == {"task-0", "task-1"}


async def test_nothing_is_left_of_those_who_have_waited(backend: SqlBackend) -> None:
    await backend.append(QUEUE, make_tasks(2))
    lookouts: Callable[[], Any] = backend._connected.viewer._lookouts.values
    for timeout in (0.01, 0.02):
        with pytest.raises(TimeoutError):
            await backend.get_results(QUEUE, ["task-0", "task-1"], timeout=timeout)
    waiting = asyncio.create_task(backend.get_results(QUEUE, ["task-0"], timeout=0))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    [lookout] = lookouts()
    while lookout._looking is not None:  # noqa: ASYNC110  # it ends by itself
        await asyncio.sleep(0.01)
    assert lookout._wants == {}
    wakeups = backend._connected.wakeups
    assert not [topic for topic in wakeups._waiters if topic[0] == "finished"]
    assert not wakeups._marked
