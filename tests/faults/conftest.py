"""A proxy in front of the test's PostgreSQL database, and backends that go through it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend


@pytest.fixture
async def proxy(postgres_database: TestDatabase) -> AsyncIterator[Proxy]:
    async with Proxy(postgres_database.url) as proxy:
        yield proxy


@pytest.fixture
async def make_proxied(proxy: Proxy) -> AsyncIterator[Callable[..., Awaitable[SqlBackend]]]:
    """Makes connected backends that reach the database by way of the proxy."""
    from sheppy_sql import SqlBackend

    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> SqlBackend:
            backend = SqlBackend(proxy.url, **options)
            stack.push_async_callback(backend.disconnect)
            await backend.connect()
            return backend

        yield make
