"""Migrations of tables that are in use: nobody waits long, and what was cut short is done again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from sheppy import BackendError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql import SqlBackend, _deployments, migrate
from sheppy_sql.schema import SCHEMA_VERSION
from tests.support.databases import Databases, TestDatabase

FIRST = "sheppy_sql_0001"
INDEX = "sheppy_tasks_suspect"
BUILDING = f"SELECT 1 FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONCURRENTLY {INDEX}%'"
WAITING = f"{BUILDING} AND wait_event_type = 'Lock' AND datname = current_database()"
APPEND = "INSERT INTO sheppy_tasks (queue, id, payload, state) VALUES ('q', '{}', '{{}}', 'idle')"
VALID = f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{INDEX}')"
PATIENCE = 60.0  # seconds


@pytest.fixture
def database(postgres_server: str, databases: Databases) -> Iterator[TestDatabase]:
    """One with the first release's tables, and a task in them."""
    with databases.postgresql(postgres_server, migrated=False) as database:
        migrate.upgrade(database.url, revision=FIRST)
        asyncio.run(database.execute(APPEND.format("first")))
        yield database


@contextlib.asynccontextmanager
async def transaction(database: TestDatabase, statement: str) -> AsyncIterator[AsyncConnection]:
    """One that has run `statement` and stays open."""
    engine = create_async_engine(database.url, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.execute(text(statement))
        yield connection


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async def holds() -> None:
        while not await condition():  # noqa: ASYNC110  # of the server
            await asyncio.sleep(0.02)

    await asyncio.wait_for(holds(), PATIENCE)


def upgrading(database: TestDatabase) -> asyncio.Task[None]:
    return asyncio.create_task(asyncio.to_thread(migrate.upgrade, database.url))


async def test_tasks_are_added_while_an_old_transaction_holds_up_an_index(
    database: TestDatabase,
) -> None:
    # With a snapshot, by which the server believes that it may still look into the table.
    async with transaction(database, "DECLARE c CURSOR FOR SELECT 1 FROM sheppy_queues"):
        upgrade = upgrading(database)
        await until(lambda: database.fetch(WAITING))
        # Another deployment meanwhile: the two must not wait for each other.
        second = upgrading(database)
        for number in range(5):
            await asyncio.wait_for(database.execute(APPEND.format(number)), 10)
        assert await database.fetch(WAITING)
        assert not upgrade.done()
    await asyncio.wait_for(asyncio.gather(upgrade, second), PATIENCE)
    assert await database.fetch(VALID) == [(True,)]
    backend = SqlBackend(database.url)
    await backend.connect()
    assert await backend.append("q", [{"id": "a"}]) == [True]
    await backend.disconnect()


async def test_columns_for_floors_are_added_without_writing_the_rows(
    database: TestDatabase,
) -> None:
    files = "SELECT relname, relfilenode FROM pg_class WHERE relname IN ({}) ORDER BY relname"
    files = files.format("'sheppy_tasks', 'sheppy_scheduled_tasks'")
    before = await database.fetch(files)
    await asyncio.to_thread(migrate.upgrade, database.url)
    assert await database.fetch(files) == before
    # One that has no id of its own would be found by none.
    [(first,)] = await database.fetch("SELECT pending_xid FROM sheppy_tasks")
    assert first > 0
    await database.execute(APPEND.format("second"))
    [(second,)] = await database.fetch("SELECT pending_xid FROM sheppy_tasks WHERE id = 'second'")
    assert second > first


async def test_index_whose_build_was_cut_short_is_built_again(database: TestDatabase) -> None:
    async with transaction(database, "DECLARE c CURSOR FOR SELECT 1 FROM sheppy_queues"):
        upgrade = upgrading(database)
        await until(lambda: database.fetch(WAITING))
        await database.execute(
            f"SELECT pg_cancel_backend(pid) FROM ({WAITING.replace('SELECT 1', 'SELECT pid')}) AS p"
        )
        with pytest.raises(BackendError, match="Failed to migrate the tables: canceling"):
            await upgrade
    assert await database.fetch(VALID) == [(False,)]
    position = await asyncio.to_thread(migrate.current, database.url)
    assert position == (FIRST, 1)
    await asyncio.to_thread(migrate.upgrade, database.url)
    assert await database.fetch(VALID) == [(True,)]
    assert len(await database.fetch("SELECT 1 FROM sheppy_tasks")) == 1


async def test_nobody_queues_for_long_behind_a_migration_that_waits(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_deployments, "LOCKED_PAUSE", 0.2)
    waits = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'ALTER TABLE%ADD COLUMN crashes%'"
    waits += " AND wait_event_type = 'Lock' AND datname = current_database()"
    async with transaction(database, "LOCK TABLE sheppy_tasks IN ROW EXCLUSIVE MODE"):
        upgrade = upgrading(database)
        await until(lambda: database.fetch(waits))
        await asyncio.wait_for(database.execute(APPEND.format("behind")), 20)
        assert not upgrade.done()
        # It goes on trying.
        await until(lambda: database.fetch(waits))
    await asyncio.wait_for(upgrade, PATIENCE)
    assert await database.fetch("SELECT version FROM sheppy_schema") == [(SCHEMA_VERSION,)]


async def test_migration_that_gets_no_lock_says_what_to_do(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_deployments, "LOCKED_GRACE", 0)
    async with transaction(database, "LOCK TABLE sheppy_tasks IN ROW EXCLUSIVE MODE"):
        with pytest.raises(BackendError) as caught:
            await asyncio.to_thread(migrate.upgrade, database.url)
    assert str(caught.value) == (
        "Failed to migrate the tables: canceling statement due to lock timeout (SQLSTATE 55P03); "
        "another transaction holds a lock: end it (pg_stat_activity shows it), then try again"
    )
    await asyncio.to_thread(migrate.upgrade, database.url)


async def test_lock_timeout_of_the_role_stays(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_deployments, "LOCKED_GRACE", 0)
    name = database.url.rpartition("/")[2]
    await database.execute(f"ALTER DATABASE {name} SET lock_timeout = '10ms'")
    async with transaction(database, "LOCK TABLE sheppy_tasks IN ROW EXCLUSIVE MODE"):
        # By ours the test would last too long.
        monkeypatch.setattr("sheppy_sql._revisions.LOCK_TIMEOUT", 1000)
        with pytest.raises(BackendError, match="lock timeout"):
            await asyncio.to_thread(migrate.upgrade, database.url)


async def test_index_within_the_callers_transaction_is_told_of(
    database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    backend = SqlBackend(database.url, migrate=True)
    with caplog.at_level(logging.WARNING, "sheppy_sql"):
        await backend.connect()
    await backend.disconnect()
    # Of the tables that have rows.
    assert [r.message for r in caplog.records if r.name == "sheppy_sql"] == [
        f"Index {index} is made inside the caller's transaction: nobody writes to sheppy_tasks "
        "meanwhile"
        for index in (INDEX, "sheppy_tasks_pending_xid")
    ]
    assert await database.fetch(VALID) == [(True,)]


def test_sql_of_live_tables_builds_indexes_beside_transactions(database: TestDatabase) -> None:
    script = migrate.sql(database.url, revision=f"{FIRST}:sheppy_sql_0002")
    assert script.index("COMMIT;") < script.index(f"CREATE INDEX CONCURRENTLY {INDEX}")
    assert script.count("SET LOCAL lock_timeout TO '2s'") == 2
    assert "CONCURRENTLY" not in migrate.sql(database.url)
