"""The servers of a benchmark: PostgreSQL, durable as it comes, and Redis without persistence."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import redis
from sqlalchemy import URL, make_url

from tests.support.databases import URL_VARIABLE, Packaged, choose
from tests.support.postgres import PostgresServer, Setting, free_port, packaged_programs
from tests.support.processes import Guard, wait_until

from .drivers.raw import plain_url
from .proxy import Proxy

# All else is as PostgreSQL comes. The tests' servers, which start the same way, run with fsync off.
POSTGRES_SETTINGS: dict[str, Setting] = {
    "fsync": True,
    "full_page_writes": True,
    "synchronous_commit": "on",
    "max_connections": 1000,
}
SHOWN_SETTINGS = (
    *("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method"),
    *("shared_buffers", "max_connections", "autovacuum", "jit"),
)
REDIS_OPTIONS = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1")
SHOWN_OPTIONS = ("save", "appendonly", "io-threads")
START_TIMEOUT = 20  # seconds

Install = Callable[[str], Awaitable[None]]


class Servers:
    """What the systems store into; gone, with all data, at the end of the block."""

    def __init__(self, postgres: str, delay: float) -> None:
        """`postgres`: as SHEPPY_SQL_TEST_POSTGRES_URL, one entry; `delay` in seconds."""
        self._delay = delay
        self._numbers = itertools.count()
        self._prefix = f"sheppy_bench_{secrets.token_hex(3)}_"
        self._templates: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._source = postgres
        self._redis_process: subprocess.Popen[bytes] | None = None
        self.directory = Path(tempfile.mkdtemp(prefix="sheppy-sql-bench-"))
        self.postgres_url: URL | None = None
        self.redis_port: int | None = None
        self._proxies: dict[tuple[str, int, float], Proxy] = {}

    def __enter__(self) -> Servers:
        self._guard = Guard(self.directory)
        self._stack.callback(self._guard.close)
        try:
            self._start_postgres()
            if shutil.which("redis-server"):
                self._start_redis()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def database(self, kind: str, install: Install) -> str:
        """The URL of a new database with the tables of one library, made once and copied."""
        assert self.postgres_url is not None
        if kind not in self._templates:
            template = f"{self._prefix}{kind}"
            self._sql(f"CREATE DATABASE {template} TEMPLATE template0 ENCODING 'UTF8'")
            asyncio.run(_install(install, self._url_of(template)))
            self._templates[kind] = template
        name = f"{self._prefix}{next(self._numbers)}"
        self._sql(f"CREATE DATABASE {name} TEMPLATE {self._templates[kind]}")
        return self._url_of(name)

    def drop(self, url: str) -> None:
        """Drop a database, whoever is connected to it."""
        self._sql(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def empty_redis(self) -> str:
        """The URL of Redis, without a key in it."""
        with self._redis() as client:
            client.flushall()
        return f"redis://127.0.0.1:{self.redis_port}"

    def proxied(self, url: str, delay: float | None = None) -> tuple[str, Proxy]:
        """The URL by way of a proxy: with the benchmark's delay, or this one."""
        parsed = make_url(url)
        assert parsed.host is not None
        port = parsed.port or 5432
        key = (parsed.host, port, self._delay if delay is None else delay)
        if key not in self._proxies:
            proxy = self._stack.enter_context(Proxy(*key))
            self._proxies[key] = proxy
        proxy = self._proxies[key]
        by_way = parsed.set(host="127.0.0.1", port=proxy.port)
        return by_way.render_as_string(hide_password=False), proxy

    def port_of(self, url: str) -> int:
        """The port that a client of this URL connects to."""
        return make_url(url).port or 5432

    def settings(self) -> dict[str, dict[str, str]]:
        """Each server's settings that matter, as the server itself tells them."""
        assert self.postgres_url is not None
        names = ", ".join(f"current_setting('{name}')" for name in SHOWN_SETTINGS)
        [row] = self._sql(f"SELECT {names}")
        found = {"PostgreSQL": dict(zip(SHOWN_SETTINGS, map(str, row), strict=True))}
        if self.redis_port is not None:
            with self._redis() as client:
                told = {name: client.config_get(name)[name] for name in SHOWN_OPTIONS}
                version = client.info("server")["redis_version"]
            found["Redis"] = {"redis_version": version, **told}
        return found

    def postgres_pids(self) -> list[int]:
        """All processes of the PostgreSQL server that it tells of."""
        return [pid for (pid,) in self._sql("SELECT pid FROM pg_stat_activity")]

    def redis_pids(self) -> list[int]:
        return [self._redis_process.pid] if self._redis_process else []

    def _start_postgres(self) -> None:
        [source] = choose({URL_VARIABLE: self._source}, lambda: False, packaged_programs)
        if isinstance(source, Packaged):
            data_dir = self.directory / "postgres"
            server = PostgresServer.create(source.bin_dir, data_dir, POSTGRES_SETTINGS)
            server.start()
            self.postgres_url = make_url(server.url())
        else:
            self.postgres_url = source.url  # type: ignore[union-attr]  # without Docker there is no third kind
            url = self.postgres_url.render_as_string(hide_password=False)
            self._guard.drop_later(url, self._prefix)
        self._sql("SELECT 1")

    def _start_redis(self) -> None:
        port = free_port()
        directory = self.directory / "redis"
        directory.mkdir()
        process = subprocess.Popen(
            ["redis-server", *REDIS_OPTIONS, "--port", str(port), "--dir", str(directory)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._guard.kill_later(process.pid)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        self._redis_process, self.redis_port = process, port
        wait_until(self._redis_answers, START_TIMEOUT, "redis-server did not answer")

    def _redis_answers(self) -> bool:
        with self._redis() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def _redis(self) -> Any:
        assert self.redis_port is not None
        return redis.Redis(port=self.redis_port, decode_responses=True)

    def _url_of(self, database: str) -> str:
        assert self.postgres_url is not None
        return self.postgres_url.set(database=database).render_as_string(hide_password=False)

    def _sql(self, statement: str) -> list[tuple[Any, ...]]:
        assert self.postgres_url is not None
        url = plain_url(self.postgres_url.render_as_string(hide_password=False))

        async def run() -> list[tuple[Any, ...]]:
            connection = await asyncpg.connect(url)
            try:
                return [tuple(row) for row in await connection.fetch(statement)]
            finally:
                await connection.close()

        return asyncio.run(run())


async def _install(install: Install, url: str) -> None:
    await install(url)
