"""Results as SVG: the same file for the same results, legible on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .report import systems_of
from .results import Results
from .statistics import summarize
from .workloads import WORKLOADS

INK = "#7d8590"
"""As far from white as from black; the ground is transparent."""

COLOURS = {
    "sql-postgresql": "#2f81f7",
    "sql-sqlite": "#39a0b5",
    "redis": "#e5534b",
    "memory": "#a9862f",
    "asyncpg": "#8b8f96",
    "procrastinate": "#4f9d4f",
    "pgqueuer": "#b05fc9",
    "saq": "#d9822b",
    "chancy": "#c9578c",
}
STYLE = {
    "svg.hashsalt": "sheppy-sql",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
}


def draw(results: Results, directory: Path) -> list[Path]:
    """Write every plot there is data for; the files, in order."""
    kinds: dict[str, Callable[[Results, Any], bool]] = {
        "throughput": _throughput,
        "dead-rows": _dead_rows,
        "backlog": _backlog,
        "latency": _latency,
    }
    written = []
    for name, plot in kinds.items():
        path = directory / f"{name}.svg"
        with mpl.rc_context(STYLE), _figure(path) as figure:
            if plot(results, figure):
                written.append(path)
    return written


@contextmanager
def _figure(path: Path) -> Iterator[Any]:
    figure = Figure(figsize=(9, 5), layout="constrained")
    yield figure
    if figure.axes:
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        # What differs in nothing but blanks at line ends is no change.
        lines = path.read_text("utf-8").splitlines()
        path.write_text("".join(f"{line.rstrip()}\n" for line in lines), "utf-8")


def _throughput(results: Results, figure: Any) -> bool:
    rates = [each for each in WORKLOADS if each.figures[0].name == "rate"]
    rates = [
        each for each in rates if any(each.name == one.workload for one in results.measurements)
    ]
    if not rates:
        return False
    bars: list[tuple[str, str, Any]] = [
        (workload.title, system.name, summarize(list(found.values())))
        for workload in rates
        for system in systems_of(results)
        if (found := results.values(workload.name, system.name, "rate"))
    ]
    figure.set_size_inches(9, 1.5 + 0.14 * len(bars) + 0.2 * len(rates))
    axes = figure.subplots()
    line = 0.0
    places: list[tuple[str, float]] = []
    for title, name, summary in bars:
        if not places or places[-1][0] != title:
            line += 1.0
            places.append((title, line))
        axes.barh(
            line,
            summary.median,
            0.9,
            color=COLOURS[name],
            xerr=[[summary.median - summary.least], [summary.most - summary.median]],
            error_kw={"ecolor": INK, "elinewidth": 1},
        )
        line += 1.0
    for system in systems_of(results):
        axes.barh(1, 0, color=COLOURS[system.name], label=system.label)
    axes.set_yticks([place for _, place in places], [title for title, _ in places])
    axes.set_ylim(line, 0)
    axes.grid(visible=False, axis="y")
    axes.set_xscale("log")
    axes.set_xlabel("tasks per second (median, least to most; logarithmic)")
    figure.legend(loc="outside lower center", ncols=4)
    return True


def _series(results: Results, workload: str, x: str, y: str) -> list[tuple[float, float]]:
    """The median of y at each x over all runs."""
    points: dict[float, list[float]] = {}
    for each in results.measurements:
        if each.workload == workload:
            for row in each.series:
                points.setdefault(row[x], []).append(row[y])
    return [(at, summarize(values).median) for at, values in sorted(points.items())]


def _dead_rows(results: Results, figure: Any) -> bool:
    kinds = {"dead-snapshot": "held snapshot", "dead-write": "open write transaction"}
    kinds = {
        name: label for name, label in kinds.items() if _series(results, name, "dead", "claims")
    }
    if not kinds:
        return False
    claims, pops = figure.subplots(1, 2)
    figure.set_size_inches(9, 4)
    for (name, label), style in zip(kinds.items(), ("-o", "--s"), strict=False):
        claims.plot(
            *zip(*_series(results, name, "dead", "claims"), strict=True), style, label=label
        )
        for key, title, colour in (
            ("short_pop", "pop of 1", "#2f81f7"),
            ("empty_pop", "empty pop", "#d9822b"),
            ("empty_pop_scheduled", "empty pop_scheduled", "#b05fc9"),
        ):
            points = [(at, 1_000 * value) for at, value in _series(results, name, "dead", key)]
            pops.plot(*zip(*points, strict=True), style, color=colour, label=f"{title}, {label}")
    claims.set_ylabel("tasks per second, claims of 32")
    pops.set_ylabel("ms, p50")
    for axes in (claims, pops):
        axes.set_xlabel("tasks finished since")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return True


def _backlog(results: Results, figure: Any) -> bool:
    kinds = {"backlog": "pending tasks", "finished": "finished results and pending tasks"}
    kinds = {
        name: label for name, label in kinds.items() if _series(results, name, "rows", "claims")
    }
    if not kinds:
        return False
    figure.set_size_inches(9, 4)
    axes = figure.subplots()
    for (name, label), style in zip(kinds.items(), ("-o", "--s"), strict=False):
        axes.plot(*zip(*_series(results, name, "rows", "claims"), strict=True), style, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows in the tables")
    axes.set_ylabel("tasks per second, claims of 32")
    axes.legend()
    return True


def _latency(results: Results, figure: Any) -> bool:
    kinds = {"start": "enqueue to start", "round-trip": "add + wait_for"}
    kinds = {
        name: label
        for name, label in kinds.items()
        if any(each.workload == name and each.samples for each in results.measurements)
    }
    if not kinds:
        return False
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    figure.set_size_inches(9, 4)
    for axes, (name, label) in zip(panels, kinds.items(), strict=True):
        for system in systems_of(results):
            took = sorted(
                value
                for each in results.measurements
                if (each.workload, each.system) == (name, system.name)
                for value in each.samples.get("latency", [])
            )
            if took:
                part = [100 * (rank + 1) / len(took) for rank in range(len(took))]
                axes.step(took, part, where="post", color=COLOURS[system.name], label=system.label)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
        axes.set_title(label)
        axes.set_xlabel("ms (logarithmic)")
        axes.set_ylabel("% of tasks")
        axes.legend(fontsize=8, loc="lower right")
    return True
