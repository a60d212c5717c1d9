"""Alembic: what the migrations make, who may run them, and what connect() thinks of it."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sheppy import BackendError
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import SqlBackend, migrate
from sheppy_sql.schema import build_tables, version_table
from tests.support.databases import Databases, TestDatabase
from tests.support.processes import Spawner

ROOT = Path(__file__).parents[1]

POSTGRESQL_CATALOG = """
    SELECT 'column', table_name, column_name, data_type, is_nullable, column_default,
           collation_name
    FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL
    SELECT 'index', tablename, indexname, indexdef, '', '', ''
    FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '', ''
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
    UNION ALL
    SELECT 'storage', relname, array_to_string(reloptions, ','), '', '', '', ''
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    UNION ALL
    SELECT 'sequence', sequencename, increment_by::text, start_value::text, '', '', ''
    FROM pg_sequences WHERE schemaname = 'public'
"""
SQLITE_CATALOG = """
    SELECT 'column', m.name, c.name, c.type, c."notnull", c.dflt_value, c.pk
    FROM sqlite_master AS m, pragma_table_xinfo(m.name) AS c WHERE m.type = 'table'
    UNION ALL
    SELECT 'index', m.name, i.name, i."unique", i.origin, c.seqno, c.name
    FROM sqlite_master AS m, pragma_index_list(m.name) AS i, pragma_index_xinfo(i.name) AS c
    WHERE m.type = 'table' AND c.key
    UNION ALL
    SELECT 'predicate', tbl_name, name, substr(sql, instr(sql, ' WHERE ')), '', '', ''
    FROM sqlite_master WHERE type = 'index' AND instr(sql, ' WHERE ')
"""


@pytest.fixture
def empty_postgres(postgres_server: str, databases: Databases) -> Iterator[TestDatabase]:
    """A fresh database without our tables, on each PostgreSQL server."""
    with databases.postgresql(postgres_server, migrated=False) as database:
        yield database


async def catalog(database: TestDatabase) -> set[tuple[Any, ...]]:
    """Everything the database knows of our tables, as plain rows."""
    query = SQLITE_CATALOG if database.dialect == "sqlite" else POSTGRESQL_CATALOG
    rows = {tuple(row) for row in await database.fetch(query)}
    return {row for row in rows if "alembic_version" not in row[1]}


async def test_migrations_and_schema_make_the_same_tables(
    empty_database: TestDatabase,
) -> None:
    migrate.upgrade(empty_database.url)
    migrated = await catalog(empty_database)
    migrate.downgrade(empty_database.url)
    assert await catalog(empty_database) == set()
    engine = create_async_engine(empty_database.url)
    async with engine.begin() as connection:
        await connection.run_sync(build_tables().metadata.create_all)
    await engine.dispose()
    created = await catalog(empty_database)
    assert created - migrated == set()
    assert migrated - created == set()
    assert len(created) > 60


async def test_upgrade_twice_changes_nothing(database: TestDatabase) -> None:
    before = await database.fetch("SELECT version, oldest_code, installation FROM sheppy_schema")
    migrate.upgrade(database.url)
    after = await database.fetch("SELECT version, oldest_code, installation FROM sheppy_schema")
    assert after == before
    assert len(after) == 1


async def test_two_upgrades_at_once_do_no_harm(empty_database: TestDatabase) -> None:
    with ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda _: migrate.upgrade(empty_database.url), range(6)))
    assert len(await empty_database.fetch("SELECT 1 FROM sheppy_schema")) == 1


async def test_two_processes_connecting_at_once_make_the_tables_once(
    empty_database: TestDatabase, spawn: Spawner
) -> None:
    source = """
import asyncio, sys
from sheppy_sql import SqlBackend

async def main(url):
    backend = SqlBackend(url, migrate=True)
    await backend.connect()
    await backend.append("q", [{"id": sys.argv[2]}])
    await backend.disconnect()

asyncio.run(main(sys.argv[1]))
"""
    children = [spawn.script(source, empty_database.url, str(n)) for n in range(4)]
    assert [child.wait(60) for child in children] == [0, 0, 0, 0]
    assert len(await empty_database.fetch("SELECT 1 FROM sheppy_schema")) == 1
    assert len(await empty_database.fetch("SELECT 1 FROM sheppy_tasks")) == 4


@pytest.mark.torture
async def test_alembic_works_from_the_repository(
    empty_database: TestDatabase,
) -> None:
    assert "Running upgrade" in alembic(empty_database.url, "upgrade", "head").stderr
    assert "sheppy_sql_0004 (head)" in alembic(empty_database.url, "current").stdout
    assert "No new upgrade operations" in alembic(empty_database.url, "check").stdout
    assert "sheppy_sql" in alembic(empty_database.url, "heads", "--verbose").stdout
    backend = SqlBackend(empty_database.url)
    await backend.connect()
    await backend.disconnect()
    alembic(empty_database.url, "downgrade", "base")
    assert await catalog(empty_database) == set()


async def test_sql_for_review_makes_the_tables(empty_database: TestDatabase) -> None:
    script = alembic(empty_database.url, "upgrade", "head", "--sql").stdout
    assert await catalog(empty_database) == set()
    await empty_database.run_script(script)
    backend = SqlBackend(empty_database.url)
    await backend.connect()
    assert await backend.append("q", [{"id": "a"}]) == [True]
    await backend.disconnect()


def alembic(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env={**os.environ, "SHEPPY_SQL_URL": url},
        check=True,
        capture_output=True,
        text=True,
    )


def test_alembic_without_a_url_says_what_to_set() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "SHEPPY_SQL_URL"}
    run = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "Set SHEPPY_SQL_URL" in run.stderr + run.stdout
    assert "Traceback" not in run.stderr


def test_migrating_from_a_program_leaves_its_logging_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("alembic").level)
    mine = logging.getLogger("an.application.logger")
    migrate.upgrade(f"sqlite:///{tmp_path / 'a.db'}")
    assert (root.level, list(root.handlers), logging.getLogger("alembic").level) == before
    assert not mine.disabled


async def test_postgresql_tables_are_not_made_unasked(empty_postgres: TestDatabase) -> None:
    backend = SqlBackend(empty_postgres.url)
    with pytest.raises(BackendError, match=r'tables are missing; run "sheppy-sql db upgrade'):
        await backend.connect()
    assert not backend.is_connected
    asking = SqlBackend(empty_postgres.url, migrate=True, pool_size=1)
    await asking.connect()
    await asking.disconnect()
    await backend.connect()
    await backend.disconnect()


@pytest.mark.parametrize(
    ("version", "oldest_code", "problem"),
    [
        (0, 0, 'the tables have version 0, this sheppy-sql needs 4; run "sheppy-sql db upgrade'),
        (7, 7, r"version 7, which this sheppy-sql \(made for 4\) can no longer use; run \"pip"),
        (7, 1, None),
    ],
)
async def test_connect_judges_the_version_of_the_tables(
    database: TestDatabase,
    caplog: pytest.LogCaptureFixture,
    version: int,
    oldest_code: int,
    problem: str | None,
) -> None:
    await database.execute(
        "UPDATE sheppy_schema SET version = :version, oldest_code = :oldest_code",
        version=version,
        oldest_code=oldest_code,
    )
    backend = SqlBackend(database.url)
    caplog.set_level(logging.INFO, "sheppy_sql")
    if problem is None:
        await backend.connect()
        assert await backend.append("q", [{"id": "a"}]) == [True]
        [line] = [r.message for r in caplog.records if r.name == "sheppy_sql"]
        assert (
            line == "The tables have version 7, newer than this sheppy-sql's 4, and still accept it"
        )
    else:
        with pytest.raises(BackendError, match=problem):
            await backend.connect()
    await backend.disconnect()


async def test_schemas_and_prefixes_keep_installations_apart(
    empty_postgres: TestDatabase,
) -> None:
    places: list[dict[str, Any]] = [
        {"schema": "one"},
        {"schema": 'T"w o%'},
        {"table_prefix": "jobs_"},
        {"table_prefix": 'Odd "%s" '},
    ]
    backends = [SqlBackend(empty_postgres.url, migrate=True, **place) for place in places]
    for number, backend in enumerate(backends):
        await backend.connect()
        await backend.append("q", [{"id": "same", "n": number}])
    # Nor do they wake each other: only the first's waiter is to see its task.
    assert len({id(b._connected.consumer._wakeups) for b in backends}) == len(places)
    for number, backend in enumerate(backends):
        assert await backend.pop("q", 10) == [{"id": "same", "n": number}]
        await backend.disconnect()
    migrate.downgrade(empty_postgres.url, schema='T"w o%')
    await backends[0].connect()
    await backends[0].disconnect()


def test_version_table_of_alembic_is_ours_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    migrate.upgrade(url, table_prefix="mine_")
    engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))

    async def names() -> list[str]:
        async with engine.connect() as connection:
            found: list[str] = await connection.run_sync(lambda c: inspect(c).get_table_names())
            await connection.execute(text("SELECT version_num FROM mine_alembic_version"))
        await engine.dispose()
        return found

    found = asyncio.run(names())
    assert version_table("mine_") in found
    assert all(name.startswith("mine_") for name in found)
