"""What is measured: each workload measures one system once, on an empty store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from .hands import Hands
from .servers import Servers
from .sizes import Sizes
from .statistics import percentile
from .systems import System
from .tally import Tally

CONCURRENCY = 32
START_RATE = 20.0  # tasks per second


@dataclass(frozen=True, slots=True)
class Outcome:
    """Figures by name, and single values behind them for the plots."""

    figures: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)
    series: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a workload."""

    name: str
    label: str
    unit: str  # "/s", "ms", "" (a ratio or a count), "MB", "%"
    more_is_better: bool = False


@dataclass(slots=True)
class Bench:
    """What a workload works with."""

    servers: Servers
    hands: Hands
    sizes: Sizes
    stack: contextlib.ExitStack
    kept: dict[str, str] = field(default_factory=dict)
    """URLs of databases that stay for the whole run, as they take long to fill."""


Run = Callable[[Bench, System, bool], Outcome]


@dataclass(frozen=True, slots=True)
class Workload:
    """`run` measures a system that can do `needs`; `delayed`: with 1 ms more per round trip."""

    name: str
    title: str
    needs: frozenset[str]
    figures: tuple[Figure, ...]
    run: Run
    delayed: bool = False
    once: bool = False
    """Too long to repeat: done in the first run only."""

    def takes(self, system: System) -> bool:
        return self.needs <= system.abilities


def scaled(system: System, count: int) -> int:
    return max(1, int(count * system.share))


def _tally(bench: Bench, name: str = "tally") -> str:
    return Tally.create(bench.servers.directory / name)


def drain_by(processes: int) -> Run:
    """Tasks per second through the library's worker."""

    def run(bench: Bench, system: System, delayed: bool) -> Outcome:
        count = scaled(system, bench.sizes.drain)
        hands = bench.hands.take(processes)
        with system.stage(bench.servers, delayed) as url:
            tally = _tally(bench)
            for slot, hand in enumerate(hands):
                # One after the other: the first has filled the queue when the second warms up.
                hand.start(
                    "benchmarks.acts:drain",
                    driver=system.driver,
                    url=url,
                    tally=tally,
                    warm_tally=_tally(bench, f"warm-tally-{slot}"),
                    slot=slot,
                    count=count,
                    concurrency=CONCURRENCY,
                    fills=slot == 0,
                )
                hand.ready()
            for hand in hands:
                hand.go()
            results = [hand.result() for hand in hands]
        took = max(each["ended"] for each in results) - min(each["begun"] for each in results)
        return Outcome({"rate": count / took})

    return run


def drain_held(bench: Bench, system: System, delayed: bool) -> Outcome:
    """Through the library's worker, while somebody's snapshot keeps vacuum from its work."""
    count, total = bench.sizes.held
    with system.stage(bench.servers, delayed) as url:
        rates = bench.hands.take(1)[0].run(
            "benchmarks.acts:drain_held",
            driver=system.driver,
            url=url,
            tally=_tally(bench),
            warm_tally=_tally(bench, "warm-tally-0"),
            count=scaled(system, count),
            total=scaled(system, total),
            concurrency=CONCURRENCY,
        )
    return Outcome({**rates, "ratio": rates["last"] / rates["first"]})


def drain_backend(bench: Bench, system: System, delayed: bool) -> Outcome:
    with system.stage(bench.servers, delayed) as url:
        rate = bench.hands.take(1)[0].run(
            "benchmarks.acts:drain_backend",
            driver=system.driver,
            url=url,
            count=bench.sizes.backend_drain,
        )
    return Outcome({"rate": rate})


def enqueue(way: str, size: str) -> Run:
    def run(bench: Bench, system: System, delayed: bool) -> Outcome:
        count = scaled(system, getattr(bench.sizes, size))
        with system.stage(bench.servers, delayed) as url:
            rate = bench.hands.take(1)[0].run(
                "benchmarks.acts:enqueue", driver=system.driver, url=url, count=count, way=way
            )
        return Outcome({"rate": rate})

    return run


def start(bench: Bench, system: System, delayed: bool) -> Outcome:
    """From before add() to the first line of the task, in another, idle process."""
    sender, worker = bench.hands.take(2)
    with system.stage(bench.servers, delayed) as url:
        store = {"driver": system.driver, "url": url}
        worker.start("benchmarks.acts:idle_worker", **store)
        worker.ready()
        worker.go()
        count = bench.sizes.starts
        sent = sender.run("benchmarks.acts:send", **store, count=count, rate=START_RATE)
        time.sleep(1)  # for the last to begin
        worker.go()
        began = worker.result()
    if missing := count - len(began):
        raise RuntimeError(f"{missing} of {count} tasks had not begun a second after the last add")
    took = [1_000 * (began[str(number)] - at) for number, at in enumerate(sent)]
    return Outcome(_percentiles(took), {"latency": took})


def round_trip(bench: Bench, system: System, delayed: bool) -> Outcome:
    sender, worker = bench.hands.take(2)
    with system.stage(bench.servers, delayed) as url:
        store = {"driver": system.driver, "url": url}
        worker.start("benchmarks.acts:idle_worker", **store)
        worker.ready()
        worker.go()
        count = bench.sizes.round_trips
        seconds = sender.run("benchmarks.acts:round_trips", **store, count=count)
        worker.go()
        worker.result()
    took = [1_000 * each for each in seconds]
    return Outcome(_percentiles(took), {"latency": took})


def _percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    return {"p50": percentile(milliseconds, 50), "p99": percentile(milliseconds, 99)}


def dead_rows(holder: str) -> Run:
    def run(bench: Bench, system: System, delayed: bool) -> Outcome:
        with system.stage(bench.servers, delayed) as url:
            series = bench.hands.take(1)[0].run(
                "benchmarks.acts_tables:dead_rows",
                driver=system.driver,
                url=url,
                steps=list(bench.sizes.dead),
                count=bench.sizes.claims,
                holder=holder,
            )
        first, last = series[0], series[-1]
        figures = {
            "claims_fresh": first["claims"],
            "claims": last["claims"],
            "claims_ratio": last["claims"] / first["claims"],
            "short_pop_fresh": 1_000 * first["short_pop"],
            "short_pop": 1_000 * last["short_pop"],
            "short_pop_ratio": last["short_pop"] / first["short_pop"],
            "empty_pop_fresh": 1_000 * first["empty_pop"],
            "empty_pop": 1_000 * last["empty_pop"],
            "empty_pop_scheduled_fresh": 1_000 * first["empty_pop_scheduled"],
            "empty_pop_scheduled": 1_000 * last["empty_pop_scheduled"],
        }
        return Outcome(figures, series=series)

    return run


def against_size(what: str) -> Run:
    """Claims out of a small and a large store, one after the other."""

    def run(bench: Bench, system: System, delayed: bool) -> Outcome:
        small, large = bench.sizes.backlog
        plans = {
            "small": {"backlog": small, "finished": 0},
            "large": {"backlog": large, "finished": 0}
            if what == "backlog"
            else {"backlog": small, "finished": bench.sizes.finished},
        }
        figures: dict[str, float] = {}
        for name, plan in plans.items():
            key = f"{system.name} {plan}"
            if key not in bench.kept:
                stage = system.stage(bench.servers, delayed)
                bench.kept[key] = bench.stack.enter_context(stage)
            figures[name] = bench.hands.take(1)[0].run(
                "benchmarks.acts_tables:claims",
                driver=system.driver,
                url=bench.kept[key],
                count=bench.sizes.claims,
                **plan,
            )
        figures["ratio"] = figures["large"] / figures["small"]
        rows = [
            {"rows": plans[name]["backlog"] + plans[name]["finished"], "claims": figures[name]}
            for name in plans
        ]
        return Outcome(figures, series=[{k: float(v) for k, v in row.items()} for row in rows])

    return run


def many_waiters(bench: Bench, system: System, delayed: bool) -> Outcome:
    waiting, worker = bench.hands.take(2)
    count = bench.sizes.waiters
    with system.stage(bench.servers, delayed) as url:
        store = {"driver": system.driver, "url": url}
        port = bench.servers.port_of(url) if system.store != "sqlite" else 0
        waiting.start("benchmarks.acts_worker:waiters", **store, count=count, port=port)
        waiting.ready()
        waiting.go()
        tally = _tally(bench)
        stored = worker.run("benchmarks.acts_worker:finish", **store, tally=tally, count=count)
        found = waiting.result()
    figures = {"lag": 1_000 * (found["answered"] - stored)}
    if port:
        figures["connections"] = found["connections"]
    return Outcome(figures)


def memory(bench: Bench, system: System, delayed: bool) -> Outcome:
    with system.stage(bench.servers, delayed) as url:
        early, late = bench.hands.take(1)[0].run(
            "benchmarks.acts_worker:memory",
            driver=system.driver,
            url=url,
            tally=_tally(bench),
            steps=list(bench.sizes.memory),
        )
    return Outcome({"early": early / 1e6, "late": late / 1e6, "growth": 100 * (late / early - 1)})


def busy_connections(bench: Bench, system: System, delayed: bool) -> Outcome:
    with system.stage(bench.servers, delayed) as url:
        most = bench.hands.take(1)[0].run(
            "benchmarks.acts_worker:busy_connections",
            driver=system.driver,
            url=url,
            tally=_tally(bench),
            count=bench.sizes.connections,
            port=bench.servers.port_of(url),
        )
    return Outcome({"connections": most})


def idle_requests(bench: Bench, system: System, delayed: bool) -> Outcome:
    """What one idle worker sends, counted by a proxy without delay."""
    hand = bench.hands.take(1)[0]
    with system.stage(bench.servers) as url:
        by_way, proxy = bench.servers.proxied(url, delay=0.0)
        hand.start("benchmarks.acts_worker:idle", driver=system.driver, url=by_way, workers=1)
        hand.ready()
        _settle(bench)
        before, begun = proxy.count(), time.monotonic()
        time.sleep(bench.sizes.idle_seconds)
        rate = (proxy.count() - before) / (time.monotonic() - begun)
        for _ in range(2):
            hand.go()
        hand.result()
    return Outcome({"requests": rate})


def idle_cpu(bench: Bench, system: System, delayed: bool) -> Outcome:
    """What idle workers cost the server, in per cent of one core."""
    hands = bench.hands.take(4)
    each, rest = divmod(bench.sizes.idle_workers, len(hands))
    with system.stage(bench.servers, delayed) as url:
        for number, hand in enumerate(hands):
            workers = each + (number < rest)
            hand.start(
                "benchmarks.acts_worker:idle", driver=system.driver, url=url, workers=workers
            )
        for hand in hands:
            hand.ready()
        pids = bench.servers.redis_pids if system.store == "redis" else bench.servers.postgres_pids
        processes = _processes(pids())
        _settle(bench)
        before, begun = _cpu(processes), time.monotonic()
        time.sleep(bench.sizes.idle_seconds)
        used = (_cpu(processes) - before) / (time.monotonic() - begun)
        for hand in hands:
            hand.go()
            hand.go()
        for hand in hands:
            hand.result()
    return Outcome({"cpu": 100 * used})


def _settle(bench: Bench) -> None:
    """Wait until workers that have just begun are idle as they will be for hours."""
    time.sleep(bench.sizes.idle_seconds)


def _processes(pids: Sequence[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # A remote server's numbers may be those of anything here.
            if "postgres" in process.name() or "redis" in process.name():
                found.append(process)
    if len(found) < len(pids) / 2:
        raise RuntimeError("The server's processes are not on this machine")
    return found


def _cpu(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


RATE = (Figure("rate", "tasks", "/s", more_is_better=True),)
LATENCY = (Figure("p50", "p50", "ms"), Figure("p99", "p99", "ms"))
DEAD = (
    Figure("claims_fresh", "claims of 32, fresh table", "/s", more_is_better=True),
    Figure("claims", "claims of 32, dead rows", "/s", more_is_better=True),
    Figure("claims_ratio", "claims, dead rows to fresh", "", more_is_better=True),
    Figure("short_pop_fresh", "pop of 1, fresh", "ms"),
    Figure("short_pop", "pop of 1, dead rows", "ms"),
    Figure("short_pop_ratio", "pop of 1, dead rows to fresh", ""),
    Figure("empty_pop_fresh", "empty pop, fresh", "ms"),
    Figure("empty_pop", "empty pop, dead rows", "ms"),
    Figure("empty_pop_scheduled_fresh", "empty pop_scheduled, fresh", "ms"),
    Figure("empty_pop_scheduled", "empty pop_scheduled, dead rows", "ms"),
)
SIZES = (
    Figure("small", "claims of 32, small", "/s", more_is_better=True),
    Figure("large", "claims of 32, large", "/s", more_is_better=True),
    Figure("ratio", "large to small", "", more_is_better=True),
)


def _needs(*abilities: str) -> frozenset[str]:
    return frozenset(abilities)


MAIN = (
    Workload("drain-1", "Drain, one process", _needs("drain"), RATE, drain_by(1)),
    Workload("drain-2", "Drain, two processes", _needs("drain2"), RATE, drain_by(2)),
    Workload(
        "enqueue-one", "Enqueue one by one", _needs("enqueue"), RATE, enqueue("one", "enqueue")
    ),
    Workload(
        "enqueue-64",
        "Enqueue from 64 coroutines",
        _needs("enqueue"),
        RATE,
        enqueue("together", "enqueue_together"),
    ),
    Workload(
        "enqueue-bulk",
        "Enqueue in bulk of 1,000",
        _needs("bulk"),
        RATE,
        enqueue("bulk", "enqueue_bulk"),
    ),
    Workload("start", "Enqueue to start, idle worker", _needs("start"), LATENCY, start),
    Workload("round-trip", "add + wait_for", _needs("wait"), LATENCY, round_trip),
)
DELAYED = tuple(
    Workload(
        f"{each.name}-1ms",
        f"{each.title}, 1 ms",
        each.needs | {"delay"},
        each.figures,
        each.run,
        delayed=True,
    )
    for each in MAIN
)
OTHERS = (
    Workload("drain-backend", "Drain at the backend", _needs("backend"), RATE, drain_backend),
    Workload(
        "drain-held",
        "Drain, held snapshot",
        _needs("held"),
        (
            Figure("first", "first tasks", "/s", more_is_better=True),
            Figure("last", "last tasks", "/s", more_is_better=True),
            Figure("ratio", "last to first", "", more_is_better=True),
        ),
        drain_held,
    ),
    Workload("dead-snapshot", "Held snapshot", _needs("tables"), DEAD, dead_rows("snapshot")),
    Workload("dead-write", "Open write transaction", _needs("tables"), DEAD, dead_rows("write")),
    Workload("backlog", "Large backlog", _needs("tables"), SIZES, against_size("backlog")),
    Workload(
        "finished", "Many finished results", _needs("tables"), SIZES, against_size("finished")
    ),
    Workload(
        "waiters",
        "Concurrent wait_for",
        _needs("wait"),
        (
            Figure("lag", "last answer after last result", "ms"),
            Figure("connections", "connections", ""),
        ),
        many_waiters,
    ),
    Workload(
        "memory",
        "Memory of a worker",
        _needs("footprint"),
        (
            Figure("early", "early", "MB"),
            Figure("late", "late", "MB"),
            Figure("growth", "growth", "%"),
        ),
        memory,
        once=True,
    ),
    Workload(
        "connections",
        "Connections at concurrency 100",
        _needs("idle"),
        (Figure("connections", "connections", ""),),
        busy_connections,
        once=True,
    ),
    Workload(
        "idle-requests",
        "An idle worker",
        _needs("idle"),
        (Figure("requests", "round trips to the store", "/s"),),
        idle_requests,
        once=True,
    ),
    Workload(
        "idle-cpu",
        "Idle workers",
        _needs("idle"),
        (Figure("cpu", "server's CPU, of one core", "%"),),
        idle_cpu,
        once=True,
    ),
)
WORKLOADS = (*MAIN, *OTHERS, *DELAYED)
