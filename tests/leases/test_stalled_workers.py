"""Workers that live, and do not answer for a while."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sheppy_sql import SqlBackend, _leases
from sheppy_sql._leases import Leases
from tests.leases import jobs
from tests.support.databases import TestDatabase
from tests.support.processes import Child, Spawner

MakeBackend = Callable[..., Awaitable[SqlBackend]]

PATIENCE = 30.0
NEWER = {"status": "completed", "result": "newer", "finished_at": "newer"}


def new_task(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "status": "new", "finished_at": None, **changes}


async def stalling(
    spawn: Spawner, database: TestDatabase, how: str, seconds: float, **options: object
) -> Child:
    given = json.dumps({"lease": 2, **options})
    child = spawn(jobs.stall, database.url, "q", how, str(seconds), given)
    await asyncio.to_thread(child.wait_for, "holds")
    return child


async def ended(child: Child) -> None:
    assert await asyncio.to_thread(child.wait, 60) == 0, child.report()


@pytest.mark.torture
async def test_task_that_computes_for_longer_than_a_lease_keeps_its_claim(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend(lease=2)
    await backend.append("q", [new_task()])
    child = await stalling(spawn, database, "computes", 5)
    assert await backend.pop("q", timeout=4) == []
    await ended(child)
    assert (await backend.get_results("q", ["a"]))["a"]["result"] == "late"


@pytest.mark.torture
async def test_loop_that_does_not_turn_for_too_long_costs_the_claim(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend(lease=2)
    await backend.append("q", [new_task()])
    child = await stalling(spawn, database, "computes", 8, max_loop_stall=1)
    [taken] = await backend.pop("q", timeout=PATIENCE)
    await backend.store_result("q", {**taken, **NEWER})
    await ended(child)
    assert (await backend.get_results("q", ["a"]))["a"]["result"] == "newer"
    assert "max_loop_stall" in child.stderr
    assert "its result is dropped" in child.stderr


@pytest.mark.torture
@pytest.mark.posix
@pytest.mark.parametrize("retries", [False, True], ids=["has a result", "is to be retried"])
@pytest.mark.parametrize("finished", [False, True], ids=["runs again", "has run again"])
async def test_late_outcome_of_a_stopped_worker_changes_nothing(
    make_backend: MakeBackend,
    database: TestDatabase,
    spawn: Spawner,
    retries: bool,
    finished: bool,
) -> None:
    backend = await make_backend(lease=2)
    await backend.append("q", [new_task(retries=retries)])
    child = await stalling(spawn, database, "is stopped", 0)
    [taken] = await backend.pop("q", timeout=PATIENCE)
    if finished:
        await backend.store_result("q", {**taken, **NEWER})
    child.send_signal(signal.SIGCONT)
    await ended(child)
    assert "its result is dropped" in child.stderr
    if not finished:
        assert await backend.get_scheduled("q") == []
        assert await backend.size("q") == 0
        await backend.store_result("q", {**taken, **NEWER})
    assert (await backend.get_results("q", ["a"]))["a"] == {**taken, **NEWER}
    assert await backend.get_scheduled("q") == []


@pytest.mark.torture
async def test_late_result_of_a_process_that_held_the_interpreters_lock_changes_nothing(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    backend = await make_backend(lease=2)
    await backend.append("q", [new_task()])
    child = await stalling(spawn, database, "holds the interpreter's lock", 6)
    [taken] = await backend.pop("q", timeout=PATIENCE)
    await backend.store_result("q", {**taken, **NEWER})
    await ended(child)
    assert (await backend.get_results("q", ["a"]))["a"]["result"] == "newer"


@pytest.mark.posix
async def test_stopped_worker_that_goes_on_works_on(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    """It was thought dead; what it takes from then on is its own again."""
    backend = await make_backend(lease=1)
    await backend.append("q", [new_task()])
    child = await stalling(spawn, database, "is stopped", 0, lease=1)
    [taken] = await backend.pop("q", timeout=PATIENCE)
    child.send_signal(signal.SIGCONT)
    await ended(child)
    await backend.store_result("q", {**taken, **NEWER})
    assert await database.fetch("SELECT count(*) FROM sheppy_consumers") == [(1,)]


async def test_worker_that_beats_again_in_time_keeps_its_tasks(
    make_backend: MakeBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole outage may lie between the look for dead workers and the return of their tasks."""
    stalled, other = await make_backend(), await make_backend()
    await stalled.append("q", [{"id": "0", "status": "new", "finished_at": None}])
    assert len(await stalled.pop("q")) == 1
    long_ago = "2020-01-01 00:00:00" + ("+00" if database.dialect == "postgresql" else ".000000")
    await database.execute(f"UPDATE sheppy_consumers SET expires_at = '{long_ago}', boot_id = '0'")
    return_claims, dead = Leases._return_claims, []
    monkeypatch.setattr(_leases, "SETTLING", 0.0)

    async def return_late(leases: Leases, owner: str, *args: Any, **kwargs: Any) -> None:
        dead.append(owner)
        later = long_ago.replace("2020", "2999")
        await database.execute(f"UPDATE sheppy_consumers SET expires_at = '{later}'")
        await return_claims(leases, owner, *args, **kwargs)

    monkeypatch.setattr(Leases, "_return_claims", return_late)
    assert await other.pop("elsewhere") == []
    part = other._connected._background._parts[0]
    await part._step()
    monkeypatch.undo()
    assert dead
    assert await database.fetch("SELECT state, crashes FROM sheppy_tasks") == [("claimed", 0)]
