"""Workers that live and could be taken for dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

import asyncpg
import pytest
from sheppy import Queue
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sheppy_sql import SqlBackend, _suspects
from tests.host.tasks import echo
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy

MakeBackend = Callable[..., Awaitable[SqlBackend]]


def tasks(*ids: str) -> list[dict[str, Any]]:
    return [{"id": task_id, "status": "new", "finished_at": None} for task_id in ids]


def done(task: dict[str, Any]) -> dict[str, Any]:
    return {**task, "finished_at": "now", "status": "completed"}


async def forget_processes(database: TestDatabase) -> None:
    """As if each worker ran on a machine of its own."""
    await database.execute("UPDATE sheppy_consumers SET boot_id = id")


@pytest.mark.torture
async def test_outage_longer_than_a_lease_takes_no_task_from_living_workers(
    postgres_database: TestDatabase,
) -> None:
    async with Proxy(postgres_database.url) as proxy:
        workers = [SqlBackend(proxy.url, lease=2) for _ in range(5)]
        for worker in workers:
            await worker.connect()
        await workers[0].append("q", tasks(*"abcde"))
        for worker in workers:
            assert len(await worker.pop("q")) == 1
        await forget_processes(postgres_database)
        proxy.refuse()
        proxy.cut()
        await asyncio.sleep(4)  # what a lease is shorter than
        await proxy.accept()
        # Long enough for each to have looked for dead ones several times.
        assert await workers[0].pop("q", timeout=3) == []
        crashes = await postgres_database.fetch("SELECT DISTINCT crashes, state FROM sheppy_tasks")
        for worker in workers:
            await worker.disconnect()
    assert crashes == [(0, "claimed")]


def bound_engine(database: TestDatabase) -> AsyncEngine:
    """As a cloud's connector makes them: it connects in the application's event loop only."""
    url = make_url(database.url).set(drivername="postgresql").render_as_string(False)
    loop = asyncio.get_running_loop()

    async def connect(*_: Any, **__: Any) -> asyncpg.Connection:
        if asyncio.get_running_loop() is not loop:
            raise RuntimeError("another event loop")
        return await asyncpg.connect(url)

    return create_async_engine("postgresql+asyncpg://", async_creator=connect)


@pytest.mark.torture
async def test_worker_on_an_engine_that_is_bound_to_its_event_loop_keeps_its_lease(
    postgres_database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    engine = bound_engine(postgres_database)
    backend, other = SqlBackend(engine, lease=2), SqlBackend(postgres_database.url, lease=2)
    await backend.connect()
    await other.connect()
    await backend.append("q", tasks("a"))
    assert await backend.pop("q") == tasks("a")
    await forget_processes(postgres_database)
    assert await other.pop("q", timeout=6) == []
    await backend.store_result("q", done(tasks("a")[0]))
    for one in (other, backend):
        await one.disconnect()
    await engine.dispose()
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["another event loop; tasks that take long may be run again"]


async def test_suspect_is_taken_beside_a_task_that_does_not_end(
    make_backend: MakeBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PATIENCE", 0.2), ("DRAIN", 0.5), ("PAUSE", 60.0)):
        monkeypatch.setattr(_suspects, name, seconds)
    backend = await make_backend(lease=1)
    await backend.append("q", tasks("endless"))
    assert await backend.pop("q") == tasks("endless")
    await backend.append("q", tasks("suspect"))
    await database.execute("UPDATE sheppy_tasks SET crashes = 1 WHERE id = 'suspect'")
    assert await backend.pop("q", timeout=20) == tasks("suspect")


async def test_suspect_that_does_not_end_stops_others_for_a_while_only(
    make_backend: MakeBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheppy_sql._claims.SOLITUDE", 1.0)
    backend = await make_backend(lease=1)
    await backend.append("q", tasks("suspect"))
    await database.execute("UPDATE sheppy_tasks SET crashes = 1")
    assert await backend.pop("q", timeout=20) == tasks("suspect")
    await backend.append("q", tasks("other"))
    assert await backend.pop("q", timeout=0.1) == []
    assert await backend.pop("q", timeout=20) == tasks("other")


async def test_acknowledgement_of_a_postponed_task_leaves_its_next_run_alone(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """The host acknowledges a whole batch after all of it is postponed; one may be back by then."""
    backend = await make_backend()
    await backend.append("q", tasks("a"))
    [taken] = await backend.pop("q")
    await backend.acquire_rate_limit("q", "key", 1, 0.5, "another")
    wait = await backend.acquire_rate_limit("q", "key", 1, 0.5, "a")
    assert wait is not None
    postponed = {**taken, "status": "scheduled"}
    await backend.schedule("q", postponed, datetime.now(timezone.utc), unique=False)
    while not (due := await backend.pop_scheduled("q")):
        pass
    await backend.append("q", [{**due[0], "status": "pending"}], unique=False)
    [again] = await backend.pop("q")
    await backend.acknowledge("q", ["a"])
    assert await database.fetch("SELECT state FROM sheppy_tasks") == [("claimed",)]
    await backend.acknowledge("q", ["a"])
    assert await database.fetch("SELECT state FROM sheppy_tasks") == [("idle",)]
    assert again["id"] == "a"


async def test_task_whose_result_is_too_large_fails(make_backend: MakeBackend) -> None:
    backend = await make_backend(max_payload_bytes=3000)
    queue, task = Queue(backend, "test"), echo("x" * 1000)
    await queue.add(task)
    task_again = await make_backend(max_payload_bytes=1400)
    await run_worker(make_worker(task_again), oneshot=True)
    failed = await queue.wait_for(task, timeout=10)
    assert failed is not None
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.startswith("ResultTooLarge: task has ")
    assert "max_payload_bytes" in failed.error
    assert "xxx" not in failed.error
