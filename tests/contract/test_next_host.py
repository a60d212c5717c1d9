"""Under sheppy's next release its worker looks after stale tasks; under 0.0.7 we do."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from sheppy_sql import SqlBackend
from tests.contract.tasks import (
    QUEUE,
    MakeBackend,
    finished,
    ids,
    make_task,
    retrying,
    store_claimed,
)
from tests.support.clock import from_now
from tests.support.next_host import NextSqlBackend

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase
    from tests.support.next_host import MakeNextBackend
    from tests.support.processes import Child, Spawner

LEASE = 1.0  # seconds, the shortest
HEART = "sheppy-sql-heart"
PATIENCE = 30.0  # seconds


async def take_as_next(url: str) -> None:
    await take(NextSqlBackend(url, lease=LEASE))


async def take_as_0_0_7(url: str) -> None:
    await take(SqlBackend(url, lease=LEASE))


async def take(backend: SqlBackend) -> None:
    """Takes a task, and has it until it is killed."""
    await backend.connect()
    print("took", *ids(await backend.pop(QUEUE)), flush=True)
    await asyncio.Event().wait()


async def killed(child: Child, database: TestDatabase) -> None:
    """The child, with a task that it has claimed."""
    await asyncio.to_thread(child.wait_for, "took task")
    await asyncio.to_thread(child.kill)
    assert await database.fetch("SELECT state FROM sheppy_tasks") == [("claimed",)]


def hearts() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == HEART]


async def test_next_host_needs_no_signs_of_life_of_ours(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    backend = await make_next_backend()
    await store_claimed(backend, make_task())
    await backend.get_stale_messages(QUEUE, 0)
    assert hearts() == []
    assert await database.fetch("SELECT id FROM sheppy_consumers") == []


async def test_0_0_7_needs_them_from_the_first_pop_on(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    backend = await make_backend()
    await backend.append(QUEUE, [make_task()])
    assert hearts() == []
    await backend.pop(QUEUE)
    assert hearts() == [HEART]
    [(owner,)] = await database.fetch("SELECT id FROM sheppy_consumers")
    assert await database.fetch("SELECT owner FROM sheppy_tasks") == [(owner,)]
    await backend.disconnect()
    assert await database.fetch("SELECT id FROM sheppy_consumers") == []


async def test_next_host_is_handed_the_tasks_of_a_killed_process(
    make_next_backend: MakeNextBackend, database: TestDatabase, spawn: Spawner
) -> None:
    worker = await make_next_backend(lease=LEASE)
    await worker.append(QUEUE, [make_task()])
    await killed(spawn(take_as_next, database.url), database)
    # We leave it alone, however dead it looks: after a lease,
    assert await worker.pop(QUEUE, timeout=LEASE) == []
    await database.execute(
        "UPDATE sheppy_tasks SET heartbeat_at = :then", then=from_now(database, -7200)
    )
    # after hours, and under 0.0.7's way to look for the dead of releases before it.
    await database.execute("DELETE FROM sheppy_chores")
    assert await worker.pop(QUEUE, timeout=LEASE / 2) == []
    assert await worker.get_stale_messages(QUEUE, 300_000) == [make_task()]
    crashed = finished(make_task(), status="crashed")
    assert await worker.store_result(QUEUE, crashed)
    assert await worker.get_results(QUEUE, ["task"]) == {"task": crashed}


async def test_under_0_0_7_the_tasks_of_a_killed_process_come_back_by_themselves(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    worker = await make_backend(lease=LEASE)
    await worker.append(QUEUE, [make_task()])
    await killed(spawn(take_as_0_0_7, database.url), database)
    assert await worker.pop(QUEUE, timeout=PATIENCE) == [make_task()]
    await worker.store_result(QUEUE, finished(make_task()))
    assert await worker.get_all_tasks(QUEUE) == [finished(make_task())]


async def test_next_host_leaves_living_workers_of_0_0_7_their_tasks(
    make_backend: MakeBackend, make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    """While one release replaces the other: the older one's claims are renewed elsewhere."""
    older, newer = await make_backend(), await make_next_backend()
    await store_claimed(older, make_task())
    await database.execute(
        "UPDATE sheppy_tasks SET heartbeat_at = :then", then=from_now(database, -600)
    )
    assert await newer.get_stale_messages(QUEUE, 300_000) == []
    assert await older.store_result(QUEUE, retrying(make_task(), delay=600))
    assert await newer.cancel(QUEUE, "task") is not None


async def test_next_host_is_handed_the_tasks_of_dead_workers_of_0_0_7(
    make_next_backend: MakeNextBackend, database: TestDatabase, spawn: Spawner
) -> None:
    newer = await make_next_backend(lease=LEASE)
    await newer.append(QUEUE, [make_task()])
    await killed(spawn(take_as_0_0_7, database.url), database)
    for column in ("heartbeat_at", "expires_at"):
        await database.execute(
            f"UPDATE sheppy_consumers SET {column} = :then", then=from_now(database, -300)
        )
    await database.execute(
        "UPDATE sheppy_tasks SET heartbeat_at = :then", then=from_now(database, -600)
    )
    assert await newer.pop(QUEUE, timeout=LEASE / 2) == []
    assert await newer.get_stale_messages(QUEUE, 300_000) == [make_task()]


async def test_next_host_gets_back_at_once_what_a_disconnect_hands_back(
    make_next_backend: MakeNextBackend, database: TestDatabase
) -> None:
    leaving, staying = await make_next_backend(), await make_next_backend()
    await store_claimed(leaving, make_task())
    await leaving.disconnect()
    assert await staying.get_stale_messages(QUEUE, 0) == []
    assert await staying.pop(QUEUE) == [make_task()]
