"""What is compared, and what each can do."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .servers import Servers

Store = Literal["postgresql", "sqlite", "redis", "memory"]

SHEPPY = frozenset({"drain", "enqueue", "bulk", "backend"})
ACROSS = frozenset({"drain2", "start"})
PEER = frozenset({"drain", "drain2", "held", "enqueue", "bulk", "start"})


@dataclass(frozen=True, slots=True)
class System:
    """A queue library on a store."""

    name: str
    label: str
    store: Store
    driver: str
    """Its Driver, "package.module:Class"."""
    abilities: frozenset[str]
    """The workloads it takes part in ask for one of these each."""
    tables: str = ""
    """On PostgreSQL, who makes the tables: "package.module:coroutine_function"."""
    share: float = 1.0
    """Of the usual number of tasks; less for those that would take minutes. Rates stay rates."""

    @contextlib.contextmanager
    def stage(self, servers: Servers, delayed: bool = False) -> Iterator[str]:
        """The URL of an empty store; afterwards it is gone."""
        if self.store == "postgresql":
            module, function = self.tables.split(":")
            install = getattr(importlib.import_module(module), function)
            url = servers.database(self.name.replace("-", "_"), install)
            try:
                yield servers.proxied(url)[0] if delayed else url
            finally:
                servers.drop(url)
        elif self.store == "redis":
            url = servers.empty_redis()
            yield servers.proxied(url)[0] if delayed else url
        elif self.store == "sqlite":
            file = servers.directory / "bench.db"
            try:
                yield f"sqlite+aiosqlite:///{file.as_posix()}"
            finally:
                for each in servers.directory.glob("bench.db*"):
                    each.unlink()
        else:
            yield ""


async def install_sheppy(url: str) -> None:
    """Make sheppy-sql's tables."""
    from sheppy_sql import SqlBackend

    backend = SqlBackend(url, migrate=True)
    await backend.connect()
    await backend.disconnect()


OURS = (
    System(
        "sql-postgresql",
        "SqlBackend, PostgreSQL",
        "postgresql",
        "benchmarks.drivers.sheppy:SqlDriver",
        SHEPPY | ACROSS | {"wait", "delay", "held", "tables", "footprint", "idle"},
        "benchmarks.systems:install_sheppy",
    ),
    System(
        "sql-sqlite",
        "SqlBackend, SQLite",
        "sqlite",
        "benchmarks.drivers.sheppy:SqlDriver",
        SHEPPY | ACROSS | {"wait", "footprint"},
    ),
    System(
        "redis",
        "RedisBackend",
        "redis",
        "benchmarks.drivers.sheppy:RedisDriver",
        SHEPPY | ACROSS | {"wait", "delay", "footprint", "idle"},
    ),
    System(
        "memory",
        "MemoryBackend",
        "memory",
        "benchmarks.drivers.sheppy:MemoryDriver",
        SHEPPY,
    ),
    System(
        "asyncpg",
        "raw asyncpg",
        "postgresql",
        "benchmarks.drivers.raw:RawDriver",
        frozenset({"drain", "drain2", "held", "enqueue", "bulk"}),
        "benchmarks.drivers.raw:install",
    ),
)
PEERS = (
    System(
        "procrastinate",
        "procrastinate",
        "postgresql",
        "benchmarks.drivers.procrastinate:ProcrastinateDriver",
        PEER,
        "benchmarks.drivers.procrastinate:install",
        share=0.25,
    ),
    System(
        "pgqueuer",
        "pgqueuer",
        "postgresql",
        "benchmarks.drivers.pgqueuer:PgQueuerDriver",
        PEER,
        "benchmarks.drivers.pgqueuer:install",
    ),
    System(
        "saq",
        "SAQ (Postgres)",
        "postgresql",
        "benchmarks.drivers.saq:SaqDriver",
        PEER - {"bulk"},
        "benchmarks.drivers.saq:install",
        share=0.25,
    ),
    System(
        "chancy",
        "chancy",
        "postgresql",
        "benchmarks.drivers.chancy:ChancyDriver",
        PEER,
        "benchmarks.drivers.chancy:install",
    ),
)
