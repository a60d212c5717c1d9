"""Processes that die in the middle of something, and the tasks that they were about to run."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from sheppy import CURRENT_TASK, Queue, Task, task
from sqlalchemy import Connection

from sheppy_sql import SqlBackend
from sheppy_sql._dialects import Dialect
from sheppy_sql._dialects.postgresql import PostgreSQL
from sheppy_sql._dialects.sqlite import SQLite
from tests.support import make_worker

DIRECTORY = "JOBS_DIRECTORY"
QUEUE = "test"
LEASE = 3.0  # seconds
LIMIT, PERIOD = "limit", 2.0  # seconds
SELF: Any = CURRENT_TASK
# Inherited by what a call starts, and by nothing else.
commits: ContextVar[str | None] = ContextVar("commits", default=None)


def runs() -> list[str]:
    """What ran, a name for each run."""
    file = Path(os.environ[DIRECTORY]) / "runs"
    return file.read_text().split() if file.exists() else []


def note(name: str) -> None:
    with (Path(os.environ[DIRECTORY]) / "runs").open("a") as file:
        file.write(f"{name}\n")


@task
async def once(name: str) -> str:
    note(name)
    return name


@task(retry=3, retry_delay=0.05)
async def at_second_attempt(name: str, self: Task = SELF) -> str:
    note(name)
    if self.retry_count == 0:
        raise RuntimeError("not yet")
    return name


@task(rate_limit={"max_rate": 1, "rate_period": PERIOD, "key": LIMIT})
async def limited(name: str) -> str:
    note(name)
    return name


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(method: str, moment: str) -> None:
    """Have this process killed by a call of a backend's method.

    `moment`: "before" or "after" the call, or "before the commit" or "after the commit" that it
    makes, of which nobody has heard then.
    """
    original: Callable[..., Awaitable[Any]] = getattr(SqlBackend, method)

    async def deadly(self: SqlBackend, *args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            die()
        elif moment != "after":
            commits.set(moment)
        outcome = await original(self, *args, **kwargs)
        # An empty one is only what an idle worker gets all the time.
        if outcome != []:
            die()
        return outcome

    setattr(SqlBackend, method, deadly)
    for dialect in (PostgreSQL, SQLite):
        watch_commits(dialect)


def watch_commits(dialect: type[Dialect]) -> None:
    """Let a transaction that writes, of the call in question, be the death of this process."""
    begin, commit = dialect.begin, Connection.commit
    deadly: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()

    def begin_deadly(
        self: Dialect, connection: Connection, *, write: bool, single: bool = False
    ) -> bool:
        # A statement that commits by itself has no moment before its commit; here it gets one.
        ends = begin(self, connection, write=write, single=False)
        moment = commits.get()
        if write and moment is not None:
            deadly[connection] = moment
        return ends

    def commit_deadly(self: Connection) -> None:
        moment = deadly.get(self)
        if moment == "before the commit":
            die()
        commit(self)
        if moment is not None:
            die()

    dialect.begin = begin_deadly  # type: ignore[method-assign]  # to be told of connections
    Connection.commit = commit_deadly  # type: ignore[method-assign]  # it is what dies


async def produce(url: str, task_id: str, call: str, moment: str) -> None:
    """Add, schedule or cancel a task, and die of it."""
    backend = SqlBackend(url)
    queue, task = Queue(backend, QUEUE), once("task")
    task.__dict__["id"] = UUID(task_id)
    await backend.connect()
    die_at({"add": "append"}.get(call, call), moment)
    if call == "add":
        await queue.add(task)
    elif call == "schedule":
        await queue.schedule(task, datetime.now(timezone.utc))
    else:
        await backend.cancel(QUEUE, task_id)


async def work(url: str, method: str, moment: str) -> None:
    """A worker that dies of a call of this method."""
    backend = SqlBackend(url, lease=LEASE)
    await backend.connect()
    # The slot is taken, so that tasks that it limits are put off.
    assert await backend.acquire_rate_limit(QUEUE, LIMIT, 1, PERIOD, "another") is None
    die_at(method, moment)
    await make_worker(backend, QUEUE).work()


async def take_over(url: str, task_id: str, moment: str) -> None:
    """What a worker of the next sheppy does with a stale task; it dies on the way."""
    backend = SqlBackend(url, lease=LEASE)
    await backend.connect()
    while not (stale := await backend.get_stale_messages(QUEUE, 0)):
        pass
    assert [task["id"] for task in stale] == [task_id]
    if moment == "before the result":
        die()
    now = datetime.now(timezone.utc).isoformat()
    retrying = {"status": "retrying", "retry_count": 0, "last_retry_at": now, "next_retry_at": now}
    await backend.store_result(QUEUE, {**stale[0], **retrying, "finished_at": None})
    die()
