"""A commit whose answer is lost, or which is lost itself: the caller never notices.

Only a proxy can lose one message, and only PostgreSQL's connections have a network to lose it in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from sheppy_sql import SqlBackend
from tests.contract.tasks import finished, ids, make_task
from tests.faults import cases
from tests.faults.cases import (
    CASES,
    OURS,
    READS,
    A,
    B,
    Case,
    assert_that_no_claim_is_forgotten,
    stored,
)
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


@pytest.mark.torture
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


@pytest.mark.torture
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
        # Once where the next try, by looking, finds that the first has done it all.
        assert (answer, loss.struck) in [(expected, 1), (expected, 3)], case.name
        loss.times = loss.struck
    found = await stored(database)
    for case in CASES:
        assert found.get(str(case)) == found.get(f"calm {case}"), case.name


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
