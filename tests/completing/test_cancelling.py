"""A completion that is cancelled, wherever it is, has happened whole or not at all."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from sheppy import Queue
from sqlalchemy.pool import AsyncAdaptedQueuePool

from sheppy_sql import Completion, SqlBackend
from tests.completing.conftest import Orders, backend_of, begin, complete
from tests.completing.tasks import Order
from tests.host.support import MakeBackend, until
from tests.support.databases import TestDatabase

MOMENTS = 120
"""More than the event loop's turns from the beginning of a completion to its end."""


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def lent(backend: SqlBackend) -> int:
    """Connections that are in use."""
    engine = backend._connected.completer._engine
    if engine is None:
        return 0
    assert isinstance(engine.pool, AsyncAdaptedQueuePool)
    return engine.pool.checkedout()


async def none_is_lent(backend: SqlBackend) -> bool:
    return lent(backend) == 0


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.torture)])
@pytest.mark.parametrize("slow", [False, True])
async def test_cancelled_at_whatever_moment_it_is_whole_or_nothing(
    app: Queue, orders: Orders, slow: bool, every: int
) -> None:
    """In the event loop's turns, and in those of the database."""
    backend, expected = backend_of(app), []
    outcomes = set()
    for number in range(0, MOMENTS, every):
        self = await begin(app)
        completing = asyncio.ensure_future(complete(backend, self, number))
        if slow:
            await asyncio.wait([completing], timeout=number / 6000)
        else:
            await turns(number)
        completing.cancel()
        await asyncio.wait([completing], timeout=30)
        await until(lambda: none_is_lent(backend))
        status = (await app.get_task(self) or self).status
        outcomes.add((completing.cancelled(), status))
        if status == "completed":
            expected.append(number)
        else:
            # Its claim still holds.
            await complete(backend, self)
    assert (True, "new") in outcomes
    assert await orders() == expected


async def test_cancelled_in_its_commit_it_is_completed(
    app: Queue, orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    self = await begin(app)
    backend, reached = backend_of(app), asyncio.Event()
    write = backend._connected.completer._write

    async def write_and_tell(*args: Any) -> None:
        reached.set()
        await turns(3)
        await write(*args)

    monkeypatch.setattr(backend._connected.completer, "_write", write_and_tell)
    completing = asyncio.ensure_future(complete(backend, self, 1))
    await reached.wait()
    completing.cancel()
    await asyncio.wait([completing], timeout=30)
    assert completing.cancelled()
    assert (await app.get_task(self) or self).status == "completed"
    assert await orders() == [1]
    assert lent(backend) == 0


async def test_nothing_is_left_behind(make_backend: MakeBackend, database: TestDatabase) -> None:
    backend = await make_backend()
    queue = Queue(backend, "test")
    for _ in range(3):
        await complete(backend, await begin(queue))
    assert lent(backend) == 0
    await backend.disconnect()
    gc.collect()  # a connection that is lost is a warning, and so an error


async def test_disconnect_waits_for_a_commit_and_not_for_a_block(
    make_backend: MakeBackend, orders: Orders
) -> None:
    backend, other = await make_backend(), await make_backend()
    queue = Queue(backend, "test")
    first, second = await begin(queue), await begin(queue)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def stay(_: Completion) -> None:
        entered.set()
        await go_on.wait()

    staying = asyncio.ensure_future(complete(backend, second, 2, then=stay))
    await entered.wait()
    async with backend.complete(first) as tx:
        tx.add(Order(id=1))
        committing = asyncio.ensure_future(tx.commit())
        await turns(3)
        await backend.disconnect()
        await committing
    go_on.set()
    await asyncio.wait([staying])
    assert "was retried, cleared or taken over" in str(staying.exception())
    assert await orders() == [1]
    assert [task["id"] for task in await other.pop("test", 5)] == [str(second.id)]
