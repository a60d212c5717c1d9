"""A commit whose answer is lost, and what others do before the next try."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from sheppy_sql import SqlBackend
from tests.contract.tasks import PAST, finished, ids, make_task
from tests.faults import cases
from tests.faults.cases import OURS, RETRYING, A, B
from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy

MakeBackend = Callable[..., Awaitable[SqlBackend]]

QUEUE = "struck"
PATIENCE = 30.0  # seconds, a ceiling for what takes a fraction of one


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


class Meanwhile:
    """The answer of a call is lost, and all connections are, while another backend goes on."""

    def __init__(self, proxy: Proxy, backend: SqlBackend, other: SqlBackend) -> None:
        self.backend = backend
        self.other = other
        self._proxy = proxy

    async def answer(self, call: Awaitable[Any], meanwhile: Callable[[], Awaitable[Any]]) -> Any:
        """What the call returns in the end, `meanwhile` having passed after its commit."""

        def sever() -> None:
            self._proxy.refuse()
            self._proxy.cut()

        loss = self._proxy.lose_answer("COMMIT", touching=OURS, then=sever)
        answer = asyncio.ensure_future(call)
        happened = asyncio.ensure_future(loss.happened.wait())
        await asyncio.wait(
            [answer, happened], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
        )
        happened.cancel()
        assert loss.struck == 1
        await meanwhile()
        await self._proxy.accept()
        return await asyncio.wait_for(answer, PATIENCE)


@pytest.fixture
async def meanwhile(
    proxy: Proxy, make_proxied: MakeBackend, make_backend: MakeBackend
) -> Meanwhile:
    return Meanwhile(proxy, await make_proxied(), await make_backend())


@pytest.mark.parametrize("unique", [True, False])
async def test_appended_task_that_is_done_by_now_is_not_resurrected(
    meanwhile: Meanwhile, unique: bool
) -> None:
    async def work() -> None:
        [task] = await meanwhile.other.pop(QUEUE, 5)
        await meanwhile.other.store_result(QUEUE, finished(task))

    call = meanwhile.backend.append(QUEUE, [A], unique=unique)
    assert await meanwhile.answer(call, work) == [True]
    assert await meanwhile.other.pop(QUEUE, 5) == []
    assert await meanwhile.other.get_results(QUEUE, ["task-0"]) == {"task-0": finished(A)}


@pytest.mark.parametrize("unique", [True, False])
async def test_appended_task_that_is_running_by_now_is_not_taken_away(
    meanwhile: Meanwhile, unique: bool
) -> None:
    async def take() -> None:
        assert ids(await meanwhile.other.pop(QUEUE, 5)) == ["task-0"]

    call = meanwhile.backend.append(QUEUE, [A], unique=unique)
    assert await meanwhile.answer(call, take) == [True]
    assert await meanwhile.backend.pop(QUEUE, 5) == []
    await meanwhile.other.store_result(QUEUE, finished(A))
    assert await meanwhile.other.get_results(QUEUE, ["task-0"]) == {"task-0": finished(A)}


async def test_appended_tasks_of_which_some_are_done_are_neither_lost_nor_doubled(
    meanwhile: Meanwhile,
) -> None:
    async def work() -> None:
        [task] = await meanwhile.other.pop(QUEUE)
        await meanwhile.other.store_result(QUEUE, finished(task))

    await meanwhile.other.append(QUEUE, [B])
    [known] = await meanwhile.other.pop(QUEUE)
    call = meanwhile.backend.append(QUEUE, [A, known, make_task("c")])
    assert await meanwhile.answer(call, work) == [True, False, True]
    assert ids(await meanwhile.other.pop(QUEUE, 5)) == ["c"]


@pytest.mark.torture
async def test_appended_task_that_is_cleared_by_now_is_back_once_at_most(
    meanwhile: Meanwhile,
) -> None:
    async def clear() -> None:
        assert await meanwhile.other.clear(QUEUE) == 1

    await meanwhile.answer(meanwhile.backend.append(QUEUE, [A], unique=False), clear)
    # Nothing is left that tells the first try from none.
    taken = await meanwhile.other.pop(QUEUE, 5)
    assert len(taken) <= 1
    assert await meanwhile.other.pop(QUEUE, 5) == []


@pytest.mark.torture
async def test_due_task_that_is_done_by_now_is_not_resurrected(meanwhile: Meanwhile) -> None:
    async def work() -> None:
        [task] = await meanwhile.other.pop(QUEUE, 5)
        await meanwhile.other.store_result(QUEUE, finished(task))

    await meanwhile.other.schedule(QUEUE, A, PAST)
    [due] = await meanwhile.backend.pop_scheduled(QUEUE)
    call = meanwhile.backend.append(QUEUE, [{**due, "status": "pending"}], unique=False)
    assert await meanwhile.answer(call, work) == [True]
    assert await meanwhile.other.pop(QUEUE, 5) == []
    assert await meanwhile.other.pop_scheduled(QUEUE) == []
    assert list(await meanwhile.other.get_results(QUEUE, ["task-0"])) == ["task-0"]


@pytest.mark.torture
@pytest.mark.parametrize("unique", [True, False])
async def test_scheduled_task_that_is_done_by_now_is_not_resurrected(
    meanwhile: Meanwhile, unique: bool
) -> None:
    async def work() -> None:
        [due] = await meanwhile.other.pop_scheduled(QUEUE)
        await meanwhile.other.append(QUEUE, [{**due, "status": "pending"}], unique=False)
        [task] = await meanwhile.other.pop(QUEUE)
        await meanwhile.other.store_result(QUEUE, finished(task))

    call = meanwhile.backend.schedule(QUEUE, A, PAST, unique=unique)
    assert await meanwhile.answer(call, work) is True
    assert await meanwhile.other.pop_scheduled(QUEUE) == []
    assert await meanwhile.other.get_scheduled(QUEUE) == []
    assert await meanwhile.other.size(QUEUE) == 0
    assert list(await meanwhile.other.get_results(QUEUE, ["task-0"])) == ["task-0"]


@pytest.mark.torture
async def test_popped_tasks_are_nobody_elses(meanwhile: Meanwhile) -> None:
    others: list[str] = []

    async def take_the_rest() -> None:
        others.extend(ids(await meanwhile.other.pop(QUEUE, 5)))

    await meanwhile.other.append(QUEUE, [A, B, make_task("c")])
    taken = await meanwhile.answer(meanwhile.backend.pop(QUEUE, 2), take_the_rest)
    assert (ids(taken), others) == (["task-0", "task-1"], ["c"])
    for task in taken:
        await meanwhile.backend.store_result(QUEUE, finished(task))
    assert await meanwhile.other.get_stats(QUEUE) == {"pending": 0, "completed": 2, "scheduled": 0}


@pytest.mark.torture
async def test_due_tasks_are_nobody_elses(meanwhile: Meanwhile) -> None:
    async def take_the_rest() -> None:
        assert await meanwhile.other.pop_scheduled(QUEUE) == []

    await meanwhile.other.schedule(QUEUE, A, PAST)
    assert await meanwhile.answer(meanwhile.backend.pop_scheduled(QUEUE), take_the_rest) == [A]
    await meanwhile.backend.append(QUEUE, [{**A, "status": "pending"}], unique=False)
    assert ids(await meanwhile.other.pop(QUEUE, 5)) == ["task-0"]


@pytest.mark.torture
async def test_result_wakes_who_waits_for_it(meanwhile: Meanwhile) -> None:
    async def look() -> None:
        assert await meanwhile.other.get_results(QUEUE, ["task-0"], 10) == {"task-0": finished(A)}

    await meanwhile.other.append(QUEUE, [A])
    await meanwhile.backend.pop(QUEUE)
    waiting = asyncio.ensure_future(meanwhile.backend.get_results(QUEUE, ["task-0"], PATIENCE))
    call = meanwhile.backend.store_result(QUEUE, finished(A))
    assert await meanwhile.answer(call, look) is True
    assert await waiting == {"task-0": finished(A)}


@pytest.mark.torture
@pytest.mark.parametrize("result", [finished(A), RETRYING], ids=["finished", "retrying"])
async def test_result_does_not_undo_a_retry_that_somebody_asked_for_since(
    meanwhile: Meanwhile, result: dict[str, Any]
) -> None:
    again = {**A, "status": "pending", "retry_count": 7}

    async def retry() -> None:
        await meanwhile.other.append(QUEUE, [again], unique=False)

    await meanwhile.other.append(QUEUE, [A])
    await meanwhile.backend.pop(QUEUE)
    call = meanwhile.backend.store_result(QUEUE, result)
    assert await meanwhile.answer(call, retry) is True
    assert await meanwhile.other.get_tasks(QUEUE, ["task-0"]) == {"task-0": again}
    assert await meanwhile.other.pop(QUEUE, 5) == [again]


@pytest.mark.torture
async def test_retrying_task_can_be_scheduled_by_its_worker(
    meanwhile: Meanwhile, database: TestDatabase
) -> None:
    await meanwhile.other.append(QUEUE, [A])
    await meanwhile.backend.pop(QUEUE)

    async def nothing() -> None:
        pass

    assert await meanwhile.answer(meanwhile.backend.store_result(QUEUE, RETRYING), nothing) is True
    due = datetime.now(timezone.utc)
    assert await meanwhile.answer(
        meanwhile.backend.schedule(QUEUE, RETRYING, due, unique=False), nothing
    )
    assert await meanwhile.other.pop_scheduled(QUEUE) == [RETRYING]
    await meanwhile.other.append(QUEUE, [RETRYING], unique=False)
    assert await meanwhile.other.pop(QUEUE, 5) == [RETRYING]
    await meanwhile.other.store_result(QUEUE, finished(RETRYING))
    assert await database.fetch("SELECT * FROM sheppy_scheduled_tasks") == []


@pytest.mark.torture
async def test_tasks_added_after_a_clear_are_not_cleared_with_it(meanwhile: Meanwhile) -> None:
    async def add() -> None:
        await meanwhile.other.append(QUEUE, [B])

    await meanwhile.other.append(QUEUE, [A])
    assert await meanwhile.answer(meanwhile.backend.clear(QUEUE), add) == 1
    assert ids(await meanwhile.other.get_all_tasks(QUEUE)) == ["task-1"]


@pytest.mark.torture
async def test_cron_that_is_deleted_by_now_is_not_added_again(meanwhile: Meanwhile) -> None:
    async def delete() -> None:
        assert await meanwhile.other.delete_cron(QUEUE, "cron") is True

    assert await meanwhile.answer(cases.add_cron(meanwhile.backend, QUEUE), delete) is True
    assert await meanwhile.other.get_crons(QUEUE) == []


@pytest.mark.torture
async def test_cron_that_is_added_again_by_now_is_not_deleted(meanwhile: Meanwhile) -> None:
    async def add() -> None:
        assert await cases.add_cron(meanwhile.other, QUEUE) is True

    await cases.add_cron(meanwhile.other, QUEUE)
    assert await meanwhile.answer(meanwhile.backend.delete_cron(QUEUE, "cron"), add) is True
    assert await meanwhile.other.get_crons(QUEUE) == [cases.CRON]


@pytest.mark.torture
async def test_workflow_that_has_moved_on_is_not_set_back(meanwhile: Meanwhile) -> None:
    async def move_on() -> None:
        assert await cases.complete("task-0")(meanwhile.other, QUEUE) == 1
        await cases.store_workflow(completed=True, pending_task_ids=[])(meanwhile.other, QUEUE)

    call = cases.store_workflow()(meanwhile.backend, QUEUE)
    assert await meanwhile.answer(call, move_on) is True
    [workflow] = await meanwhile.other.get_all_workflows(QUEUE)
    assert workflow["completed"] is True
    assert await meanwhile.other.get_pending_workflows(QUEUE) == []
    assert await cases.complete("task-1")(meanwhile.other, QUEUE) == -1


@pytest.mark.torture
async def test_workflow_that_is_stored_again_by_now_is_not_deleted(meanwhile: Meanwhile) -> None:
    async def store() -> None:
        await cases.store_workflow()(meanwhile.other, QUEUE)

    await store()
    assert await meanwhile.answer(meanwhile.backend.delete_workflow(QUEUE, "workflow"), store)
    assert len(await meanwhile.other.get_all_workflows(QUEUE)) == 1


@pytest.mark.torture
async def test_number_of_tasks_left_is_that_of_the_first_try(meanwhile: Meanwhile) -> None:
    async def complete_the_other() -> None:
        assert await cases.complete("task-1")(meanwhile.other, QUEUE) == 0

    await cases.store_workflow()(meanwhile.other, QUEUE)
    call = cases.complete("task-0")(meanwhile.backend, QUEUE)
    # Of the two, exactly one hears that nothing is left, and so resumes the workflow.
    assert await meanwhile.answer(call, complete_the_other) == 1
