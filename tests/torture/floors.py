"""One of several processes that put tasks in line in every way there is, and take them.

    python -m tests.torture.floors URL NUMBER SECONDS

It ends after so many seconds and then as many more as it takes until nothing is left.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from sheppy import BackendError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql import SqlBackend, _floors
from sheppy_sql._stores import claims

QUEUE = "q"
PATIENCE = 30.0
"""Seconds until all is taken, once nothing is put in line any more."""


class Actor:
    def __init__(self, url: str, number: int, seconds: float) -> None:
        # What is left behind is to stay there.
        _floors.LONGEST_LIFE = 3600.0
        self.url = url
        self.number = number
        self.seconds = seconds
        self.ends_at = time.monotonic() + seconds
        self.random = random.Random(number)
        self.count = 0
        self.has_ended = False
        """Whether all acts but the taking have."""
        self.staying = SqlBackend(url)
        self.wavering = SqlBackend(url)
        self.engine: AsyncEngine = create_async_engine(url, poolclass=NullPool)

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.ends_at

    def new(self) -> dict[str, Any]:
        self.count += 1
        return {"id": f"{self.number}-{self.count}", "status": "pending", "finished_at": None}

    async def pause(self, most: float) -> None:
        await asyncio.sleep(self.random.random() * most)

    async def accept(self, task_ids: list[str]) -> None:
        async with self.engine.begin() as connection:
            for task_id in task_ids:
                await connection.execute(
                    text("INSERT INTO accepted (id) VALUES (:id)"), {"id": task_id}
                )

    async def append(self) -> None:
        while self.goes_on:
            tasks = [self.new() for _ in range(self.random.randint(1, 5))]
            if self.random.random() < 0.2:
                late = datetime.now(timezone.utc) - timedelta(seconds=self.random.randint(-1, 60))
                await self.staying.schedule(QUEUE, tasks[0], late)
                tasks = tasks[:1]
            else:
                await self.staying.append(QUEUE, tasks)
            await self.accept([task["id"] for task in tasks])
            await self.pause(0.05)

    async def append_in_transactions(self) -> None:
        while self.goes_on:
            async with self.engine.connect() as connection:
                transaction = await connection.begin()
                if self.random.random() < 0.5:
                    await connection.execute(text("SELECT pg_current_xact_id()"))
                await self.pause(0.5)
                bound = self.staying.bind(connection)
                await bound.connect()
                tasks = [self.new() for _ in range(2)]
                await bound.append(QUEUE, tasks)
                savepoint = await connection.begin_nested()
                more = [self.new()]
                await bound.append(QUEUE, more)
                if self.random.random() < 0.5:
                    await savepoint.rollback()
                else:
                    await savepoint.commit()
                    tasks += more
                for task in tasks:
                    await connection.execute(
                        text("INSERT INTO accepted (id) VALUES (:id)"), {"id": task["id"]}
                    )
                await self.pause(self.random.choice([0.01, 0.1, 2.0]))
                await (transaction.rollback if self.random.random() < 0.3 else transaction.commit)()

    async def take(self) -> None:
        while True:
            for task in await self.staying.pop_scheduled(QUEUE):
                await self.staying.append(QUEUE, [task], unique=False)
            for task in await self.staying.pop(QUEUE, self.random.randint(1, 8), timeout=0.05):
                chance = self.random.random()
                if chance < 0.05 and self.goes_on:
                    await self.staying.append(QUEUE, [task], unique=False)
                elif chance < 0.1 and self.goes_on:
                    late = datetime.now(timezone.utc) - timedelta(seconds=30)
                    await self.staying.schedule(QUEUE, task, late, unique=False)
                else:
                    await self.staying.store_result(QUEUE, {**task, "finished_at": "now"})
            if self.has_ended and await self.is_done():
                return
            if time.monotonic() > self.ends_at + PATIENCE:
                raise TimeoutError("tasks were left behind")

    async def is_done(self) -> bool:
        async with self.engine.connect() as connection:
            left = await connection.scalar(
                text(
                    "SELECT count(*) FROM accepted WHERE id NOT IN (SELECT id FROM sheppy_results)"
                )
            )
        return bool(left == 0)

    async def take_and_hand_back(self) -> None:
        """Under the feet of those who have passed it.

        By an instance that stays: a new one would begin at the ground, and find what is lost.
        """
        await self.wavering.connect()
        session = self.wavering._connected
        while self.goes_on:
            await self.wavering.pop(QUEUE, 5, timeout=0.5)
            await self.pause(0.5)
            await session.database.write(
                "hand back tasks", claims.release, session.consumer._owner, None
            )

    async def claim_and_abort(self) -> None:
        while self.goes_on:
            async with self.engine.connect() as connection:
                await connection.execute(
                    text(
                        "UPDATE sheppy_tasks SET state = 'claimed' WHERE (queue, id) IN (SELECT"
                        " queue, id FROM sheppy_tasks WHERE state = 'pending' LIMIT 3"
                        " FOR UPDATE SKIP LOCKED)"
                    )
                )
                await self.pause(0.3)
                await connection.rollback()
            await self.pause(0.3)

    async def hold(self) -> None:
        """Old snapshots, and transactions with ids that do nothing for long."""
        while self.goes_on:
            async with self.engine.connect() as connection:
                if self.random.random() < 0.5:
                    await connection.execution_options(isolation_level="REPEATABLE READ")
                    await connection.execute(text("SELECT count(*) FROM accepted"))
                else:
                    await connection.execute(text("SELECT pg_current_xact_id()"))
                await self.pause(3)
                await connection.rollback()

    async def kill(self) -> None:
        """Break a connection now and then, which may be at a claim.

        Not to the end, as the next one begins at the ground.
        """
        ends_at = self.ends_at - self.seconds / 2
        while time.monotonic() < ends_at:
            await self.pause(6)
            async with self.engine.connect() as connection:
                await connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND query LIKE '%picked_0%'"
                        " AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1"
                    )
                )

    async def run(self) -> None:
        await self.staying.connect()
        acts = [
            self.append,
            self.append_in_transactions,
            self.take_and_hand_back,
            self.claim_and_abort,
            self.hold,
        ]
        if self.number == 0:
            acts.append(self.kill)
        taking = asyncio.create_task(self.repeat(self.take))
        await asyncio.gather(*(self.repeat(act) for act in acts))
        self.has_ended = True
        await taking
        await self.staying.disconnect()
        await self.wavering.disconnect()

    async def repeat(self, act: Callable[[], Awaitable[None]]) -> None:
        """An act, whose own connection may be the one that is broken."""
        while await self.is_broken(act):
            pass

    async def is_broken(self, act: Callable[[], Awaitable[None]]) -> bool:
        try:
            await act()
        except (DBAPIError, BackendError) as error:
            if "terminating connection" not in str(error):
                raise
            return True
        return False


if __name__ == "__main__":
    asyncio.run(Actor(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run())
