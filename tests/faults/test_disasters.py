"""Long tests: servers that restart, stay away or are replaced under sheppy's own workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sheppy_sql import migrate
from tests.concurrency import jobs as workers
from tests.faults import jobs
from tests.faults.load import until
from tests.support.databases import TestDatabase
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer
    from tests.support.processes import Child, Spawner

MakeServer = Callable[..., "PostgresServer"]

QUEUE = "q"
WORKERS = 2
APART = 1_000_000  # between the numbers of two producers
OUTAGE = 20.0  # seconds


class Crew:
    """A process that adds tasks and two of sheppy's workers, and what became of it all."""

    def __init__(self, spawn: Spawner, directory: Path, url: str) -> None:
        self._spawn = spawn
        self._directory = directory
        self._url = url
        self._traces = directory / "ran"
        self._traces.mkdir()
        self._end = directory / "end"
        self._producers: list[tuple[int, Child, Path]] = []
        self._workers: list[Child] = []

    def hire(self) -> None:
        environment = {workers.TRACES: str(self._traces)}
        self._workers = [
            self._spawn(workers.work, self._url, QUEUE, str(self._end), env=environment)
            for _ in range(WORKERS)
        ]
        self.produce()

    def produce(self) -> None:
        """One more process that adds tasks."""
        first = len(self._producers) * APART
        stop = self._directory / f"stop-{first}"
        child = self._spawn(jobs.produce, self._url, QUEUE, str(first), str(stop))
        self._producers.append((first, child, stop))

    def check(self) -> None:
        """All processes still run."""
        for child in self.children:
            assert child.returncode is None, child.report()

    @property
    def children(self) -> list[Child]:
        return [*self._workers, *(child for _, child, _ in self._producers)]

    def ran(self) -> int:
        return len(workers.traces(self._traces))

    async def arrive(self, database: TestDatabase) -> None:
        """Return once every worker has got through to the database: before, an outage ends it."""

        async def all_here() -> bool:
            self.check()
            known = await database.fetch("SELECT count(*) FROM sheppy_consumers")
            return known == [(len(self._workers),)]

        await until(all_here, "not all workers come")

    async def progress(self, tasks: int = 30) -> None:
        """Return once that many more tasks have run."""
        target = self.ran() + tasks

        async def moved() -> bool:
            self.check()
            return self.ran() >= target

        await until(moved, "no task runs any more")

    async def finish(self, database: TestDatabase) -> None:
        """Stop adding, let the workers end what there is, and check that all has run once."""
        self.check()
        added: list[int] = []
        for first, child, stop in self._producers:
            stop.touch()
            assert await asyncio.to_thread(child.wait, 120) == 0, child.report()
            last = int(child.stdout.split()[-1])
            added += range(first, last + 1)

        async def done() -> bool:
            for child in self._workers:
                assert child.returncode is None, child.report()
            return await database.fetch("SELECT count(*) FROM sheppy_tasks") == [(0,)]

        await until(done, "tasks are left")
        self._end.touch()
        for child in self._workers:
            assert await asyncio.to_thread(child.wait, 60) == 0, child.report()
        sql = "SELECT status, count(*) FROM sheppy_results GROUP BY status"
        assert await database.fetch(sql) == [("completed", len(added))]
        assert workers.traces(self._traces) == added
        for child in self._workers:
            assert "Failed to" not in child.stderr, child.report()


@asynccontextmanager
async def crew_on(
    url: str, database: TestDatabase, spawn: Spawner, directory: Path
) -> AsyncIterator[Crew]:
    crew = Crew(spawn, directory, url)
    crew.hire()
    await crew.arrive(database)
    await crew.progress()
    yield crew
    await crew.progress()
    await crew.finish(database)


async def start(make: MakeServer) -> tuple[PostgresServer, TestDatabase]:
    server = await asyncio.to_thread(make, {"fsync": False})
    await asyncio.to_thread(migrate.upgrade, server.url())
    return server, TestDatabase(server.url(), "postgresql")


@pytest.mark.torture
@pytest.mark.timeout(400)
async def test_server_that_crashes_again_and_again_costs_no_task(
    private_server: MakeServer, spawn: Spawner, tmp_path: Path
) -> None:
    server, database = await start(private_server)
    async with crew_on(server.url(), database, spawn, tmp_path) as crew:
        for _ in range(3):
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            await crew.progress(100)


async def stop_and_start(server: PostgresServer, _: Proxy, crew: Crew) -> None:
    await asyncio.to_thread(server.stop)
    await endure(crew)
    await asyncio.to_thread(server.start)


async def refuse_and_accept(_: PostgresServer, proxy: Proxy, crew: Crew) -> None:
    proxy.refuse()
    proxy.cut()
    await endure(crew)
    await proxy.accept()


async def stall_and_cut(_: PostgresServer, proxy: Proxy, crew: Crew) -> None:
    """As where a machine has vanished: nothing is closed, and nothing comes."""
    proxy.stall()
    await endure(crew)
    proxy.cut()
    proxy.resume()


async def stall_and_resume(_: PostgresServer, proxy: Proxy, crew: Crew) -> None:
    proxy.stall()
    await endure(crew)
    proxy.resume()


async def endure(crew: Crew) -> None:
    """An outage of OUTAGE seconds, in which no process ends."""
    clock = asyncio.get_running_loop().time
    over = clock() + OUTAGE

    async def passed() -> bool:
        crew.check()
        return clock() > over

    await until(passed, "time stands still")


@pytest.mark.torture
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "outage",
    [stop_and_start, refuse_and_accept, stall_and_cut, stall_and_resume],
    ids=lambda outage: outage.__name__,
)
async def test_workers_outlast_a_long_outage(
    outage: Callable[..., object], private_server: MakeServer, spawn: Spawner, tmp_path: Path
) -> None:
    server, database = await start(private_server)
    async with Proxy(server.url()) as proxy:
        async with crew_on(proxy.url, database, spawn, tmp_path) as crew:
            await outage(server, proxy, crew)  # type: ignore[misc]  # each is a coroutine function
            crew.produce()


@pytest.mark.torture
@pytest.mark.timeout(400)
@pytest.mark.parametrize("order", ["old one killed first", "new one promoted first"])
async def test_replica_that_is_promoted_has_all_tasks(
    order: str, private_server: MakeServer, spawn: Spawner, tmp_path: Path
) -> None:
    """Synchronous replication: what was confirmed is on both."""
    primary, database = await start(private_server)
    standby = await asyncio.to_thread(primary.make_standby, {"synchronous_standby_names": ""})
    await database.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await database.execute("SELECT pg_reload_conf()")

    async def in_step() -> bool:
        sql = "SELECT sync_state FROM pg_stat_replication"
        return await database.fetch(sql) == [("sync",)]

    await until(in_step, "the standby does not follow")
    url = (
        f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/postgres"
        "?target_session_attrs=read-write"
    )
    async with crew_on(url, TestDatabase(standby.url(), "postgresql"), spawn, tmp_path) as crew:
        if order == "new one promoted first":
            await asyncio.to_thread(standby.promote)
            await asyncio.to_thread(primary.kill)
        else:
            await asyncio.to_thread(primary.kill)
            await asyncio.to_thread(standby.promote)
        await crew.progress(100)
        crew.produce()


@pytest.mark.torture
@pytest.mark.timeout(400)
async def test_address_that_moves_to_another_server_is_followed(
    private_server: MakeServer, spawn: Spawner, tmp_path: Path
) -> None:
    """A switch-over as cloud providers do it; the old primary lives on as a reader."""
    primary, database = await start(private_server)
    standby = await asyncio.to_thread(primary.make_standby, {"synchronous_standby_names": ""})
    await database.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    await database.execute("SELECT pg_reload_conf()")

    async def in_step() -> bool:
        sql = "SELECT sync_state FROM pg_stat_replication"
        return await database.fetch(sql) == [("sync",)]

    await until(in_step, "the standby does not follow")
    on_standby = TestDatabase(standby.url(), "postgresql")
    async with Proxy(primary.url()) as proxy:
        async with crew_on(proxy.url, on_standby, spawn, tmp_path) as crew:
            # Stopped in order, so that the standby gets the last of it.
            await asyncio.to_thread(primary.stop)
            await asyncio.to_thread(standby.promote)
            primary.install_files({"standby.signal": b""})
            await asyncio.to_thread(primary.start)
            # Until the address has moved, connections lead to what only reads now.
            turned = proxy.accepted

            async def tried() -> bool:
                crew.check()
                return proxy.accepted > turned + 5

            await until(tried, "nobody looks for the server")
            proxy.lead_to(standby.url())
            await crew.progress(100)
