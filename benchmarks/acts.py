"""What the measuring processes do; each call is one measurement, or one side of one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import asyncpg

from . import jobs
from .drivers import Driver, opened
from .drivers.raw import plain_url
from .hands import Cue
from .tally import Tally

WARM_UP = 200  # tasks, outside the clock
BULK = 1_000
COROUTINES = 64
BATCH = 100
DRAIN_TIMEOUT = 120.0  # seconds
HELD_TIMEOUT = 500.0  # seconds, for many more tasks


async def fill(driver: Driver, tasks: Sequence[Any]) -> None:
    """Enqueue tasks in bulk."""
    for start in range(0, len(tasks), BULK):
        await driver.add_many(tasks[start : start + BULK])


@contextlib.asynccontextmanager
async def working(
    driver: Driver, concurrency: int, tally: Tally | None = None
) -> AsyncIterator[None]:
    """A worker that runs inside the block; its failure ends the block."""
    worker = asyncio.ensure_future(driver.work(concurrency, tally))
    body = asyncio.current_task()
    assert body is not None
    stop: Callable[[], object] = body.cancel
    worker.add_done_callback(lambda _: stop())
    try:
        yield
    except asyncio.CancelledError:
        if worker.done():
            worker.result()
            raise RuntimeError("The worker has ended by itself") from None
        raise
    finally:
        if not worker.done():
            # However it ends now, that is no failure: some turn a cancellation into a return.
            stop = bool
            worker.cancel()
            await asyncio.wait([worker])


async def warm_up(driver: str, url: str, tally: Tally, concurrency: int, queue: str) -> None:
    """Work some tasks off in another queue of the store."""
    async with opened(driver, url, queue) as warm:
        await fill(warm, warm.build(WARM_UP))
        async with working(warm, concurrency, tally):
            await tally.reach(WARM_UP, DRAIN_TIMEOUT)


async def drain(
    cue: Cue,
    *,
    driver: str,
    url: str,
    tally: str,
    slot: int,
    count: int,
    concurrency: int,
    fills: bool,
    warm_tally: str,
) -> dict[str, float]:
    """Run tasks that were enqueued before, until all processes together have run them all."""
    await warm_up(driver, url, Tally(warm_tally, slot), concurrency, f"warm-{slot}")
    async with opened(driver, url, "measured") as queue:
        if fills:
            await fill(queue, queue.build(count))
        counted = Tally(tally, slot)
        begun = await cue.ready()
        async with working(queue, concurrency, counted):
            await counted.reach(count, DRAIN_TIMEOUT)
        return {"begun": begun, "ended": counted.last_at}


async def drain_held(
    cue: Cue,
    *,
    driver: str,
    url: str,
    tally: str,
    warm_tally: str,
    count: int,
    total: int,
    concurrency: int,
) -> dict[str, float]:
    """Tasks per second, of the first and of the last `count`, while a snapshot is held."""
    await warm_up(driver, url, Tally(warm_tally, 0), concurrency, "warm")
    counted, times = Tally(tally, 0), []
    held: Any = await asyncpg.connect(plain_url(url))
    try:
        async with opened(driver, url, "measured") as queue:
            await held.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await held.fetch("SELECT count(*) FROM pg_class")
            await fill(queue, queue.build(total))
            begun = await cue.ready()
            async with working(queue, concurrency, counted):
                for target in (count, total - count, total):
                    await counted.reach(target, HELD_TIMEOUT)
                    times.append(time.monotonic())
    finally:
        await held.close()
    return {"first": count / (times[0] - begun), "last": count / (times[2] - times[1])}


async def drain_backend(cue: Cue, *, driver: str, url: str, count: int) -> float:
    """Tasks per second: pop 100, then 100 concurrent store_result."""
    async with opened(driver, url, "measured") as queue:
        backend = queue.backend
        for queue_name, tasks in (("warm", WARM_UP), ("measured", count)):
            queue.queue.name = queue_name
            await fill(queue, queue.build(tasks))
            begun = await cue.ready() if queue_name == "measured" else 0.0
            left = tasks
            while left:
                popped = await backend.pop(queue_name, BATCH)
                now = datetime.now(timezone.utc).isoformat()
                done = [{**task, "status": "completed", "finished_at": now} for task in popped]
                await asyncio.gather(*(backend.store_result(queue_name, task) for task in done))
                left -= len(done)
        return count / (time.monotonic() - begun)


async def enqueue(cue: Cue, *, driver: str, url: str, count: int, way: str) -> float:
    """Tasks per second, "one" by one, "together" from 64 coroutines, or in "bulk" of 1,000."""

    async def enqueue_all(queue: Driver, tasks: Sequence[Any]) -> None:
        if way == "bulk":
            await fill(queue, tasks)
            return
        waiting = iter(tasks)

        async def enqueue_some() -> None:
            for task in waiting:
                await queue.add(task)

        coroutines = COROUTINES if way == "together" else 1
        await asyncio.gather(*(enqueue_some() for _ in range(coroutines)))

    async with opened(driver, url, "measured") as queue:
        await enqueue_all(queue, queue.build(WARM_UP))
        tasks = queue.build(count)
        begun = await cue.ready()
        await enqueue_all(queue, tasks)
        return count / (time.monotonic() - begun)


async def idle_worker(
    cue: Cue, *, driver: str, url: str, concurrency: int = 10
) -> dict[str, float]:
    """Run a worker until told to stop; when each stamped task began, by its number."""
    jobs.STARTS.clear()
    async with opened(driver, url, "measured") as queue, working(queue, concurrency):
        await cue.ready()
        await cue.wait()
    return {str(number): began for number, began in jobs.STARTS.items()}


async def send(cue: Cue, *, driver: str, url: str, count: int, rate: float) -> list[float]:
    """Enqueue stamped tasks at a rate per second; when each was handed to the library."""
    sent: list[float] = []
    async with opened(driver, url, "measured") as queue:
        tasks = queue.build(count, stamped=True)
        due = await cue.ready()
        # Not in step with anybody's polling.
        chance = random.Random(count)
        for task in tasks:
            due += 2 * chance.random() / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent.append(time.monotonic())
            await queue.add(task)
    return sent


async def round_trips(cue: Cue, *, driver: str, url: str, count: int) -> list[float]:
    """Seconds from before add() to after wait_for(), one task after the other."""
    took: list[float] = []
    async with opened(driver, url, "measured") as queue:
        tasks = queue.build(count + 10)
        await cue.ready()
        for task in tasks:
            begun = time.monotonic()
            await queue.add(task)
            await queue.queue.wait_for(task, 30)
            took.append(time.monotonic() - begun)
    return took[10:]
