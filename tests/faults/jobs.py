"""A process that adds tasks all the time, for tests that disturb it; workers are elsewhere."""

from __future__ import annotations

from pathlib import Path

from sheppy import Queue

from sheppy_sql import SqlBackend
from tests.concurrency.jobs import trace


async def produce(url: str, name: str, first: str, stop: str) -> None:
    """Add one task after the other, from this number on, until a file of that name exists.

    Says "added" after each, and "last <number>" at the end.
    """
    backend = SqlBackend(url)
    queue = Queue(backend, name)
    number = int(first)
    while not Path(stop).exists():
        assert await queue.add(trace(number))
        print("added", number)
        number += 1
    await backend.disconnect()
    print("last", number - 1)
