"""What the figures are held against, and whether they reach it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .results import Results
from .statistics import Summary, ratios, summarize

OURS, SQLITE, REDIS, RAW = "sql-postgresql", "sql-sqlite", "redis", "asyncpg"
SQL_PEERS = ("procrastinate", "pgqueuer", "saq", "chancy")

Value = Callable[[Results], Summary | None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure, the bound that it must keep, and the one that it aims for."""

    title: str
    value: Value
    least: float | None = None
    most: float | None = None
    aim: float | None = None
    unit: str = ""

    def verdict(self, found: Summary | None) -> Literal["met", "missed", "not measured"]:
        """By the median of the runs."""
        if found is None:
            return "not measured"
        enough = self.least is None or found.median >= self.least
        little = self.most is None or found.median <= self.most
        return "met" if enough and little else "missed"


def to(other: str, workload: str, figure: str = "rate", ours: str = OURS) -> Value:
    """Our figure to another system's, within each run."""
    return lambda results: ratios(
        results.values(workload, ours, figure), results.values(workload, other, figure)
    )


def to_best(
    others: Sequence[str], workload: str, theirs_in: Sequence[str] = (), figure: str = "rate"
) -> Value:
    """Our figure to the best of others in each run, in the workloads `theirs_in` or the same."""

    def value(results: Results) -> Summary | None:
        theirs: dict[int, float] = {}
        for other in others:
            for each in theirs_in or (workload,):
                for run, found in results.values(each, other, figure).items():
                    theirs[run] = max(found, theirs.get(run, 0.0))
        return ratios(results.values(workload, OURS, figure), theirs)

    return value


def of(workload: str, figure: str, system: str = OURS) -> Value:
    """Our own figure."""

    def value(results: Results) -> Summary | None:
        found = results.values(workload, system, figure)
        return summarize(list(found.values())) if found else None

    return value


BARS = (
    Bar("drain, one process, to RedisBackend", to(REDIS, "drain-1"), least=1.5, aim=2),
    Bar("drain, two processes, to RedisBackend", to(REDIS, "drain-2"), least=1.1, aim=1.8),
    Bar("drain, one process, 1 ms, to RedisBackend", to(REDIS, "drain-1-1ms"), least=1.5, aim=3),
    Bar("drain, two processes, 1 ms, to RedisBackend", to(REDIS, "drain-2-1ms"), least=1.5, aim=3),
    Bar(
        "drain at the backend to pgqueuer's best drain",
        to_best(("pgqueuer",), "drain-backend", ("drain-1", "drain-2")),
        least=1,
        aim=2,
    ),
    Bar("enqueue one by one to the best SQL peer", to_best(SQL_PEERS, "enqueue-one"), least=1),
    Bar("enqueue one by one to raw one-row commits", to(RAW, "enqueue-one"), least=0.5, aim=0.75),
    Bar("enqueue from 64 coroutines to RedisBackend", to(REDIS, "enqueue-64"), least=2.5, aim=5),
    Bar("enqueue in bulk to RedisBackend", to(REDIS, "enqueue-bulk"), least=1.5),
    Bar("enqueue in bulk to pgqueuer (stated)", to("pgqueuer", "enqueue-bulk"), aim=1),
    Bar("enqueue to start, p50, to RedisBackend", to(REDIS, "start", "p50"), most=2, aim=1.5),
    Bar("enqueue to start, p99", of("start", "p99"), most=25, unit="ms"),
    Bar("add + wait_for, p50, to RedisBackend", to(REDIS, "round-trip", "p50"), most=2.5, aim=1.5),
    Bar(
        "claims of 32, held snapshot, to a fresh table",
        of("dead-snapshot", "claims_ratio"),
        least=0.8,
        aim=1,
    ),
    *(
        bar
        for name, title in (
            ("dead-snapshot", "held snapshot"),
            ("dead-write", "open write transaction"),
        )
        for bar in (
            Bar(f"pop of 1, p50, {title}, to fresh", of(name, "short_pop_ratio"), most=2),
            Bar(f"empty pop, {title}", of(name, "empty_pop"), most=1, unit="ms"),
            Bar(
                f"empty pop_scheduled, {title}", of(name, "empty_pop_scheduled"), most=1, unit="ms"
            ),
        )
    ),
    Bar("claims, large backlog to small", of("backlog", "ratio"), least=0.85, aim=1),
    Bar("claims, many results to none", of("finished", "ratio"), least=0.85, aim=1),
    Bar("concurrent wait_for, connections", of("waiters", "connections"), most=3),
    Bar("last answer after the last result", of("waiters", "lag"), most=100, unit="ms"),
    Bar(
        "SQLite, drain, one process, to RedisBackend",
        to(REDIS, "drain-1", ours=SQLITE),
        least=0.5,
        aim=1,
    ),
    Bar("SQLite, enqueue to start, p50", of("start", "p50", SQLITE), most=20, unit="ms"),
    Bar("memory, growth", of("memory", "growth"), most=10, unit="%"),
    Bar("connections at concurrency 100", of("connections", "connections"), most=6),
    Bar("round trips of an idle worker", of("idle-requests", "requests"), most=2, unit="/s"),
    Bar("PostgreSQL's CPU, idle workers, of a core", of("idle-cpu", "cpu"), most=5, unit="%"),
)
