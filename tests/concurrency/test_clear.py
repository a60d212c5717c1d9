"""Clearing a queue while others work on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import pytest

from sheppy_sql import SqlBackend
from sheppy_sql._transaction import Transaction

PATIENCE = 30.0  # seconds
MakeBackend = Callable[..., Awaitable[SqlBackend]]


@pytest.mark.concurrency
async def test_task_scheduled_during_a_clear_is_not_stranded(
    make_backend: MakeBackend, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either it is cleared, id and all, or it runs."""
    clearing, taking = await make_backend(), await make_backend()
    await clearing.append("q", [{"id": "old"}])
    count = Transaction.count
    scheduled: list[Future[bool]] = []

    async def schedule() -> bool:
        backend = SqlBackend(database.worker_url)
        await backend.connect()
        try:
            return await backend.schedule("q", {"id": "new"}, datetime.now(timezone.utc))
        finally:
            await backend.disconnect()

    async def count_and_let_in(self: Transaction, statement: Any) -> int:
        changed = await count(self, statement)
        if not scheduled:
            # An operation may wait for nothing but its statements: so in another thread's loop.
            scheduled.append(threads.submit(lambda: asyncio.run(schedule())))
            if database.dialect == "postgresql":  # on SQLite it waits for the clear to end
                scheduled[0].result(PATIENCE)
        return changed

    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patched:
        patched.setattr(Transaction, "count", count_and_let_in)
        await clearing.clear("q")
        assert await asyncio.to_thread(scheduled[0].result, PATIENCE) is True
    [due] = await taking.pop_scheduled("q")
    assert due["id"] == "new"


@pytest.mark.concurrency
async def test_limiter_works_on_while_its_queue_is_cleared(make_backend: MakeBackend) -> None:
    clearing, limited = await make_backend(), await make_backend()

    async def acquire(number: int) -> float | None:
        return await limited.acquire_rate_limit("q", "key", 1000, 60.0, str(number))

    async def clear() -> None:
        for _ in range(20):
            await clearing.clear("q")

    *waits, _ = await asyncio.gather(*(acquire(number) for number in range(60)), clear())
    assert waits == [None] * 60
