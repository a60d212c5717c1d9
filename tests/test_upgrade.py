"""Live tasks of the first release's tables, which the newest tables and code must not lose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sheppy import Queue, Task, Workflow

from sheppy_sql import SqlBackend, migrate
from sheppy_sql.schema import sqlite_timestamp
from tests.host import tasks
from tests.host.workflows import linear
from tests.support import make_worker
from tests.support.databases import TestDatabase

FIRST = "sheppy_sql_0001"
QUEUE = "test"
NOW = datetime.now(timezone.utc)
AGO = NOW - timedelta(hours=2)
"""Long enough for a worker of that release, which gave no sign of life, to count as dead."""
SOON = NOW + timedelta(seconds=3)
LATER = NOW + timedelta(days=1)
PATIENCE = 60.0  # seconds

Fill = Callable[..., Awaitable[None]]


@pytest.fixture
def database(empty_database: TestDatabase) -> TestDatabase:
    """One with the first release's tables."""
    migrate.upgrade(empty_database.url, revision=FIRST)
    return empty_database


@pytest.fixture
def fill(database: TestDatabase) -> Fill:
    """Inserts one row as that release did."""

    async def fill(table: str, **values: Any) -> None:
        # As text: the columns are of different types on the two databases.
        shown = {name: _literal(value, database.dialect) for name, value in values.items()}
        names, literals = ", ".join(shown), ", ".join(shown.values())
        await database.execute(
            f"INSERT INTO sheppy_{table} ({names}) VALUES ({literals})".replace(":", "\\:")
        )

    return fill


def _literal(value: Any, dialect: str) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, datetime):
        value = value.isoformat() if dialect == "postgresql" else sqlite_timestamp(value)
    if isinstance(value, dict):
        value = json.dumps(value)
    return str(value) if isinstance(value, (bool, int)) else "'" + value.replace("'", "''") + "'"


class Filled:
    """One task in each state in which that release could leave it."""

    def __init__(self, fill: Fill) -> None:
        self._fill = fill
        self._positions = 0
        self.live: dict[str, Task] = {}

    async def put(self, name: str, state: str, **columns: Any) -> Task:
        task = self.live[name] = tasks.add(len(self.live), 100)
        payload = {**task.model_dump(mode="json"), **columns.pop("changes", {})}
        self._positions += state in {"pending", "claimed"}
        await self._fill(
            "tasks",
            queue=QUEUE,
            id=str(task.id),
            payload=payload,
            state=state,
            position=self._positions if state in {"pending", "claimed"} else None,
            append_token=columns.pop("append_token", 1),
            func=payload["spec"]["func"],
            status=payload["status"],
            created_at=AGO,
            **columns,
        )
        return task

    async def put_scheduled(self, name: str, kind: str, run_at: datetime, **columns: Any) -> None:
        token = columns.pop("lease_token", None)
        task = await self.put(name, "scheduled", **columns)
        await self._fill(
            "scheduled_tasks",
            queue=QUEUE,
            task_id=str(task.id),
            run_at=run_at,
            kind=kind,
            lease_token=token,
        )


async def filled(fill: Fill) -> Filled:
    everything = Filled(fill)
    dead = {"owner": "dead-1-0123456789ab", "heartbeat_at": AGO}
    retry = {
        "status": "retrying",
        "retry_count": 1,
        "last_retry_at": AGO.isoformat(),
        "next_retry_at": AGO.isoformat(),
    }
    await everything.put("claimed first", "claimed", claim_token=11, **dead)
    await everything.put("pending", "pending")
    await everything.put("pending, added by the scheduler", "pending", append_token=None)
    await everything.put("claimed last", "claimed", claim_token=12, **dead)
    await everything.put_scheduled("due", "due", AGO)
    await everything.put_scheduled("to come", "due", SOON)
    await everything.put_scheduled("leased by a dead scheduler", "leased", AGO, lease_token=13)
    await everything.put_scheduled("leased a moment ago", "leased", SOON, lease_token=14)
    await everything.put_scheduled("parked", "parked", AGO, changes=retry)
    await everything.put_scheduled("parked a moment ago", "parked", SOON, changes=retry)
    await fill("queues", name=QUEUE)
    return everything


async def run_to_the_end(backend: SqlBackend, queue: Queue, wanted: list[Task]) -> None:
    worker = make_worker(backend, QUEUE)
    working = asyncio.create_task(worker.work(register_signal_handlers=False))
    try:
        done = await queue.wait_for([*wanted], timeout=PATIENCE)
    finally:
        worker._shutdown_event.set()
        await working
    assert {task.id: done[task.id].result for task in wanted} == {
        task.id: sum(task.spec.args) for task in wanted
    }


async def ended(queue: Queue, flow: Workflow) -> Workflow:
    for _ in range(int(PATIENCE / 0.1)):
        found = await queue.get_workflow(flow)
        if found is not None and found.completed:
            return found
        await asyncio.sleep(0.1)
    raise TimeoutError


async def upgraded(database: TestDatabase, **options: Any) -> SqlBackend:
    await asyncio.to_thread(migrate.upgrade, database.url)
    backend = SqlBackend(database.url, lease=1, **options)
    await backend.connect()
    return backend


@pytest.mark.timeout(120)
@pytest.mark.parametrize("before", [FIRST, "sheppy_sql_0002", "sheppy_sql_0003"])
async def test_every_task_of_an_older_release_ends_under_this_one(
    database: TestDatabase, fill: Fill, before: str
) -> None:
    migrate.upgrade(database.url, revision=before)
    everything = await filled(fill)
    future = tasks.add(1, 2)
    kept, gone = tasks.add(3, 4), tasks.add(5, 6)
    live = list(everything.live.values())
    await Filled(fill).put_scheduled("not to come within this test", "due", LATER)
    for task, expires_at in ((kept, None), (gone, AGO)):
        ended = {
            **task.model_dump(mode="json"),
            "status": "completed",
            "result": 7,
            "finished_at": AGO.isoformat(),
        }
        await fill(
            "results",
            queue=QUEUE,
            id=str(task.id),
            payload=ended,
            status="completed",
            claim_token=1,
            append_token=2,
            finished_at=AGO,
            expires_at=expires_at,
        )
    backend = await upgraded(database)
    try:
        queue = Queue(backend, QUEUE)
        await run_to_the_end(backend, queue, live)
        assert await backend.get_stats(QUEUE) == {
            "pending": 0,
            "completed": len(live) + 1,
            "scheduled": 1,
        }
        found = await queue.get_task([kept, gone])
        assert {task_id: task.result for task_id, task in found.items()} == {kept.id: 7}
        assert await queue.add(future)
    finally:
        await backend.disconnect()
    states = await database.fetch("SELECT state, crashes FROM sheppy_tasks ORDER BY state")
    assert states == [("pending", 0), ("scheduled", 0)]


@pytest.mark.timeout(120)
async def test_tasks_survive_the_way_back_and_forth(database: TestDatabase, fill: Fill) -> None:
    everything = await filled(fill)
    backend = await upgraded(database)
    [suspect] = await backend.pop(QUEUE)
    await backend.disconnect()
    await database.execute(f"UPDATE sheppy_tasks SET crashes = 1 WHERE id = '{suspect['id']}'")
    await asyncio.to_thread(migrate.downgrade, database.url, revision=FIRST)
    backend = await upgraded(database)
    try:
        await run_to_the_end(backend, Queue(backend, QUEUE), list(everything.live.values()))
    finally:
        await backend.disconnect()


@pytest.mark.timeout(120)
async def test_workflow_that_got_stuck_under_the_first_release_goes_on(
    database: TestDatabase, fill: Fill
) -> None:
    flow: Any = linear(1)
    await asyncio.to_thread(migrate.upgrade, database.url)
    backend = SqlBackend(database.url)
    await backend.connect()
    queue = Queue(backend, QUEUE)
    await queue.add_workflow(flow)
    await backend.disconnect()
    # As if it had never been added: the producer died before that.
    await database.execute("DELETE FROM sheppy_tasks")
    await database.execute("DELETE FROM sheppy_workflow_tasks")
    await asyncio.to_thread(migrate.downgrade, database.url, revision=FIRST)
    backend = await upgraded(database, resume_workflows_after=1)
    queue = Queue(backend, QUEUE)
    worker = make_worker(backend, QUEUE)
    working = asyncio.create_task(worker.work(register_signal_handlers=False))
    try:
        done = await ended(queue, flow)
    finally:
        worker._shutdown_event.set()
        await working
        await backend.disconnect()
    assert done.final_result == 112
