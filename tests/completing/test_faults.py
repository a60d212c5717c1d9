"""Completions under faults of the network and the server, and under cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sheppy import BackendError, Queue

from sheppy_sql import Completion, SqlBackend
from tests.completing.conftest import Orders, backend_of, begin, complete
from tests.completing.tasks import Order
from tests.faults.test_late_commits import everyone_has_gone, slow_commit
from tests.host.support import MakeBackend, until
from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy

PATIENCE = 30.0  # seconds, a ceiling for what takes a fraction of one
OURS = "sheppy_results"


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


@pytest.fixture
async def proxy(postgres_database: TestDatabase) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_database.url) as proxy:
        yield proxy


@pytest.fixture
async def far(proxy: Proxy) -> AsyncIterator[Queue]:
    """A queue whose backend reaches the database by way of the proxy."""
    backend = SqlBackend(proxy.url, lease=5)
    await backend.connect()
    yield Queue(backend, "test")
    await backend.disconnect()


async def say_that_it_failed(queue: Queue, payload: dict[str, Any]) -> None:
    """As the worker does."""
    ended = {"status": "failed", "finished_at": "2030-01-01T00:00:00Z", "error": "Error"}
    await queue.backend.store_result("test", {**payload, **ended})


async def test_commit_whose_answer_is_lost_is_found_out(
    far: Queue, proxy: Proxy, orders: Orders, caplog: pytest.LogCaptureFixture
) -> None:
    self = await begin(far)
    loss = proxy.lose_answer("COMMIT", touching=OURS)
    await asyncio.wait_for(complete(backend_of(far), self, 1), PATIENCE)
    assert loss.struck == 1
    await say_that_it_failed(far, self.model_dump(mode="json"))
    assert (await far.get_task(self) or self).status == "completed"
    assert await orders() == [1]
    assert caplog.records == []


async def test_commit_by_the_session_itself_whose_answer_is_lost_is_found_out(
    far: Queue, proxy: Proxy, orders: Orders
) -> None:
    self = await begin(far)
    loss = proxy.lose_answer("COMMIT", touching=OURS)
    async with backend_of(far).complete(self) as tx, tx.begin():
        tx.add(Order(id=1))
    assert loss.struck == 1
    assert (await far.get_task(self) or self).status == "completed"
    assert await orders() == [1]


async def test_commit_that_is_lost_itself_is_an_error(
    far: Queue, proxy: Proxy, orders: Orders
) -> None:
    self = await begin(far)
    loss = proxy.lose_request("COMMIT", touching=OURS)
    with pytest.raises(BackendError, match="Failed to complete a task: the connection"):
        await asyncio.wait_for(complete(backend_of(far), self, 1), PATIENCE)
    assert loss.struck == 1
    assert await orders() == []
    # The claim still holds.
    await complete(backend_of(far), self, 2)
    assert await orders() == [2]


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
async def test_commit_that_ends_late_is_waited_for(
    far: Queue, proxy: Proxy, orders: Orders, database: TestDatabase, fails: bool
) -> None:
    self = await begin(far)
    async with slow_commit(database, fails=fails):
        loss = proxy.lose_contact("COMMIT", touching=OURS)
        completing = asyncio.ensure_future(complete(backend_of(far), self, 1))
        await asyncio.wait_for(loss.happened.wait(), PATIENCE)
        await asyncio.wait([completing], timeout=0.3)
        assert not completing.done()
    await asyncio.wait([completing], timeout=PATIENCE)
    assert isinstance(completing.exception(), BackendError if fails else type(None))
    assert await orders() == ([] if fails else [1])


async def test_commit_that_ends_after_its_worker_gave_up_holds(
    far: Queue, proxy: Proxy, orders: Orders, database: TestDatabase
) -> None:
    """The worker's word that the task failed waits for it, and then changes nothing."""
    self = await begin(far)
    async with slow_commit(database):
        loss = proxy.lose_contact("COMMIT", touching=OURS)
        completing = asyncio.ensure_future(complete(backend_of(far), self, 1))
        await asyncio.wait_for(loss.happened.wait(), PATIENCE)
        completing.cancel()
        telling = asyncio.ensure_future(say_that_it_failed(far, self.model_dump(mode="json")))
        await asyncio.wait([telling], timeout=0.3)
        assert not telling.done()
    await asyncio.wait_for(telling, PATIENCE)
    await asyncio.wait([completing], timeout=PATIENCE)
    assert completing.cancelled()
    await until(lambda: everyone_has_gone(database))
    assert (await far.get_task(self) or self).status == "completed"
    assert await orders() == [1]


async def test_outage_in_the_block_is_the_blocks_error_and_the_next_one_is_well(
    far: Queue, proxy: Proxy, orders: Orders
) -> None:
    self = await begin(far)

    async def cut(tx: Completion) -> None:
        await tx.flush()
        proxy.cut()

    with pytest.raises(BackendError, match="Failed to complete a task"):
        await complete(backend_of(far), self, 1, then=cut)
    assert await orders() == []
    await complete(backend_of(far), self, 2)
    assert await orders() == [2]


async def test_outage_at_its_begin_is_ridden_out(far: Queue, proxy: Proxy, orders: Orders) -> None:
    first, second = await begin(far), await begin(far)
    await complete(backend_of(far), first, 1)
    proxy.refuse()
    proxy.cut()
    completing = asyncio.ensure_future(complete(backend_of(far), second, 2))
    await asyncio.wait([completing], timeout=0.3)
    assert not completing.done()
    await proxy.accept()
    await asyncio.wait_for(completing, PATIENCE)
    assert await orders() == [1, 2]


async def test_serialization_failure_is_an_error_that_changes_nothing(
    app: Queue, make_backend: MakeBackend, orders: Orders
) -> None:
    self, other = await begin(app), Queue(await make_backend(), "test")

    async def meet(tx: Completion) -> None:
        await tx.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        await tx.flush()
        await other.retry(self)

    with pytest.raises(BackendError, match="could not serialize access"):
        await complete(backend_of(app), self, 1, then=meet)
    assert await orders() == []
    assert await other.size() == 1


async def test_block_longer_than_the_lease_keeps_its_claim(
    make_backend: MakeBackend, orders: Orders
) -> None:
    queue, other = Queue(await make_backend(lease=1), "test"), await make_backend(lease=1)
    self = await begin(queue)

    async def dawdle(tx: Completion) -> None:
        await tx.flush()
        assert await other.pop("test", 1, timeout=3) == []

    await complete(backend_of(queue), self, 1, then=dawdle)
    assert await orders() == [1]


async def test_tasks_in_their_transactions_do_not_starve_the_backend(
    make_backend: MakeBackend, orders: Orders, database: TestDatabase
) -> None:
    backend = await make_backend(pool_size=1)
    queue = Queue(backend, "test")
    async with AsyncExitStack() as stack:
        for number in range(12):
            self = await begin(queue)
            tx = await stack.enter_async_context(backend.complete(self))
            tx.add(Order(id=number))
            await tx.flush()
        assert await queue.add(self) is False
    assert await orders() == list(range(12))
