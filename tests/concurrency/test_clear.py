"""Clearing a queue while others work on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from sheppy_sql import SqlBackend
from sheppy_sql._database import Transaction

MakeBackend = Callable[..., Awaitable[SqlBackend]]


@pytest.mark.concurrency
async def test_task_scheduled_during_a_clear_is_not_stranded(
    make_backend: MakeBackend, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either it is cleared, id and all, or it runs."""
    clearing, scheduling = await make_backend(), await make_backend()
    await clearing.append("q", [{"id": "old"}])
    count = Transaction.count
    scheduled: list[asyncio.Task[bool]] = []

    async def count_and_let_in(self: Transaction, statement: Any) -> int:
        changed = await count(self, statement)
        if not scheduled:
            now = datetime.now(timezone.utc)
            scheduled.append(asyncio.create_task(scheduling.schedule("q", {"id": "new"}, now)))
            if database.dialect == "postgresql":  # on SQLite it waits for the clear to end
                await scheduled[0]
        return changed

    monkeypatch.setattr(Transaction, "count", count_and_let_in)
    await clearing.clear("q")
    assert await scheduled[0] is True
    [due] = await scheduling.pop_scheduled("q")
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
