"""What becomes of the tasks of a worker that was killed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sheppy import Queue
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool

from sheppy_sql import SqlBackend
from tests.leases import jobs
from tests.support.databases import TestDatabase
from tests.support.processes import Child, Spawner

MakeBackend = Callable[..., Awaitable[SqlBackend]]

LEASE = 3.0
"""Seconds, long enough for a busy machine not to miss all beats of it."""
PATIENCE = 30.0


def tasks(count: int) -> list[dict[str, Any]]:
    return [{"id": str(number), "status": "new", "finished_at": None} for number in range(count)]


async def holding(spawn: Spawner, database: TestDatabase, count: int, **options: object) -> Child:
    """A process that has taken tasks and keeps them."""
    given = json.dumps({"lease": LEASE, **options})
    child = spawn(jobs.hold, database.url, "q", str(count), given)
    await asyncio.to_thread(child.wait_for, "holds")
    return child


async def forget_processes(database: TestDatabase) -> None:
    """As if the workers ran on other machines, where nobody can see their processes."""
    await database.execute("UPDATE sheppy_consumers SET boot_id = 'another'")


async def test_tasks_of_a_killed_worker_return_to_their_places_within_its_lease(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend(lease=LEASE)
    await backend.append("q", tasks(3))
    child = await holding(spawn, database, 2)
    await forget_processes(database)
    assert [t["id"] for t in await backend.pop("q", 5)] == ["2"]
    await backend.store_result("q", {**tasks(3)[2], "finished_at": "now"})
    child.kill()
    killed_at = time.monotonic()
    taken = []
    for _ in range(2):
        # One at a time, since each may be what killed the worker.
        [one] = await backend.pop("q", 5, timeout=PATIENCE)
        taken.append(one)
        assert await backend.pop("q", 5) == []
        await backend.store_result("q", {**one, "finished_at": "now"})
    assert taken == tasks(2)
    assert time.monotonic() - killed_at < LEASE + 2


@pytest.mark.posix
async def test_death_of_a_process_of_this_machine_shows_before_its_lease_ends(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend()
    await backend.append("q", tasks(1))
    child = await holding(spawn, database, 1, lease=600)
    taking = asyncio.create_task(backend.pop("q", timeout=PATIENCE))
    child.kill()
    assert await taking == tasks(1)


@pytest.mark.torture
async def test_living_worker_keeps_its_tasks_beyond_its_lease(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend(lease=1)
    await backend.append("q", tasks(1))
    await holding(spawn, database, 1, lease=1)
    assert await backend.pop("q", timeout=4) == []


@pytest.mark.torture
async def test_neither_name_nor_pid_alone_tells_a_process(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    """As of two containers: one name, one pid, and two processes that both live."""
    backend = await make_backend(lease=1)
    await backend.append("q", tasks(2))
    for column in ("pid_namespace", "boot_id"):
        await holding(spawn, database, 1, lease=600)
        # No process of this machine has this number, and none that had it began then.
        await database.execute(
            f"UPDATE sheppy_consumers SET {column} = 'another', pid = 99999999,"
            " process_started = '1' WHERE pid <> 99999999"
        )
    assert await backend.pop("q", timeout=3) == []


@pytest.mark.torture
@pytest.mark.parametrize("max_crashes", [1, 3])
async def test_task_fails_once_enough_workers_have_died_of_it(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner, max_crashes: int
) -> None:
    backend = await make_backend(error_ttl=3600, lease=LEASE)
    queue = Queue(backend, "q")
    task = jobs.poison()
    await queue.add(task)
    waiting = asyncio.create_task(queue.wait_for(task, timeout=PATIENCE))
    for _ in range(max_crashes):
        child = await holding(spawn, database, 1, max_crashes=max_crashes)
        assert not waiting.done()
        child.kill()
        # The waiter's own instance takes nothing, so somebody has to look after the dead.
        await backend.pop("other", timeout=0.01)
    done = await waiting
    assert done is not None
    assert done.status == "failed"
    assert done.error is not None
    assert done.error.startswith("WorkerDied: worker ")
    assert ("the last of 3" in done.error) is (max_crashes == 3)
    assert await queue.size() == 0
    [(expires,)] = await database.fetch(
        "SELECT count(*) FROM sheppy_results WHERE expires_at IS NOT NULL"
    )
    assert expires == 1


async def test_task_fails_at_once_where_its_worker_said_so(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend()
    await backend.append("q", tasks(2))
    child = await holding(spawn, database, 2, on_crash="fail")
    child.kill()
    await backend.pop("other")
    results = await backend.get_results("q", ["0", "1"], timeout=PATIENCE)
    for number, result in enumerate(results[task_id] for task_id in ("0", "1")):
        assert result.pop("error").startswith("WorkerDied: ")
        assert result.pop("finished_at")
        assert result == {"id": str(number), "status": "failed", "result": None}


async def test_worker_that_leaves_in_order_is_no_crash(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    staying = await make_backend()
    await staying.append("q", tasks(2))
    for _ in range(3):
        leaving = await make_backend(max_crashes=1)
        assert len(await leaving.pop("q", 2)) == 2
        await leaving.disconnect()
    assert await database.fetch("SELECT crashes FROM sheppy_tasks") == [(0,), (0,)]
    assert await database.fetch("SELECT id FROM sheppy_consumers") == []
    assert await staying.pop("q", 2) == tasks(2)


@pytest.mark.torture
@pytest.mark.timeout(180)
async def test_task_that_kills_its_workers_takes_no_other_along(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner, tmp_path: Path
) -> None:
    backend = await make_backend(lease=LEASE)
    queue = Queue(backend, "q")
    others = [jobs.good(number) for number in range(199)]
    deadly = jobs.poison()
    await queue.add([*others[:100], deadly, *others[100:]])
    waiting = asyncio.create_task(queue.wait_for([*others, deadly], timeout=150))
    # The test's own instance looks after the dead, and takes nothing of this queue.
    looking = asyncio.create_task(backend.pop("other", timeout=150))
    died = 0
    options, environment = json.dumps({"lease": LEASE}), {jobs.DIRECTORY: str(tmp_path)}
    while not waiting.done():
        child = spawn(jobs.work, database.url, "q", "32", options, env=environment)
        while child.returncode is None and not waiting.done():
            await asyncio.wait([waiting], timeout=0.1)
        died += child.returncode is not None
    looking.cancel()
    done = await waiting
    assert {done[task.id].status for task in others} == {"completed"}
    assert done[deadly.id].status == "failed"
    assert "the last of 5" in str(done[deadly.id].error)
    assert died == 5
    assert len((tmp_path / "poison").read_text().splitlines()) == 5


async def test_claims_of_an_owner_whom_nobody_knows_are_returned_once_they_are_old(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    """As those of workers of the release before leases, which may still run."""
    first = await make_backend(lease=1)
    await first.append("q", tasks(2))
    assert len(await first.pop("q", 2)) == 2
    await database.execute("DELETE FROM sheppy_consumers")
    await database.execute("UPDATE sheppy_tasks SET owner = 'old'")
    other = await make_backend(lease=1)
    for task_id in ("0", "1"):
        assert await other.pop("q", timeout=1) == []
        long_ago = "2020-01-01 00:00:00" + (
            "+00" if database.dialect == "postgresql" else ".000000"
        )
        await database.execute(
            f"UPDATE sheppy_tasks SET heartbeat_at = '{long_ago}' WHERE id = '{task_id}'"
        )
        await database.execute(f"UPDATE sheppy_chores SET due_at = '{long_ago}'")
    assert await other.pop("q", 2, timeout=PATIENCE) == tasks(1)


async def test_in_memory_nobody_dies_alone(memory_url: str) -> None:
    """A task may take longer than the time after which owners count as of an older release."""
    backend = SqlBackend(memory_url, lease=1)
    await backend.connect()
    try:
        await backend.append("q", tasks(1))
        [taken] = await backend.pop("q")
        session = backend._session
        assert session is not None
        async with session.database.engine.begin() as connection:
            await connection.execute(
                text("UPDATE sheppy_tasks SET heartbeat_at = '2020-01-01 00:00:00.000000'")
            )
            await connection.execute(text("DELETE FROM sheppy_chores"))
        await session._background._parts[0]._step()
        await backend.store_result("q", {**taken, "finished_at": "now"})
        assert list(await backend.get_results("q", ["0"])) == ["0"]
    finally:
        await backend.disconnect()


async def test_application_with_one_connection_to_a_server_has_signs_of_life(
    postgres_database: TestDatabase,
) -> None:
    engine = create_async_engine(postgres_database.url, poolclass=StaticPool)
    backend = SqlBackend(engine, lease=1)
    await backend.connect()
    await asyncio.gather(backend.append("q", tasks(1)), backend.append("q", tasks(1)))
    assert await backend.pop("q") == tasks(1)
    known = await postgres_database.fetch("SELECT id FROM sheppy_consumers")
    await backend.disconnect()
    await engine.dispose()
    assert len(known) == 1
