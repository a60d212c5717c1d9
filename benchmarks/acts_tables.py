"""Measurements on tables that are large, or full of dead rows; SqlBackend on PostgreSQL only."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from .drivers import opened
from .drivers.raw import plain_url
from .hands import Cue
from .statistics import percentile
from .tables import Filler

CLAIM = 32  # tasks
QUEUE = "measured"
SHORT = 60  # calls of each kind, of which the median counts


async def claims(
    cue: Cue, *, driver: str, url: str, backlog: int, finished: int, count: int
) -> float:
    """Tasks per second, claimed 32 at a time, `count` times, out of a backlog.

    The backlog and the finished results are made where they are missing, and vacuumed.
    """
    async with opened(driver, url, QUEUE) as queue:
        connection = await asyncpg.connect(plain_url(url))
        try:
            await _fill(connection, queue, backlog, finished)
            await queue.backend.pop(QUEUE, CLAIM)
            await cue.ready()
            return await _claim_rate(queue.backend, count)
        finally:
            await connection.close()


async def dead_rows(
    cue: Cue, *, driver: str, url: str, steps: list[int], count: int, holder: str
) -> list[dict[str, float]]:
    """Claims, short and empty pops, after so many tasks that vacuum could not clean up after.

    `holder`: what holds it back, a "snapshot" or a "write" transaction that stays open.
    """
    url_of_asyncpg = plain_url(url)
    async with opened(driver, url, QUEUE) as queue:
        connection = await asyncpg.connect(url_of_asyncpg)
        held = await asyncpg.connect(url_of_asyncpg)
        try:
            await queue.add_many(queue.build(1))
            model = await connection.fetchval("SELECT id FROM sheppy_tasks")
            filler = Filler(connection, QUEUE)
            await filler.remember("sheppy_tasks", model)
            await connection.execute("DELETE FROM sheppy_tasks")
            await connection.execute("CREATE TABLE neighbour (id int)")
            # Where nothing is held, before anything has been done.
            begin = "BEGIN ISOLATION LEVEL REPEATABLE READ"
            await held.execute(begin if holder == "snapshot" else "BEGIN")
            if holder == "snapshot":
                await held.fetch("SELECT count(*) FROM neighbour")
            else:
                await held.execute("INSERT INTO neighbour VALUES (1)")
            await cue.ready()
            done, measured = 0, []
            for step in steps:
                await filler.churn(step - done)
                done = step
                found = await _measure(queue.backend, filler, connection, count)
                measured.append({"dead": float(step), **found})
            return measured
        finally:
            await held.close()
            await connection.close()


async def _measure(backend: Any, filler: Filler, connection: Any, count: int) -> dict[str, float]:
    await filler.copy("sheppy_tasks", (count + 1) * CLAIM + SHORT)
    await backend.pop(QUEUE, CLAIM)
    rate = await _claim_rate(backend, count)
    short = await _median_time(lambda: backend.pop(QUEUE, 1), SHORT)
    await connection.execute("DELETE FROM sheppy_tasks WHERE queue = $1", QUEUE)
    return {
        "claims": rate,
        "short_pop": short,
        "empty_pop": await _median_time(lambda: backend.pop(QUEUE, 1), SHORT),
        "empty_pop_scheduled": await _median_time(lambda: backend.pop_scheduled(QUEUE), SHORT),
    }


async def _claim_rate(backend: Any, count: int) -> float:
    begun, claimed = time.monotonic(), 0
    for _ in range(count):
        claimed += len(await backend.pop(QUEUE, CLAIM))
    took = time.monotonic() - begun
    if claimed != count * CLAIM:
        raise RuntimeError(f"{claimed} of {count * CLAIM} tasks were claimed")
    return claimed / took


async def _median_time(call: Callable[[], Awaitable[object]], times: int) -> float:
    took = []
    for _ in range(times):
        begun = time.monotonic()
        await call()
        took.append(time.monotonic() - begun)
    return percentile(took, 50)


async def _fill(connection: Any, queue: Any, backlog: int, finished: int) -> None:
    await connection.execute(
        "DELETE FROM sheppy_tasks WHERE queue = $1 AND state <> 'pending'", QUEUE
    )
    filler = Filler(connection, QUEUE)
    there = await connection.fetchval("SELECT count(*) FROM sheppy_tasks WHERE queue = $1", QUEUE)
    if not there:
        await queue.add_many(queue.build(1))
        there = 1
    model = await connection.fetchval("SELECT max(id) FROM sheppy_tasks WHERE queue = $1", QUEUE)
    await filler.remember("sheppy_tasks", model)
    filler.skip(time.time_ns() // 1_000)
    await filler.copy("sheppy_tasks", backlog - there)
    results = await connection.fetchval(
        "SELECT count(*) FROM sheppy_results WHERE queue = $1", QUEUE
    )
    if results < finished:
        # One that the backend itself has finished.
        [task] = await queue.backend.pop(QUEUE, 1)
        await queue.backend.store_result(
            QUEUE, {**task, "status": "completed", "finished_at": task["created_at"]}
        )
        await filler.remember("sheppy_results", task["id"])
        await filler.copy("sheppy_results", finished - results)
    await connection.execute("VACUUM ANALYZE sheppy_tasks")
    await connection.execute("VACUUM ANALYZE sheppy_results")
