"""Workers and users whose clock is an hour wrong; the database's is right.

On SQLite, too: what stands for the database's clock there is left alone.
"""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from sheppy import Queue

from sheppy_sql import SqlBackend
from tests.contract.tasks import PAST, ids, make_task
from tests.contract.tasks import finished as with_result
from tests.host.support import MakeBackend, finished, running, stored, until
from tests.host.tasks import (
    RETRY_DELAYS,
    add,
    fail_for_long,
    fail_with_delays,
    journal,
    one_of_two,
    other_of_two,
    record,
    slide,
)
from tests.support import make_worker
from tests.support.clock import from_now, shift

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase
    from tests.support.processes import Spawner

HOUR = 3600.0  # seconds
MINUTE = 60.0
LEASE = 1.0  # the shortest
SLACK = 60.0  # far more than a test takes, far less than the clocks differ by
WRONG = [HOUR, -HOUR]


@pytest.fixture(params=WRONG, ids=["fast", "slow"])
def offset(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds by which the clock of this process is ahead."""
    seconds: float = request.param
    shift(monkeypatch, timedelta(seconds=seconds))
    return seconds


async def due_in(database: TestDatabase) -> list[tuple[str, float]]:
    """The schedule by the database's clock: what kind of entry, and in how many seconds."""
    rows = await database.fetch("SELECT kind, run_at FROM sheppy_scheduled_tasks ORDER BY run_at")
    now = datetime.now(timezone.utc)
    return [(kind, (moment(run_at) - now).total_seconds()) for kind, run_at in rows]


def moment(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    return datetime.fromisoformat(value).replace(tzinfo=timezone.utc)


async def hold(url: str, offset: str) -> None:
    """Takes a task, and stores its result once it may."""
    shift(pytest.MonkeyPatch(), timedelta(seconds=float(offset)))
    backend = SqlBackend(url, lease=LEASE)
    await backend.connect()
    [task] = await backend.pop("test")
    print("took", task["id"], flush=True)
    assert await backend.pop("signals", timeout=60)
    await backend.store_result("test", with_result(task))
    await backend.disconnect()


@pytest.mark.parametrize("seconds", WRONG)
async def test_claims_stay_their_workers_whoever_is_wrong(
    make_backend: MakeBackend,
    spawn: Spawner,
    monkeypatch: pytest.MonkeyPatch,
    database: TestDatabase,
    seconds: float,
) -> None:
    # Both are wrong, in opposite directions.
    shift(monkeypatch, timedelta(seconds=-seconds))
    other = await make_backend(lease=LEASE)
    await other.append("test", [make_task()])
    child = spawn(hold, database.url, str(seconds))
    await asyncio.to_thread(child.wait_for, "took task")
    assert await other.pop("test", timeout=1.5 * LEASE) == []
    await other.append("signals", [make_task()])
    done = await other.get_results("test", ["task"], timeout=30)
    assert done["task"]["result"] == with_result(make_task())["result"]
    assert await asyncio.to_thread(child.wait) == 0


@pytest.mark.usefixtures("offset")
async def test_what_is_due_goes_by_the_databases_clock(make_backend: MakeBackend) -> None:
    backend = await make_backend()
    now = datetime.now(timezone.utc)
    for minutes in (-30, 30):
        at = now + timedelta(minutes=minutes)
        await backend.schedule("test", make_task(str(minutes)), at)
    assert ids(await backend.pop_scheduled("test")) == ["-30"]
    assert ids(await backend.pop_scheduled("test", now + timedelta(minutes=31))) == ["30"]


async def test_users_own_delay_carries_the_users_clock(
    make_backend: MakeBackend, database: TestDatabase, offset: float
) -> None:
    queue = Queue(await make_backend(), "test")
    await queue.schedule(record(1), timedelta(minutes=5))
    [(kind, seconds)] = await due_in(database)
    assert kind == "due"
    assert abs(seconds - (offset + 5 * MINUTE)) < SLACK
    assert bool(await queue.backend.pop_scheduled("test")) is (offset < 0)


@pytest.mark.usefixtures("offset")
async def test_retries_keep_their_delay(make_backend: MakeBackend, database: TestDatabase) -> None:
    queue = Queue(await make_backend(), "test")
    task = fail_for_long()
    await queue.add(task)

    async def is_scheduled() -> bool:
        return [kind for kind, _ in await due_in(database)] == ["due"]

    async with running(make_worker(queue.backend)):
        await until(is_scheduled)
    [(_, seconds)] = await due_in(database)
    assert abs(seconds - HOUR) < SLACK
    assert (await stored(queue, task)).status == "retrying"
    assert len(journal) == 1


@pytest.mark.usefixtures("offset")
async def test_all_attempts_come_in_time(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    task = fail_with_delays()
    await queue.add(task)
    async with running(make_worker(queue.backend)):
        done = await finished(queue, task)
    assert done.status == "failed"
    starts = [run.started_at for run in journal]
    assert len(starts) == 4
    pauses = [(after - before).total_seconds() for before, after in pairwise(starts)]
    assert all(pause >= delay for pause, delay in zip(pauses, RETRY_DELAYS, strict=True))


@pytest.mark.usefixtures("offset")
async def test_waits_for_a_rate_limit_keep_their_duration(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    queue = Queue(await make_backend(), "test")
    await queue.add([one_of_two(), other_of_two()])

    async def one_ran_and_the_other_waits() -> bool:
        return len(journal) == 1 and len(await due_in(database)) == 1

    async with running(make_worker(queue.backend)):
        await until(one_ran_and_the_other_waits)
    [(kind, seconds)] = await due_in(database)
    assert kind == "due"
    assert abs(seconds - HOUR) < SLACK
    assert len(journal) == 1


@pytest.mark.usefixtures("offset")
async def test_rate_limited_tasks_all_run(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    tasks = [slide() for _ in range(7)]
    await queue.add(tasks)
    async with running(make_worker(queue.backend)):
        await queue.wait_for([*tasks], timeout=30)
    assert sorted(run.task_id for run in journal) == sorted(task.id for task in tasks)


@pytest.mark.parametrize("age", [0.001, 30 * MINUTE], ids=["just expired", "pruned if ordinary"])
async def test_worker_whose_clock_is_slow_runs_no_cron_twice(
    make_backend: MakeBackend,
    database: TestDatabase,
    monkeypatch: pytest.MonkeyPatch,
    age: float,
) -> None:
    """Though the result of the run has expired before that worker's clock has come to it."""
    from sheppy_sql._pruner import Pruner

    backend = await make_backend()
    queue = Queue(backend, "test")
    half_an_hour_ago = datetime.now(timezone.utc) - timedelta(minutes=30)
    await queue.add_cron(record(1), f"{half_an_hour_ago:%M %H} * * *")
    [cron] = await queue.get_crons()
    due = cron.next_run(half_an_hour_ago - timedelta(minutes=5))
    run = cron.create_task(due)
    assert await queue.schedule(run, due) is True
    async with running(make_worker(backend, enable_cron_manager=False)):
        await finished(queue, run)
    await database.execute(
        "UPDATE sheppy_results SET expires_at = :then", then=from_now(database, -age)
    )
    await database.execute("DELETE FROM sheppy_chores")
    await Pruner(backend._connected.database, backend._options).prune()
    assert await queue.get_task(run) is None
    shift(monkeypatch, timedelta(seconds=-HOUR))
    tomorrow = due + timedelta(days=1)

    async def next_runs_are_scheduled() -> bool:
        return tomorrow in [task.scheduled_at for task in await queue.get_scheduled()]

    async with running(make_worker(await make_backend())):
        await until(next_runs_are_scheduled)
    assert [(r.value, r.due_at) for r in journal] == [(1, due)]
    assert all(task.id != run.id for task in await queue.get_all_tasks())


async def test_clock_that_is_off_is_warned_of(
    postgres_database: TestDatabase, offset: float, caplog: pytest.LogCaptureFixture
) -> None:
    """On PostgreSQL; SQLite has no other clock than this machine's."""
    backend = SqlBackend(postgres_database.url)
    await backend.connect()
    await backend.disconnect()
    [warning] = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    said = re.search(r"clock and the database's differ by ([\d.]+) s", warning.message)
    assert said is not None
    assert abs(float(said[1]) - abs(offset)) < SLACK


@pytest.mark.parametrize("seconds", [0, 1, -1])
async def test_clock_that_is_nearly_right_is_not_warned_of(
    make_backend: MakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seconds: float,
) -> None:
    shift(monkeypatch, timedelta(seconds=seconds))
    await make_backend()
    assert [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING] == []


@pytest.mark.usefixtures("offset")
async def test_tasks_run_and_crons_are_added_as_ever(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(ttl=100), "test")
    task = add(1, 2)
    await queue.add(task)
    await queue.schedule(record(1), PAST)
    assert await queue.add_cron(add(1, 2), "0 6 * * *") is True
    async with running(make_worker(queue.backend, enable_cron_manager=False)):
        assert (await finished(queue, task)).result == 3
    assert list(await queue.backend.get_results("test", [str(task.id)])) == [str(task.id)]
