"""Long and rough: many tasks, and whatever can happen to those who work on them."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psutil
import pytest
from sheppy import Queue

from sheppy_sql import SqlBackend
from sheppy_sql._waiting import sleep_until
from tests.faults.load import until
from tests.support.breeding import bred_by
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner
from tests.torture import jobs

MakeBackend = Callable[..., Awaitable[SqlBackend]]

TASKS = 2000
KILL_EVERY, KILL_FOR = 0.3, 20.0  # seconds


async def claims_at_death(worker: psutil.Process, database: TestDatabase) -> int:
    """Kill a worker; how many tasks it held."""
    # Stopped first, so that what is counted is what is lost.
    os.kill(worker.pid, signal.SIGSTOP)
    [(claims,)] = await database.fetch(
        "SELECT count(*) FROM sheppy_tasks WHERE state = 'claimed' AND owner LIKE :owner",
        owner=f"%-{worker.pid}-%",
    )
    os.kill(worker.pid, signal.SIGKILL)
    return int(claims)


@pytest.mark.torture
@pytest.mark.posix
@pytest.mark.timeout(200)
async def test_killing_a_worker_three_times_a_second_loses_no_task(
    backend: SqlBackend, database: TestDatabase, spawn: Spawner, tmp_path: Path
) -> None:
    queue = Queue(backend, jobs.QUEUE)
    traces = tmp_path / "traces"
    traces.mkdir()
    workers = 3 if database.dialect == "sqlite" else 8
    breeder = spawn(jobs.breed, database.url, str(workers), env={jobs.DIRECTORY: str(traces)})
    await asyncio.to_thread(breeder.wait_for, "started")

    brief = [jobs.brief() for _ in range(TASKS // 3)]
    failing = [jobs.fails_once() for _ in range(TASKS // 3)]
    later = [jobs.brief() for _ in range(TASKS - len(brief) - len(failing))]
    tasks = [*brief, *failing, *later]

    async def produce() -> None:
        for start in range(0, len(brief), 20):
            assert all(await queue.add(brief[start : start + 20]))
            assert all(await queue.add(failing[start : start + 20]))
            at = datetime.now(timezone.utc) + timedelta(seconds=random.uniform(0, 5))
            for task in later[start : start + 20]:
                assert await queue.schedule(task, at)
            await asyncio.sleep(KILL_FOR / (len(brief) / 20) / 2)

    producing = asyncio.create_task(produce())
    kills = claims = 0
    ends_at = time.monotonic() + KILL_FOR
    while time.monotonic() < ends_at:
        await asyncio.sleep(KILL_EVERY)
        claims += await claims_at_death(random.choice(bred_by(breeder)), database)
        kills += 1
    await producing
    stopped_killing_at = time.monotonic()
    done = await queue.wait_for([*tasks], timeout=100)
    took = time.monotonic() - stopped_killing_at

    assert {task.status for task in done.values()} == {"completed"}
    assert len(done) == TASKS
    assert await backend.get_stats(queue.name) == {
        "pending": 0,
        "completed": TASKS,
        "scheduled": 0,
    }
    runs = Counter(jobs.traces(traces))
    expected = {str(task.id): 2 if task in failing else 1 for task in tasks}
    assert runs.keys() == expected.keys()
    assert all(runs[task_id] >= times for task_id, times in expected.items())
    again = sum(runs.values()) - sum(expected.values())
    print(f"{kills} kills, {claims} claims at death, {again} runs again, {took:.1f} s to the end")
    assert kills > KILL_FOR / KILL_EVERY / 2
    assert again <= claims
    # Much less on a machine that has nothing else to do.
    assert took < jobs.LEASE + 60


@pytest.mark.torture
@pytest.mark.concurrency
async def test_pops_cancelled_at_random_moments_lose_no_task(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    pops = 2000
    backend, producer = await make_backend(), await make_backend()
    rng = random.Random(7)
    added: list[str] = []
    taken: list[str] = []
    done = asyncio.Event()

    async def produce() -> None:
        while not done.is_set():
            ids = [str(len(added) + number) for number in range(10)]
            tasks = [{"id": task_id, "finished_at": None} for task_id in ids]
            await producer.append(jobs.QUEUE, tasks)
            added.extend(ids)
            # Now and then the queue is empty, and now and then it is not.
            await sleep_until(done, 0.2 if len(added) - len(taken) > 100 else 0.005)

    async def consume(count: int) -> None:
        for _ in range(count):
            pop = asyncio.create_task(backend.pop(jobs.QUEUE, rng.randint(1, 5), timeout=1))
            for task in await jobs.cancel_soon(pop, rng) or []:
                taken.append(task["id"])
                await backend.store_result(jobs.QUEUE, {**task, "finished_at": "now"})

    producing = asyncio.create_task(produce())
    await asyncio.gather(*(consume(pops // 8) for _ in range(8)))
    done.set()
    await producing
    assert len(taken) == len(set(taken)) > 100
    assert await database.fetch("SELECT id FROM sheppy_tasks WHERE state = 'claimed'") == []
    left = await backend.get_pending(jobs.QUEUE, len(added) + 1)
    assert sorted([*taken, *(task["id"] for task in left)]) == sorted(added)
    pool: Any = backend._connected.database.engine.pool

    async def at_rest() -> bool:
        # But those that are kept at hand; another may be notifying for a moment.
        kept = backend._connected.database._connections._kept
        return bool(pool.checkedout() == len(kept))

    await until(at_rest, "a connection has leaked")
    if database.dialect == "postgresql":
        idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        assert await database.fetch(idle + " AND datname = current_database()") == [(0,)]


@pytest.mark.torture
@pytest.mark.timeout(150)
async def test_no_caller_hears_of_a_deadlock(database: TestDatabase, spawn: Spawner) -> None:
    seconds = 60 if database.dialect == "postgresql" else 15
    children = [
        spawn(jobs.get_in_the_way, database.url, str(seed), str(seconds)) for seed in range(6)
    ]
    for child in children:
        assert await asyncio.to_thread(child.wait, 120) == 0, child.report()
        assert "Traceback" not in child.stderr
    calls = sum(int(re.findall(r"calls (\d+)", child.stdout)[0]) for child in children)
    print(f"{calls} calls in {seconds} s")
    assert calls > 100
    if database.dialect == "postgresql":
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        print("deadlocks by the server's count:", (await database.fetch(deadlocks))[0][0])
