"""Workers that are killed at random, and processes that get in each other's way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from sheppy import CURRENT_TASK, Task, Worker, task

from sheppy_sql import SqlBackend
from tests.support.breeding import keep_alive

DIRECTORY = "JOBS_DIRECTORY"
QUEUE = "torture"
LEASE = 5.0  # seconds
SELF: Any = CURRENT_TASK


def trace(self: Task) -> None:
    """One line for each run, in a file of this process."""
    with (Path(os.environ[DIRECTORY]) / str(os.getpid())).open("a") as file:
        file.write(f"{self.id}\n")


def traces(directory: Path) -> list[str]:
    """The ids of the tasks that ran, one for each run, but for a last line that was cut off."""
    texts = [file.read_text() for file in directory.iterdir()]
    return [line for text in texts for line in text.split("\n")[:-1]]


@task
async def brief(self: Task = SELF) -> None:
    trace(self)
    await asyncio.sleep(0.01)


@task(retry=3, retry_delay=0.1)
async def fails_once(self: Task = SELF) -> None:
    trace(self)
    await asyncio.sleep(0.01)
    if self.retry_count == 0:
        raise RuntimeError("the first time")


async def work(url: str) -> None:
    await Worker(QUEUE, SqlBackend(url, lease=LEASE)).work()


def breed(url: str, count: str) -> None:
    """Keep `count` workers alive."""
    keep_alive(int(count), lambda: asyncio.run(work(url)))


async def get_in_the_way(url: str, seed: str, seconds: str) -> None:
    """Call what writes to many rows, at random and all at once, on a few ids."""
    rng = random.Random(int(seed))
    backend = SqlBackend(url)
    await backend.connect()
    ends_at = time.monotonic() + float(seconds)
    calls = 0

    def tasks() -> list[dict[str, Any]]:
        ids = rng.sample(range(40), rng.randint(1, 20))
        return [{"id": str(number), "status": "new", "finished_at": None} for number in ids]

    async def finish() -> None:
        taken = await backend.pop(QUEUE, rng.randint(1, 10))
        rng.shuffle(taken)
        await asyncio.gather(
            *(backend.store_result(QUEUE, {**one, "finished_at": "now"}) for one in taken)
        )

    async def promote() -> None:
        due = await backend.pop_scheduled(QUEUE)
        await backend.append(QUEUE, [{**one, "status": "pending"} for one in due], unique=False)

    async def schedule() -> None:
        at = datetime.now(timezone.utc) + timedelta(seconds=rng.uniform(-1, 1))
        await backend.schedule(QUEUE, tasks()[0], at, unique=rng.random() < 0.5)

    async def one() -> None:
        nonlocal calls
        while time.monotonic() < ends_at:
            choice = rng.choice("aaffppsscdx")
            if choice == "a":
                await backend.append(QUEUE, tasks(), unique=rng.random() < 0.5)
            elif choice == "f":
                await finish()
            elif choice == "p":
                await promote()
            elif choice == "s":
                await schedule()
            elif choice == "c":
                await backend.cancel(QUEUE, tasks()[0]["id"])
            elif choice == "d":
                await backend.delete_task(QUEUE, tasks()[0]["id"])
            elif rng.random() < 0.1:
                await backend.clear(QUEUE)
            calls += 1

    await asyncio.gather(*(one() for _ in range(4)))
    await backend.disconnect()
    print("calls", calls)


async def cancel_soon(call: asyncio.Task[Any], rng: random.Random) -> Any:
    """Cancel a call at a random moment; its outcome where it was quicker."""
    for _ in range(rng.randint(0, 12)):
        await asyncio.sleep(0)
    if rng.random() < 0.5:
        await asyncio.wait([call], timeout=rng.choice([0.002, 0.01, 0.05]))
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await call
    return None
