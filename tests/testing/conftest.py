from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sheppy import Queue
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql import SqlBackend
from sheppy_sql.testing import Clock, RolledBack, rolled_back
from tests.support.databases import TestDatabase
from tests.testing import shop


@pytest.fixture
async def engine(database: TestDatabase) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database.url, poolclass=NullPool)
    yield engine
    await engine.dispose()


@pytest.fixture
async def inside(engine: AsyncEngine) -> AsyncIterator[RolledBack]:
    async with rolled_back(engine) as inside:
        yield inside


@pytest.fixture(params=["committed", "rolled back"])
async def queue(request: Any, database: TestDatabase, engine: AsyncEngine) -> AsyncIterator[Queue]:
    """On a backend as it is, and on one of which nothing stays."""
    async with AsyncExitStack() as stack:
        if request.param == "committed":
            backend = SqlBackend(database.url)
            stack.push_async_callback(backend.disconnect)
        else:
            backend = (await stack.enter_async_context(rolled_back(engine))).backend
        queue = Queue(backend, "shop")
        shop.queues[:], shop.journal[:] = [queue], []
        yield queue


@pytest.fixture
def clock() -> Iterator[Clock]:
    with Clock(shop.utc(2030, 1, 1, 12)) as clock:
        yield clock
