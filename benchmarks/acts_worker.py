"""Measurements of what a worker costs: memory, connections, an idle one's work for the server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from typing import Any

import psutil

from . import jobs
from .acts import BULK, DRAIN_TIMEOUT, fill, working
from .drivers import opened
from .hands import Cue
from .tally import Tally

LOOK = 0.02  # seconds between two looks at the connections


def connections(port: int) -> int:
    """How many connections this process has to a port."""
    found = psutil.Process().net_connections(kind="tcp")
    return sum(bool(each.raddr) and each.raddr.port == port for each in found)


async def memory(cue: Cue, *, driver: str, url: str, tally: str, steps: list[int]) -> list[int]:
    """Bytes that a worker's process holds after so many tasks."""
    counted, found = Tally(tally, 0), []
    async with opened(driver, url, "measured") as queue:
        await cue.ready()
        async with working(queue, 32, counted):
            done = 0
            for step in steps:
                while done < step:
                    # No long backlog, which a store in this process would hold.
                    size = min(BULK, step - done)
                    await queue.add_many(queue.build(size))
                    done += size
                    await counted.reach(done, DRAIN_TIMEOUT)
                gc.collect()
                found.append(psutil.Process().memory_info().rss)
    return found


async def busy_connections(
    cue: Cue, *, driver: str, url: str, tally: str, count: int, port: int
) -> int:
    """The most connections that a worker at concurrency 100 had, its queue's included."""
    counted, most = Tally(tally, 0), 0
    async with opened(driver, url, "measured") as queue:
        await fill(queue, [jobs.nap() for _ in range(count)])
        await cue.ready()
        async with working(queue, 100, counted):
            while counted.total() < count:
                most = max(most, connections(port))
                await asyncio.sleep(LOOK)
    return most


async def waiters(cue: Cue, *, driver: str, url: str, count: int, port: int) -> dict[str, float]:
    """When the last of so many concurrent wait_for() returned, and the connections they had."""
    async with opened(driver, url, "measured") as queue:
        tasks = queue.build(count)
        await fill(queue, tasks)
        waiting = [asyncio.ensure_future(queue.queue.wait_for(task, 120)) for task in tasks]
        await asyncio.sleep(1)  # until they all wait
        held = connections(port)
        await cue.ready()
        try:
            await asyncio.gather(*waiting)
        finally:
            for each in waiting:
                each.cancel()
        return {"answered": time.monotonic(), "connections": held}


async def finish(cue: Cue, *, driver: str, url: str, tally: str, count: int) -> float:
    """Run so many tasks; when the last result was stored."""
    counted = Tally(tally, 0)
    async with opened(driver, url, "measured") as queue:
        await cue.ready()
        async with working(queue, 32, counted):
            await counted.reach(count, DRAIN_TIMEOUT)
    return counted.last_at


async def idle(cue: Cue, *, driver: str, url: str, workers: int) -> None:
    """Run so many workers, each with a backend of its own, until told to stop."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(workers):
            queue: Any = await stack.enter_async_context(opened(driver, url, "measured"))
            await stack.enter_async_context(working(queue, 10))
        await asyncio.sleep(2)  # what is done at the start
        await cue.ready()
        await cue.wait()
