"""An application beside the queue: an engine and a table of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine

from tests.support.databases import TestDatabase
from tests.transactions.shop import Base, Session

KINDS: dict[str, Callable[[AsyncEngine], Session]] = {
    "session": lambda engine: AsyncSession(engine, expire_on_commit=False),
    "connection": AsyncEngine.connect,
}


@pytest.fixture
async def engine(database: TestDatabase) -> AsyncIterator[AsyncEngine]:
    """The application's, with its tables."""
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture(params=KINDS)
async def session(request: Any, engine: AsyncEngine) -> AsyncIterator[Session]:
    """What an application has in its hand: an AsyncSession, or an AsyncConnection."""
    async with KINDS[request.param](engine) as session:
        yield session


@pytest.fixture
async def orm(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


@pytest.fixture
async def connection(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection
