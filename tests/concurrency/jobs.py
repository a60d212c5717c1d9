"""A task that leaves a trace outside the queue, and the process that works it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sheppy import Worker, task

from sheppy_sql import SqlBackend

TRACES = "TRACES"


@task
async def trace(number: int) -> int:
    """Writes its number to its process's file: a second run would be a second line."""
    with (Path(os.environ[TRACES]) / str(os.getpid())).open("a") as file:
        file.write(f"{number}\n")
    return number


def traces(directory: Path) -> list[int]:
    """What ran, in all processes, once for each run."""
    return sorted(int(line) for file in directory.iterdir() for line in file.read_text().split())


async def work(url: str, queue: str, stop: str) -> None:
    """A worker, until a file of the name `stop` exists."""
    backend = SqlBackend(url)
    worker = Worker(queue, backend, max_concurrent_tasks=32)
    working = asyncio.create_task(worker.work(register_signal_handlers=False))
    # Once at least: it is only told to stop after it has begun, which forgets that it was told.
    await asyncio.wait([working], timeout=0.1)
    while not working.done() and not Path(stop).exists():
        await asyncio.wait([working], timeout=0.1)
    worker._shutdown_event.set()
    await working
    await backend.disconnect()
