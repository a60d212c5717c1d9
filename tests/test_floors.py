"""Nothing stays behind below a floor, whenever and by whomever it was put in line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql import SqlBackend, _floors
from sheppy_sql._floors import Floors, Seen
from tests.support.databases import TestDatabase

MakeBackend = Callable[..., Awaitable[SqlBackend]]
QUEUE = "q"
NOW = datetime.now(timezone.utc)
LATE = NOW - timedelta(hours=1)


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


@pytest.fixture
async def engine(database: TestDatabase) -> AsyncIterator[AsyncEngine]:
    """An application's."""
    engine = create_async_engine(database.url, poolclass=NullPool)
    yield engine
    await engine.dispose()


def named(*ids: str) -> list[dict[str, Any]]:
    return [{"id": task_id} for task_id in ids]


def start(backend: SqlBackend) -> int:
    """Where the backend's next look begins; found out by the last one."""
    return backend._connected.consumer._taker._floors._kept[QUEUE].floor.start


async def empty(backend: SqlBackend) -> None:
    """Take all there is, and raise the floor above it."""
    while await backend.pop(QUEUE, 100):
        pass


async def position(database: TestDatabase, task_id: str) -> int:
    [(found,)] = await database.fetch(
        "SELECT position FROM sheppy_tasks WHERE id = :id", id=task_id
    )
    return int(found)


async def test_task_committed_late_is_taken(
    backend: SqlBackend, engine: AsyncEngine, database: TestDatabase
) -> None:
    async with engine.connect() as connection, connection.begin() as transaction:
        bound = backend.bind(connection)
        await bound.connect()
        await bound.append(QUEUE, named("late"))
        async with connection.begin_nested():
            await bound.append(QUEUE, named("in a savepoint"))
        await backend.append(QUEUE, named("soon"))
        await empty(backend)
        await empty(backend)
        await transaction.commit()
    assert await position(database, "late") < start(backend)
    assert await backend.pop(QUEUE, 10) == named("late", "in a savepoint")


async def test_transaction_that_wrote_before_and_adds_later_loses_nothing(
    backend: SqlBackend, engine: AsyncEngine
) -> None:
    async with engine.connect() as connection, connection.begin() as transaction:
        # From here on it has an id, below that of all that follows.
        await connection.execute(text("SELECT pg_current_xact_id()"))
        for number in range(5):
            await backend.append(QUEUE, named(f"{number}"))
            await empty(backend)
        bound = backend.bind(connection)
        await bound.connect()
        await bound.append(QUEUE, named("late"))
        await backend.append(QUEUE, named("soon"))
        await empty(backend)
        await transaction.commit()
    assert await backend.pop(QUEUE, 10) == named("late")


async def test_task_that_is_handed_back_is_taken_by_whoever_had_passed_it(
    make_backend: MakeBackend, database: TestDatabase
) -> None:
    leaving, staying = await make_backend(), await make_backend()
    await leaving.append(QUEUE, named("a", "b", "c"))
    assert await leaving.pop(QUEUE) == named("a")
    await empty(staying)
    assert await position(database, "a") < start(staying)
    await leaving.disconnect()
    assert await staying.pop(QUEUE, 10) == named("a")


async def test_claim_that_is_rolled_back_leaves_its_task_within_reach(
    backend: SqlBackend, engine: AsyncEngine
) -> None:
    await backend.append(QUEUE, named("a", "b"))
    async with engine.connect() as connection, connection.begin() as transaction:
        await connection.execute(
            text("UPDATE sheppy_tasks SET state = 'claimed', owner = 'x' WHERE id = 'a'")
        )
        assert await backend.pop(QUEUE, 10) == named("b")
        await empty(backend)
        await transaction.rollback()
    assert await backend.pop(QUEUE, 10) == named("a")


async def test_task_that_is_written_to_while_it_is_taken_is_taken(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await backend.append(QUEUE, named("a"))
    stop = asyncio.Event()

    async def rewrite() -> None:
        while not stop.is_set():
            await database.execute(
                "UPDATE sheppy_tasks SET payload = payload WHERE state = 'pending'"
            )

    rewriting = asyncio.create_task(rewrite())
    taken: list[dict[str, Any]] = []
    for _ in range(50):
        # Locked by the other at times, and then passed over.
        while not (found := await backend.pop(QUEUE)):
            pass
        taken += found
        await backend.append(QUEUE, named("a"), unique=False)
    stop.set()
    await rewriting
    assert taken == named("a") * 50


async def test_what_an_older_release_hands_back_is_found_in_time(
    backend: SqlBackend, database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_floors, "LONGEST_LIFE", 0.5)
    await backend.append(QUEUE, named("a", "b"))
    assert await backend.pop(QUEUE, 10) == named("a", "b")
    await empty(backend)
    await database.execute("UPDATE sheppy_tasks SET state = 'pending', owner = NULL")
    assert await backend.pop(QUEUE, 10, timeout=30) == named("a", "b")


async def test_suspect_does_not_hold_the_floor(backend: SqlBackend, database: TestDatabase) -> None:
    await backend.append(QUEUE, named("suspect", "a", "b"))
    await database.execute("UPDATE sheppy_tasks SET crashes = 1 WHERE id = 'suspect'")
    assert await backend.pop(QUEUE) == named("a")
    assert await position(database, "suspect") < start(backend)


async def test_first_in_first_out_below_and_above_the_floor(
    make_backend: MakeBackend,
) -> None:
    leaving, staying = await make_backend(), await make_backend()
    await leaving.append(QUEUE, named(*"abcdef"))
    assert await leaving.pop(QUEUE, 3) == named(*"abc")
    assert await staying.pop(QUEUE) == named("d")
    await leaving.disconnect()
    assert await staying.pop(QUEUE, 2) == named("a", "b")
    assert await staying.pop(QUEUE, 10) == named("c", "e", "f")


async def test_what_is_scheduled_for_the_past_is_due(
    backend: SqlBackend, engine: AsyncEngine
) -> None:
    assert await backend.pop_scheduled(QUEUE) == []
    await backend.schedule(QUEUE, {"id": "past"}, LATE)
    assert await backend.pop_scheduled(QUEUE) == named("past")
    async with engine.connect() as connection, connection.begin() as transaction:
        bound = backend.bind(connection)
        await bound.connect()
        await bound.schedule(QUEUE, {"id": "late"}, LATE)
        assert await backend.pop_scheduled(QUEUE) == []
        assert await backend.pop_scheduled(QUEUE) == []
        await transaction.commit()
    assert await backend.pop_scheduled(QUEUE) == named("late")


async def test_moved_schedule_is_found_where_it_went(backend: SqlBackend) -> None:
    await backend.schedule(QUEUE, {"id": "a"}, NOW + timedelta(days=1))
    assert await backend.pop_scheduled(QUEUE) == []
    await backend.schedule(QUEUE, {"id": "a"}, LATE, unique=False)
    assert await backend.pop_scheduled(QUEUE) == named("a")


async def test_time_that_is_given_may_go_back_and_forth(backend: SqlBackend) -> None:
    for hours in (-3, -1, 1, 3):
        await backend.schedule(QUEUE, {"id": f"{hours}"}, NOW + timedelta(hours=hours))
    assert await backend.pop_scheduled(QUEUE, NOW + timedelta(hours=2)) == named("-3", "-1", "1")
    for hours in (-3, -1):
        await backend.schedule(
            QUEUE, {"id": f"{hours}"}, NOW + timedelta(hours=hours), unique=False
        )
    assert await backend.pop_scheduled(QUEUE, NOW - timedelta(hours=2)) == named("-3")
    assert await backend.pop_scheduled(QUEUE) == named("-1")
    assert await backend.pop_scheduled(QUEUE, NOW + timedelta(hours=4)) == named("3")


async def test_nothing_due_costs_no_transaction_that_writes(
    backend: SqlBackend, database: TestDatabase
) -> None:
    await backend.schedule(QUEUE, {"id": "a"}, NOW + timedelta(days=1))
    next_id = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    taken = []
    for _ in range(5):
        [(before,)] = await database.fetch(next_id)
        for _ in range(20):
            assert await backend.pop_scheduled(QUEUE) == []
            assert await backend.pop(QUEUE) == []
        [(after,)] = await database.fetch(next_id)
        taken.append(after - before)
    # Others may work on the same server, now and then; forty of ours would show each time.
    assert min(taken) < 20


class Server:
    """Connections, as far as floors look at them."""

    def connect(self) -> AsyncConnection:
        return cast("AsyncConnection", SimpleNamespace(sync_connection=SimpleNamespace(info={})))


def look(floors: Floors[int], connection: AsyncConnection, snapshot: str, start: int = 1) -> int:
    """The id from which one look took notice of transactions, before it saw the snapshot."""
    one = floors.look(QUEUE)
    before = one.begin(connection).next_xid
    one.saw(Seen(start, snapshot, None))
    one.keep()
    return before


def test_floor_ends_with_its_time() -> None:
    now = 0.0
    floors = Floors(0, lambda: now)
    connection = Server().connect()
    assert look(floors, connection, "5:5:") == 0
    now = 30.0
    assert look(floors, connection, "6:6:") == 5
    now = 61.0
    assert look(floors, connection, "7:7:") == 0


def test_floor_ends_with_a_new_connection() -> None:
    floors = Floors(0)
    first, second = Server().connect(), Server().connect()
    look(floors, first, "5:5:")
    assert look(floors, first, "6:6:") == 5
    assert look(floors, second, "7:7:") == 0
    assert look(floors, first, "8:8:") == 7
    # Of an answer from before nothing is kept.
    late = floors.look(QUEUE)
    late.begin(first)
    look(floors, Server().connect(), "9:9:")
    late.saw(Seen(1, "50:50:", None))
    late.keep()
    assert look(floors, first, "10:10:") == 9


def test_floor_ends_where_ids_go_backwards() -> None:
    floors = Floors(0)
    connection = Server().connect()
    look(floors, connection, "50:50:")
    assert look(floors, connection, "7:7:") == 50
    assert look(floors, connection, "8:8:") == 0


def test_of_two_looks_at_a_time_the_later_snapshot_counts_as_a_whole() -> None:
    floors = Floors(0)
    connection = Server().connect()
    early, late = floors.look(QUEUE), floors.look(QUEUE)
    early.begin(connection)
    late.begin(connection)
    early.saw(Seen(70, "5:9:5,7", None))
    late.saw(Seen(60, "7:12:7", None))
    late.keep()
    early.keep()
    floor = floors.look(QUEUE).begin(connection)
    assert (floor.start, floor.next_xid, floor.running) == (60, 12, (7,))


def test_look_that_was_not_kept_moves_nothing() -> None:
    floors = Floors(0)
    connection = Server().connect()
    one = floors.look(QUEUE)
    one.begin(connection)
    one.saw(Seen(1, "5:5:", None))
    assert floors.look(QUEUE).begin(connection).next_xid == 0  # the ground


def test_own_transaction_counts_as_running_only_where_it_began_before() -> None:
    assert Seen(1, "5:9:5", 7).floor.running == (5, 7)
    assert Seen(1, "5:9:5", 9).floor.running == (5,)
