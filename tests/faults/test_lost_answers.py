"""A commit whose answer is lost, or which is lost itself: the caller never notices.

Only a proxy can lose one message, and only PostgreSQL's connections have a network to lose it in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Any

import asyncpg
import pytest

from sheppy_sql import SqlBackend
from tests.contract.tasks import PAST, finished, ids, make_task
from tests.faults import cases
from tests.faults.cases import CASES, OURS, READS, RETRYING, A, B, Case, stored
from tests.faults.load import until
from tests.support.databases import TestDatabase
from tests.support.proxy import Loss, Proxy

MakeBackend = Callable[..., Awaitable[SqlBackend]]

QUEUE = "struck"
PATIENCE = 30.0  # seconds, a ceiling for what takes a fraction of one


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


def lose_the_answer(proxy: Proxy) -> Loss:
    return proxy.lose_answer("COMMIT", touching=OURS)


def lose_the_commit(proxy: Proxy) -> Loss:
    return proxy.lose_request("COMMIT", touching=OURS)


LOSSES = [lose_the_answer, lose_the_commit]


async def assert_that_no_claim_is_forgotten(
    backend: SqlBackend, database: TestDatabase, queue: str
) -> None:
    """What stands as claimed is held by the backend: it can finish it."""
    sql = "SELECT id FROM sheppy_tasks WHERE queue = :queue AND state = 'claimed' ORDER BY id"
    claimed = [task_id for (task_id,) in await database.fetch(sql, queue=queue)]
    for task_id in claimed:
        await backend.store_result(queue, finished(make_task(task_id)))
    assert list(await backend.get_results(queue, claimed)) == claimed


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_call_is_as_if_nothing_had_happened(
    case: Case,
    lose: Callable[[Proxy], Loss],
    database: TestDatabase,
    proxy: Proxy,
    make_proxied: MakeBackend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = await make_proxied()
    for queue in ("calm", QUEUE):
        await case.set_up(backend, queue)
    expected = await case.call(backend, "calm")
    loss = lose(proxy)
    answer = await asyncio.wait_for(case.call(backend, QUEUE), PATIENCE)
    assert loss.struck == loss.times
    assert answer == expected
    found = await stored(database)
    assert found.get(QUEUE) == found.get("calm")
    assert [record for record in caplog.records if "dropped" in record.getMessage()] == []
    for queue in ("calm", QUEUE):
        await assert_that_no_claim_is_forgotten(backend, database, queue)


async def test_reads_whose_answer_is_lost_are_asked_again(
    proxy: Proxy, make_proxied: MakeBackend
) -> None:
    backend = await make_proxied()
    await cases.store_one_of_each(backend, QUEUE)
    for name, read in READS.items():
        expected = await read(backend, QUEUE)
        assert expected, name
        for lose in (proxy.lose_answer, proxy.lose_request):
            loss = lose("SELECT" if lose == proxy.lose_answer else "", touching=OURS)
            assert await asyncio.wait_for(read(backend, QUEUE), PATIENCE) == expected, name
            assert loss.struck == 1, name


async def test_answers_may_be_lost_again_and_again(
    database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    backend, second = await make_proxied(), await make_proxied()
    for case in CASES:
        instance = second if case.unclaimed else backend
        for queue in (f"calm {case}", str(case)):
            await case.set_up(instance, queue)
        expected = await case.call(instance, f"calm {case}")
        loss = proxy.lose_answer("COMMIT", times=3, touching=OURS)
        answer = await asyncio.wait_for(case.call(instance, str(case)), PATIENCE)
        assert (answer, loss.struck) == (expected, 3), case.name
    found = await stored(database)
    for case in CASES:
        assert found.get(str(case)) == found.get(f"calm {case}"), case.name


SLOW_COMMIT = """
    CREATE SEQUENCE commits;
    CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('commits') = 1 THEN PERFORM pg_advisory_xact_lock(42); END IF;
        RETURN NULL;
    END $$;
    DO $$ DECLARE name text; BEGIN
        FOREACH name IN ARRAY ARRAY['tasks', 'scheduled_tasks', 'results', 'crons', 'workflows',
            'workflow_tasks', 'rate_limits', 'rate_limit_entries'] LOOP
            EXECUTE format('CREATE CONSTRAINT TRIGGER take_long
                AFTER INSERT OR UPDATE OR DELETE ON sheppy_%s DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION take_long()', name);
        END LOOP;
    END $$"""
OTHERS_WAIT = """SELECT count(*) > 1 FROM pg_stat_activity
    WHERE wait_event_type = 'Lock' AND datname = current_database()"""


ROLL_BACK = """SELECT pg_terminate_backend(pid) FROM pg_locks
    WHERE locktype = 'advisory' AND NOT granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


@asynccontextmanager
async def slow_commit(database: TestDatabase, *, fails: bool = False) -> AsyncIterator[None]:
    """The next commit of a change is under way until the block ends."""
    connection = await asyncpg.connect(database.url.replace("+asyncpg", ""))
    try:
        await connection.execute(SLOW_COMMIT)
        await connection.execute("SELECT pg_advisory_lock(42)")
        yield
        if fails:
            await connection.execute(ROLL_BACK)
    finally:
        await connection.close()


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.changes and not case.skips], ids=str
)
async def test_next_try_may_begin_before_the_last_commit_has_ended(
    case: Case, fails: bool, database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """The server may learn late that it has lost its client, as when it waits for a replica."""
    backend = await make_proxied()
    for queue in ("calm", QUEUE):
        await case.set_up(backend, queue)
    expected = await case.call(backend, "calm")
    async with slow_commit(database, fails=fails):
        loss = proxy.lose_contact("COMMIT", touching=OURS)
        call = asyncio.ensure_future(case.call(backend, QUEUE))
        clock = asyncio.get_running_loop().time
        over = clock() + 0.3

        async def tried_again() -> bool:
            waits = (await database.fetch(OTHERS_WAIT)) == [(True,)]
            return loss.struck == 1 and (call.done() or waits or clock() > over)

        await until(tried_again, "the connection was not lost")
    answer = await asyncio.wait_for(call, PATIENCE)
    await until(lambda: everyone_has_gone(database), "the commit did not end")
    assert answer == expected
    found = await stored(database)
    assert found.get(QUEUE) == found.get("calm")
    for queue in ("calm", QUEUE):
        await assert_that_no_claim_is_forgotten(backend, database, queue)


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
async def test_tasks_that_a_late_commit_took_are_not_stranded(
    fails: bool, database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """Whatever the call makes of it: its instance lives, and nobody else may take them."""
    backend = await make_proxied(lease=1.0)
    tasks = [make_task(str(number)) for number in range(3)]
    await backend.append(QUEUE, tasks)
    async with slow_commit(database, fails=fails):
        loss = proxy.lose_contact("COMMIT", touching=OURS)
        taking = asyncio.ensure_future(backend.pop(QUEUE, 2))
        await asyncio.wait_for(loss.happened.wait(), PATIENCE)
        await asyncio.wait([taking], timeout=0.5)
    taken = await asyncio.wait_for(taking, PATIENCE)
    ran: list[str] = []

    async def all_ran() -> bool:
        taken.extend(await backend.pop(QUEUE, 5, timeout=0.1))
        while taken:
            task = taken.pop()
            ran.append(task["id"])
            await backend.store_result(QUEUE, finished(task))
        return len(ran) >= len(tasks)

    await until(all_ran, "tasks are stranded", timeout=20)
    assert sorted(ran) == ids(tasks)


async def everyone_has_gone(database: TestDatabase) -> bool:
    """Nobody waits for the lock of `slow_commit`, or has it."""
    sql = """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    return await database.fetch(sql) == [(0,)]


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


async def test_due_tasks_are_nobody_elses(meanwhile: Meanwhile) -> None:
    async def take_the_rest() -> None:
        assert await meanwhile.other.pop_scheduled(QUEUE) == []

    await meanwhile.other.schedule(QUEUE, A, PAST)
    assert await meanwhile.answer(meanwhile.backend.pop_scheduled(QUEUE), take_the_rest) == [A]
    await meanwhile.backend.append(QUEUE, [{**A, "status": "pending"}], unique=False)
    assert ids(await meanwhile.other.pop(QUEUE, 5)) == ["task-0"]


async def test_result_wakes_who_waits_for_it(meanwhile: Meanwhile) -> None:
    async def look() -> None:
        assert await meanwhile.other.get_results(QUEUE, ["task-0"], 10) == {"task-0": finished(A)}

    await meanwhile.other.append(QUEUE, [A])
    await meanwhile.backend.pop(QUEUE)
    waiting = asyncio.ensure_future(meanwhile.backend.get_results(QUEUE, ["task-0"], PATIENCE))
    call = meanwhile.backend.store_result(QUEUE, finished(A))
    assert await meanwhile.answer(call, look) is True
    assert await waiting == {"task-0": finished(A)}


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


async def test_tasks_added_after_a_clear_are_not_cleared_with_it(meanwhile: Meanwhile) -> None:
    async def add() -> None:
        await meanwhile.other.append(QUEUE, [B])

    await meanwhile.other.append(QUEUE, [A])
    assert await meanwhile.answer(meanwhile.backend.clear(QUEUE), add) == 1
    assert ids(await meanwhile.other.get_all_tasks(QUEUE)) == ["task-1"]


async def test_cron_that_is_deleted_by_now_is_not_added_again(meanwhile: Meanwhile) -> None:
    async def delete() -> None:
        assert await meanwhile.other.delete_cron(QUEUE, "cron") is True

    assert await meanwhile.answer(cases.add_cron(meanwhile.backend, QUEUE), delete) is True
    assert await meanwhile.other.get_crons(QUEUE) == []


async def test_cron_that_is_added_again_by_now_is_not_deleted(meanwhile: Meanwhile) -> None:
    async def add() -> None:
        assert await cases.add_cron(meanwhile.other, QUEUE) is True

    await cases.add_cron(meanwhile.other, QUEUE)
    assert await meanwhile.answer(meanwhile.backend.delete_cron(QUEUE, "cron"), add) is True
    assert await meanwhile.other.get_crons(QUEUE) == [cases.CRON]


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


async def test_workflow_that_is_stored_again_by_now_is_not_deleted(meanwhile: Meanwhile) -> None:
    async def store() -> None:
        await cases.store_workflow()(meanwhile.other, QUEUE)

    await store()
    assert await meanwhile.answer(meanwhile.backend.delete_workflow(QUEUE, "workflow"), store)
    assert len(await meanwhile.other.get_all_workflows(QUEUE)) == 1


async def test_number_of_tasks_left_is_that_of_the_first_try(meanwhile: Meanwhile) -> None:
    async def complete_the_other() -> None:
        assert await cases.complete("task-1")(meanwhile.other, QUEUE) == 0

    await cases.store_workflow()(meanwhile.other, QUEUE)
    call = cases.complete("task-0")(meanwhile.backend, QUEUE)
    # Of the two, exactly one hears that nothing is left, and so resumes the workflow.
    assert await meanwhile.answer(call, complete_the_other) == 1


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_disconnect_hands_its_tasks_back(
    lose: Callable[[Proxy], Loss],
    database: TestDatabase,
    proxy: Proxy,
    make_proxied: MakeBackend,
    make_backend: MakeBackend,
) -> None:
    leaving, staying = await make_proxied(), await make_backend()
    await staying.append(QUEUE, [A, B])
    await leaving.pop(QUEUE, 2)
    loss = lose(proxy)
    await asyncio.wait_for(leaving.disconnect(), PATIENCE)
    assert loss.struck >= 1
    assert ids(await staying.pop(QUEUE, 5)) == ["task-0", "task-1"]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_cancelled_pop_hands_its_tasks_back(
    lose: Callable[[Proxy], Loss],
    database: TestDatabase,
    proxy: Proxy,
    make_proxied: MakeBackend,
    make_backend: MakeBackend,
) -> None:
    cancelled, staying = await make_proxied(), await make_backend()
    await staying.append(QUEUE, [A, B])
    loss = lose(proxy)
    pop = asyncio.ensure_future(cancelled.pop(QUEUE, 2))
    happened = asyncio.ensure_future(loss.happened.wait())
    await asyncio.wait([pop, happened], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    pop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(pop, PATIENCE)
    assert loss.struck >= 1
    assert ids(await staying.pop(QUEUE, 5)) == ["task-0", "task-1"]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_many_concurrent_calls_share_a_fault(
    lose: Callable[[Proxy], Loss], database: TestDatabase, proxy: Proxy, make_proxied: MakeBackend
) -> None:
    """Whatever travels together in one transaction is repeated together."""
    backend = await make_proxied()
    loss = lose(proxy)
    tasks = [make_task(f"{number:03}") for number in range(100)]
    added = await asyncio.wait_for(
        asyncio.gather(*(backend.append(QUEUE, [task]) for task in [*tasks, *tasks])), PATIENCE
    )
    assert loss.struck == loss.times
    # Of two with one id, one was added.
    pairs = zip(added[: len(tasks)], added[len(tasks) :], strict=True)
    assert [sorted([*one, *other]) for one, other in pairs] == [[False, True]] * len(tasks)
    taken = await backend.pop(QUEUE, 200)
    assert sorted(ids(taken)) == ids(tasks)
    loss = lose(proxy)
    await asyncio.wait_for(
        asyncio.gather(*(backend.store_result(QUEUE, finished(task)) for task in taken)), PATIENCE
    )
    assert loss.struck == loss.times
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 100, "scheduled": 0}
    assert await database.fetch("SELECT id FROM sheppy_tasks") == []
