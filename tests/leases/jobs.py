"""What the processes do that the tests kill, stop and stall."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from sheppy import CURRENT_TASK, Task, Worker, task

from sheppy_sql import SqlBackend

DIRECTORY = "JOBS_DIRECTORY"
SELF: Any = CURRENT_TASK


async def hold(url: str, queue: str, count: str, options: str = "{}") -> None:
    """Pop some tasks and keep them until killed."""
    backend = SqlBackend(url, **json.loads(options))
    await backend.connect()
    taken = await backend.pop(queue, int(count), timeout=20)
    print("holds", *(payload["id"] for payload in taken))
    await asyncio.Event().wait()


async def stall(url: str, queue: str, how: str, seconds: str, options: str) -> None:
    """Pop a task, be deaf for a while in some way, then store its result."""
    backend = SqlBackend(url, **json.loads(options))
    await backend.connect()
    [taken] = await backend.pop(queue, timeout=20)
    print("holds", taken["id"])
    if how == "computes":
        ends_at = time.monotonic() + float(seconds)
        while time.monotonic() < ends_at:
            sum(range(1000))
    elif how == "holds the interpreter's lock":
        # Unlike a function of CDLL, one of PyDLL keeps it.
        ctypes.PyDLL(None).usleep(int(float(seconds) * 1e6))
    elif how == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    print("goes on")
    await finish_late(backend, queue, taken)
    print("stored")
    await backend.disconnect()


async def finish_late(backend: SqlBackend, queue: str, taken: dict[str, Any]) -> None:
    """As the host's worker does: a result, or a retry in two calls."""
    if not taken.get("retries"):
        await backend.store_result(
            queue, {**taken, "finished_at": "late", "status": "completed", "result": "late"}
        )
        return
    now = datetime.now(timezone.utc)
    due = now + timedelta(seconds=0.01)
    retrying = {
        **taken,
        "status": "retrying",
        "config": {"retry": 3},
        "retry_count": 1,
        "finished_at": None,
        "last_retry_at": now.isoformat(),
        "next_retry_at": due.isoformat(),
    }
    await backend.store_result(queue, retrying)
    [stored] = (await backend.get_tasks(queue, [taken["id"]])).values()
    # What Queue.retry does to a task that has finished.
    again = {**stored, "finished_at": None, "next_retry_at": due.isoformat(), "status": "scheduled"}
    await backend.schedule(queue, again, due, unique=False)


@task
async def good(number: int, self: Task = SELF) -> int:
    # Long enough for a whole handful to be under way when the process is killed.
    await asyncio.sleep(0.02)
    note("good", f"{number} {os.getpid()}")
    return number


@task
async def poison() -> None:
    note("poison", str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)


def note(file: str, line: str) -> None:
    with (Path(os.environ[DIRECTORY]) / file).open("a") as out:
        out.write(f"{line}\n")


async def work(url: str, queue: str, concurrency: str, options: str = "{}") -> None:
    """A worker, until it is killed."""
    backend = SqlBackend(url, **json.loads(options))
    await Worker(queue, backend, max_concurrent_tasks=int(concurrency)).work()
