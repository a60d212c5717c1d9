"""A worker that has nothing to do asks little, and writes nothing but its signs of life."""

from __future__ import annotations

import asyncio
from typing import Any

from sheppy import Worker
from sqlalchemy import Engine, event

from tests.contract.tasks import MakeBackend

SETTLING, WATCHED = 1.0, 6.0  # seconds
MOST = 3.0  # statements a second, while there are about 2
OF_A_FILE = ("BEGIN", "ROLLBACK", "PRAGMA")


async def test_idle_worker_asks_little_and_writes_nothing(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    worker = Worker("test", backend)
    working = asyncio.create_task(worker.work(register_signal_handlers=False))
    await asyncio.sleep(SETTLING)
    seen: list[str] = []

    def see(*args: Any) -> None:
        seen.append(args[2])

    event.listen(Engine, "before_cursor_execute", see)
    await asyncio.sleep(WATCHED)
    event.remove(Engine, "before_cursor_execute", see)
    worker._shutdown_event.set()
    await asyncio.wait_for(working, 20)
    writes = [one for one in seen if not one.startswith(("SELECT", *OF_A_FILE))]
    others = [one for one in writes if "sheppy_consumers" not in one]
    # Once a minute, by one of all instances.
    assert len(others) <= 1
    assert all("sheppy_chores" in one for one in others)
    assert 0 < len([one for one in seen if not one.startswith(OF_A_FILE)]) < MOST * WATCHED
