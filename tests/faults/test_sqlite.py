"""SQLite files that others have locked, that are full, or that cannot be written for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sheppy import BackendError
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import SqlBackend
from tests.contract.tasks import finished, ids, make_task, make_tasks
from tests.faults.cases import CASES, READS, A, B, store_one_of_each
from tests.faults.load import Load
from tests.support.databases import TestDatabase
from tests.support.processes import Child, Spawner

MakeBackend = Callable[..., Awaitable[SqlBackend]]

PATIENCE = 60.0  # seconds, a ceiling for what takes a few
AT_ONCE = 5.0  # seconds, a ceiling for what must not be waited out
QUEUE = "q"
LOCKER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked")
time.sleep(float(sys.argv[2]))
connection.execute("COMMIT")
print("unlocked")
"""


@pytest.fixture
def database(sqlite_database: TestDatabase) -> TestDatabase:
    return sqlite_database


def path_of(database: TestDatabase) -> str:
    return database.url.partition("///")[2]


async def lock(spawn: Spawner, database: TestDatabase, seconds: float) -> Child:
    """Another program in a transaction that writes, for so long."""
    child = spawn.script(LOCKER, path_of(database), str(seconds))
    await asyncio.to_thread(child.wait_for, "locked")
    return child


@pytest.mark.parametrize(
    "seconds",
    [
        3.0,
        # Beyond SQLite's own patience, the busy timeout.
        pytest.param(8.0, marks=pytest.mark.torture),
        pytest.param(30.0, marks=pytest.mark.torture),
    ],
)
async def test_file_that_another_program_has_locked_is_waited_for(
    seconds: float, database: TestDatabase, make_backend: MakeBackend, spawn: Spawner
) -> None:
    backend, second = await make_backend(), await make_backend()
    await store_one_of_each(backend, "read")
    for case in CASES:
        for queue in (str(case), f"calm {case}"):
            await case.set_up(second if case.unclaimed else backend, queue)
    expected = [
        await case.call(second if case.unclaimed else backend, f"calm {case}") for case in CASES
    ]
    child = await lock(spawn, database, seconds)
    calls = [
        asyncio.ensure_future(case.call(second if case.unclaimed else backend, str(case)))
        for case in CASES
    ]
    reads = [read(backend, "read") for read in READS.values()]
    # Readers do not wait for writers.
    assert all(await asyncio.wait_for(asyncio.gather(*reads), PATIENCE))
    answers = await asyncio.wait_for(asyncio.gather(*calls), seconds + PATIENCE)
    assert child.stdout.split() == ["locked", "unlocked"]
    assert answers == expected


async def test_file_that_is_locked_again_and_again_under_load_is_no_callers_concern(
    database: TestDatabase, make_backend: MakeBackend, spawn: Spawner
) -> None:
    backends = [await make_backend() for _ in range(2)]
    async with Load(backends, backends, QUEUE) as load:
        for _ in range(4):
            child = await lock(spawn, database, 0.3)
            await load.progress()
            assert await asyncio.to_thread(child.wait) == 0


class Pragma:
    """A pragma that an engine's connections get while it is set, as each transaction begins."""

    def __init__(self, statement: str, normal: str) -> None:
        self._statement = statement
        self._normal = normal
        self._on = False

    def listen(self, engine: Any) -> None:
        event.listen(engine.sync_engine, "checkout", self._apply)

    @contextmanager
    def applied(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _apply(self, connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(self._statement if self._on else self._normal)
        cursor.close()


async def connected(engine: Any) -> SqlBackend:
    backend = SqlBackend(engine)
    await backend.connect()
    return backend


async def test_full_disk_is_an_error_after_which_nothing_is_missing_or_doubled(
    database: TestDatabase,
) -> None:
    [(pages,)] = await database.fetch("PRAGMA page_count")
    full = Pragma(f"PRAGMA max_page_count = {pages + 20}", "PRAGMA max_page_count = 1000000")
    engine = create_async_engine(database.url)
    full.listen(engine)
    backend = await connected(engine)
    await backend.append(QUEUE, [A])
    [held] = await backend.pop(QUEUE)
    added: list[str] = []

    async def add_for_ever() -> None:
        while True:
            task = make_task(f"{len(added):04}", padding="x" * 5_000)
            await asyncio.wait_for(backend.append(QUEUE, [task]), AT_ONCE)
            added.append(task["id"])

    with full.applied():
        with pytest.raises(BackendError, match=r"^Failed to append tasks: .*disk is full"):
            await add_for_ever()
        refused = make_task(f"{len(added):04}", padding="x" * 5_000)
        assert added
        # Reading and what needs no room go on.
        assert await backend.size(QUEUE) == len(added)
        big = finished(held, result="x" * 200_000)
        with pytest.raises(BackendError, match=r"^Failed to store a result: .*disk is full"):
            await asyncio.wait_for(backend.store_result(QUEUE, big), AT_ONCE)
    assert ids(await backend.get_pending(QUEUE, 1000)) == added
    assert await backend.append(QUEUE, [refused]) == [True]
    assert ids(await backend.pop(QUEUE, 1000)) == [*added, refused["id"]]
    await backend.disconnect()
    await engine.dispose()


async def test_file_that_turns_read_only_under_load_is_an_error_and_no_loss(
    database: TestDatabase,
) -> None:
    read_only = Pragma("PRAGMA query_only = ON", "PRAGMA query_only = OFF")
    engine = create_async_engine(database.url)
    read_only.listen(engine)
    backend = await connected(engine)
    tasks = make_tasks(200)
    added: list[str] = []
    errors: list[BackendError] = []
    enough = asyncio.Event()

    async def add(some: list[dict[str, Any]]) -> None:
        for task in some:
            try:
                assert await backend.append(QUEUE, [task]) == [True]
            except BackendError as error:
                errors.append(error)
            else:
                added.append(task["id"])
            if len(added) > 20:
                enough.set()

    adding = [asyncio.ensure_future(add(tasks[start::4])) for start in range(4)]
    await asyncio.wait_for(enough.wait(), PATIENCE)
    with read_only.applied():
        with pytest.raises(BackendError, match=r"^Failed to append tasks: .*read-?only"):
            await asyncio.wait_for(backend.append(QUEUE, [B, make_task("refused")]), AT_ONCE)
        with pytest.raises(BackendError, match=r"^Failed to .*read-?only"):
            await asyncio.wait_for(backend.pop(QUEUE), AT_ONCE)
        assert await backend.size(QUEUE) >= len(added) > 20
    await asyncio.wait_for(asyncio.gather(*adding), PATIENCE)
    assert sorted(ids(await backend.pop(QUEUE, 1000))) == sorted(added)
    assert len(added) + len(errors) == len(tasks)
    assert await backend.get_tasks(QUEUE, ["refused"]) == {}
    await backend.disconnect()
    await engine.dispose()


async def test_connection_that_is_closed_under_a_backend_is_replaced(
    make_backend: MakeBackend,
) -> None:
    backend = await make_backend()
    calls: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
        (lambda: backend.append(QUEUE, [A, B]), [True, True]),
        (lambda: backend.size(QUEUE), 2),
        (lambda: backend.pop(QUEUE, 2), [A, B]),
        (lambda: backend.store_result(QUEUE, finished(A)), True),
        (lambda: backend.get_results(QUEUE, ["task-0"]), {"task-0": finished(A)}),
    ]
    for call, expected in calls:
        await backend.get_tasks(QUEUE, ["task-0"])
        for kept in backend._connected.database._connections._kept:
            driver: Any = kept.connection.driver_connection
            await driver.close()
        assert await asyncio.wait_for(call(), PATIENCE) == expected
