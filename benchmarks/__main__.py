"""The benchmark's commands: run, report, docs, list."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import machine, page, plots, report
from .hands import Hands
from .proxy_cost import proxy_cost
from .results import Measurement, Results
from .servers import Servers
from .sizes import ALL, USUAL, Sizes
from .systems import OURS, PEERS, System
from .workloads import WORKLOADS, Bench, Workload

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "results"
TEMPLATE = ROOT / "benchmarks" / "page.md"
PAGE = ROOT / "docs" / "benchmarks.md"
LATEST = OUTPUT / "latest.json"
DELAY = 0.001  # seconds
LIMIT = 10.0  # minutes, of the usual sizes


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.command == "list":
        _list()
        return 0
    if options.command == "run":
        return run(options)
    results = Results.read(options.results)
    drawn = plots.draw(results, options.results.parent)
    if options.command == "docs":
        page.write(results, TEMPLATE, PAGE, drawn)
        print(f"Written: {PAGE.relative_to(ROOT)}")
    else:
        print(report.markdown(results))
    return 0


def run(options: argparse.Namespace) -> int:
    """Measure, and write what was found; 1 where something failed."""
    sizes: Sizes = ALL[options.size]
    if options.runs:
        sizes = dataclasses.replace(sizes, runs=options.runs)
    workloads = _chosen(WORKLOADS, options.only)
    systems = _chosen((*OURS, *(PEERS if options.peers else ())), options.systems)
    began, started = time.monotonic(), datetime.now(timezone.utc)
    results = Results(
        started=started.strftime("%Y-%m-%d %H:%M UTC"),
        sizes=json.loads(json.dumps(dataclasses.asdict(sizes))),
        versions=machine.versions(),
    )
    output = OUTPUT / started.strftime("%Y%m%d-%H%M%S")
    output.mkdir(parents=True)
    with Servers(options.postgres, DELAY) as servers, Hands(output / "processes.log") as hands:
        results.machine = machine.describe(servers.directory)
        results.settings = servers.settings()
        if servers.redis_port is None:
            results.notes.append("redis-server is not installed: RedisBackend was not measured.")
            systems = [system for system in systems if system.store != "redis"]
        reduced = [system for system in systems if system.share < 1]
        if reduced:
            shares = ", ".join(f"{each.label} {each.share:.0%}" for each in reduced)
            results.notes.append(f"Of the number of tasks, to save time: {shares}.")
        results.proxy = proxy_cost(servers, DELAY)
        with contextlib.ExitStack() as stack:
            bench = Bench(servers, hands, sizes, stack)
            for number in range(sizes.runs):
                spent = (time.monotonic() - began) / 60
                limit = options.minutes or (LIMIT if sizes == USUAL else 0)
                if number and limit and spent + (spent / number) > limit:
                    results.notes.append(
                        f"Stopped after {number} of {sizes.runs} runs: another would have taken "
                        f"longer than {limit:g} minutes in all."
                    )
                    break
                for workload in workloads:
                    if number == 0 or not workload.once:
                        _measure(bench, workload, systems, number, results)
                        results.minutes = (time.monotonic() - began) / 60
                        results.write(output / "results.json")
            # Who still connects to what the stack drops.
            hands.replace()
    (output / "results.md").write_text(report.markdown(results), "utf-8")
    plots.draw(results, output)
    for file in ("results.json", "results.md"):
        shutil.copyfile(output / file, LATEST.with_suffix(Path(file).suffix))
    print(report.markdown(results))
    print(f"Written: {output.relative_to(ROOT)} ({results.minutes:.1f} minutes)")
    return 1 if results.failures() else 0


def _measure(
    bench: Bench, workload: Workload, systems: Sequence[System], number: int, results: Results
) -> None:
    """One workload, all systems, one after the other; who is first changes from run to run."""
    part = [system for system in systems if workload.takes(system)]
    turn = number % len(part) if part else 0
    for system in part[turn:] + part[:turn]:
        begun = time.monotonic()
        try:
            found = workload.run(bench, system, workload.delayed)
        except Exception as error:  # noqa: BLE001  # reported; the others go on
            measurement = Measurement(
                workload.name, system.name, number, error=f"{type(error).__name__}: {error}"
            )
            bench.hands.replace()
        else:
            measurement = Measurement(
                workload.name, system.name, number, found.figures, found.samples, found.series
            )
        results.measurements.append(measurement)
        told = measurement.error or ", ".join(
            f"{name} {report.number(value)}" for name, value in measurement.figures.items()
        )
        took = time.monotonic() - begun
        print(
            f"run {number + 1}  {workload.name:<16} {system.name:<15} {took:5.1f} s  {told}",
            file=sys.stderr,
            flush=True,
        )


def _chosen(offered: Sequence[Any], names: str) -> list[Any]:
    if not names:
        return list(offered)
    wanted = names.split(",")
    unknown = set(wanted) - {each.name for each in offered}
    if unknown:
        raise SystemExit(f"Unknown: {', '.join(sorted(unknown))}; `list` shows what there is")
    return [each for each in offered if each.name in wanted]


def _list() -> None:
    print("Workloads:")
    for workload in WORKLOADS:
        takers = ", ".join(each.name for each in (*OURS, *PEERS) if workload.takes(each))
        print(f"  {workload.name:<17} {workload.title} ({takers})")
    print("Systems:")
    for system in (*OURS, *PEERS):
        print(f"  {system.name:<17} {system.label}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run_command = commands.add_parser("run", help="measure, and write tables and plots")
    size = run_command.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="tiny sizes, one run: to see whether all of it works",
    )
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="the sizes that the bars are stated for: about an hour",
    )
    run_command.add_argument("--runs", type=int, help="how often each is repeated (default 5)")
    run_command.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="begin no run that would end later (default 10 unless --full, --quick or --runs)",
    )
    run_command.add_argument("--only", default="", metavar="WORKLOAD,..", help="these only")
    run_command.add_argument("--systems", default="", metavar="SYSTEM,..", help="these only")
    run_command.add_argument("--peers", action="store_true", help="other queues on PostgreSQL too")
    run_command.add_argument(
        "--postgres",
        default="pypi",
        metavar="URL",
        help="a server to make databases on, or pypi-<version>: one of the package (default pypi)",
    )
    run_command.set_defaults(size=USUAL.name)
    for name, text in (
        ("report", "make the tables and plots of an earlier run again"),
        ("docs", "write docs/benchmarks.md from an earlier run"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("results", type=Path, nargs="?", default=LATEST)
    commands.add_parser("list", help="workloads and systems")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
