"""One engine, for the shop's own tables and for the queue's."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from sheppy_sql import SqlBackend

engine = create_async_engine(
    os.environ.get("SHEPPY_BACKEND_URL", "sqlite+aiosqlite:///shop.db"), pool_pre_ping=True
)
sessions = async_sessionmaker(engine, expire_on_commit=False)
backend = SqlBackend(engine)


async def transaction() -> AsyncIterator[AsyncSession]:
    """A session whose transaction is committed at the end, or rolled back by an exception."""
    async with sessions.begin() as session:
        yield session
