"""Without a fault, every task runs exactly once, however many processes work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sheppy import Queue

from sheppy_sql import SqlBackend
from tests.concurrency import jobs
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner

MakeBackend = Callable[..., Awaitable[SqlBackend]]


async def run_all(
    backend: SqlBackend, url: str, spawn: Spawner, directory: Path, *, tasks: int, workers: int
) -> list[int]:
    """What ran, in order, once for each run."""
    queue = Queue(backend, "exactly-once")
    directory.mkdir()
    stop = directory.with_name("stop")
    environment = {jobs.TRACES: str(directory)}
    children = [
        spawn(jobs.work, url, queue.name, str(stop), env=environment) for _ in range(workers)
    ]
    added = [jobs.trace(number) for number in range(tasks)]
    assert all(await queue.add(added))
    done = await queue.wait_for([task.id for task in added], timeout=400)
    stop.touch()
    assert [await asyncio.to_thread(child.wait, 60) for child in children] == [0] * workers
    assert {task.status for task in done.values()} == {"completed"}
    assert sorted(task.result for task in done.values()) == list(range(tasks))
    assert await backend.get_stats(queue.name) == {
        "pending": 0,
        "completed": tasks,
        "scheduled": 0,
    }
    return jobs.traces(directory)


@pytest.mark.concurrency
async def test_every_task_runs_once(
    backend: SqlBackend, database: TestDatabase, spawn: Spawner, tmp_path: Path
) -> None:
    ran = await run_all(backend, database.url, spawn, tmp_path / "ran", tasks=400, workers=3)
    assert ran == list(range(400))


@pytest.mark.torture
@pytest.mark.timeout(500)
async def test_every_one_of_many_tasks_runs_once(
    backend: SqlBackend, database: TestDatabase, spawn: Spawner, tmp_path: Path
) -> None:
    tasks, workers = (5_000, 4) if database.dialect == "sqlite" else (20_000, 8)
    ran = await run_all(
        backend, database.url, spawn, tmp_path / "ran", tasks=tasks, workers=workers
    )
    assert ran == list(range(tasks))


@pytest.mark.concurrency
async def test_concurrent_pops_share_a_queue_without_overlap(make_backend: MakeBackend) -> None:
    backends = [await make_backend() for _ in range(4)]
    await backends[0].append("q", [{"id": str(number)} for number in range(600)])

    async def take_all(backend: SqlBackend) -> list[str]:
        taken: list[str] = []
        while some := await backend.pop("q", 7):
            taken += [task["id"] for task in some]
        return taken

    shares = await asyncio.gather(*(take_all(b) for b in backends for _ in range(3)))
    assert sorted(int(task_id) for share in shares for task_id in share) == list(range(600))


@pytest.mark.concurrency
async def test_of_many_adding_an_id_one_succeeds(make_backend: MakeBackend) -> None:
    backends = [await make_backend() for _ in range(4)]
    for number in range(30):
        task = {"id": str(number), "finished_at": None}
        added = await asyncio.gather(*(b.append("q", [task]) for b in backends))
        assert sorted(added) == [[False]] * 3 + [[True]]


@pytest.mark.concurrency
async def test_an_id_that_is_finishing_is_never_added_again(make_backend: MakeBackend) -> None:
    """The id moves from one table to another, and stands in one of them at every moment."""
    worker, producer = await make_backend(), await make_backend()
    for number in range(60):
        task = {"id": str(number), "finished_at": None}
        await producer.append("q", [task])
        [taken] = await worker.pop("q")
        stored, *added = await asyncio.gather(
            worker.store_result("q", {**taken, "finished_at": "now"}),
            *(producer.append("q", [task]) for _ in range(4)),
        )
        assert (stored, added) == (True, [[False]] * 4)
    assert await producer.size("q") == 0


@pytest.mark.concurrency
async def test_batches_in_opposite_order_do_not_deadlock(make_backend: MakeBackend) -> None:
    one, other = await make_backend(), await make_backend()
    tasks = [{"id": str(number), "finished_at": None} for number in range(300)]
    for _ in range(5):
        await asyncio.gather(
            one.append("q", tasks, unique=False),
            other.append("q", tasks[::-1], unique=False),
            one.append("q", tasks[::-1]),
            other.append("q", tasks),
        )
    assert await one.size("q") == 300
