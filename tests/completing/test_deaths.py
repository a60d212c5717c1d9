"""Processes killed on either side of the commit in which a task completes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sheppy import Queue

from tests.completing import jobs
from tests.host.support import MakeBackend, until
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner

pytestmark = pytest.mark.posix

PATIENCE = 150.0  # seconds


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(3, id="a few"),
        pytest.param(50, id="fifty", marks=[pytest.mark.torture, pytest.mark.timeout(200)]),
    ],
)
@pytest.mark.usefixtures("orders")
async def test_killed_on_either_side_of_the_commit_all_is_there_exactly_once(
    make_backend: MakeBackend,
    database: TestDatabase,
    spawn: Spawner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
) -> None:
    """So many times on each side."""
    monkeypatch.setenv(jobs.DIRECTORY, str(tmp_path))
    backend = await make_backend()
    queue = Queue(backend, jobs.QUEUE)
    sides = [jobs.BEFORE, jobs.AFTER, ""] * kills
    tasks = [jobs.place(number, side) for number, side in enumerate(sides)]
    await queue.add(tasks)
    workers = "2" if database.dialect == "sqlite" else "3"
    breeder = spawn(jobs.breed, database.url, workers, env={jobs.DIRECTORY: str(tmp_path)})
    done = await queue.wait_for([*tasks], timeout=PATIENCE)

    async def all_dead() -> bool:
        # The last one is told of a moment after its death.
        return breeder.stdout.count("killed\n") == 2 * kills

    await until(all_dead)
    breeder.kill()
    numbers = list(range(len(tasks)))
    ended = [done[task.id] for task in tasks]
    assert {(task.status, task.error) for task in ended} == {("completed", None)}
    assert [task.result for task in ended] == numbers
    entries = await database.fetch("SELECT number FROM entries ORDER BY number")
    assert [number for (number,) in entries] == numbers
    children = await Queue(backend, jobs.CHILDREN).get_pending(10 * len(tasks))
    assert sorted(task.spec.args[0] for task in children) == numbers
    assert await database.fetch("SELECT id FROM sheppy_tasks WHERE queue = 'test'") == []
    # Each death was on its side: what was committed did not run again. But for the odd task whose
    # worker stood still for as long as its lease, on a machine that is busy.
    ran = Counter(run.lstrip("0123456789") for run in jobs.runs())
    assert ran[jobs.BEFORE] >= 2 * kills
    assert kills <= ran[jobs.AFTER] < 2 * kills
    assert "ended" not in breeder.stdout
