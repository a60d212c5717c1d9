"""What the tasks of dead workers cost the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sheppy_sql import SqlBackend, _suspects
from tests.support.databases import TestDatabase

MakeBackend = Callable[..., Awaitable[SqlBackend]]


def tasks(count: int) -> list[dict[str, Any]]:
    return [{"id": str(number), "status": "new", "finished_at": None} for number in range(count)]


async def test_instance_makes_no_room_for_tasks_of_a_queue_that_it_does_not_serve(
    make_backend: MakeBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_suspects, "PATIENCE", 0.1)
    backend = await make_backend(lease=1)
    await backend.append("of others", tasks(1))
    await database.execute("UPDATE sheppy_tasks SET crashes = 1")
    suspects = backend._connected.consumer._suspects
    assert await backend.pop("mine") == []
    for _ in range(500):
        if "of others" in suspects._queues:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1 * 3)  # the longest that it waits before it makes room
    await backend.append("mine", tasks(1))
    assert await backend.pop("mine") == tasks(1)


async def test_new_instance_soon_takes_what_only_a_free_one_may(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    await (await make_backend()).append("q", tasks(1))
    await database.execute("UPDATE sheppy_tasks SET crashes = 1")
    fresh = await make_backend()
    assert await fresh.pop("q", timeout=2) == tasks(1)
