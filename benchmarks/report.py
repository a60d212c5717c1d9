"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .bars import BARS, OURS, SQL_PEERS, Bar
from .results import Results
from .statistics import Summary, ratios, summarize
from .systems import OURS as OUR_SYSTEMS
from .systems import PEERS, System
from .workloads import WORKLOADS, Figure, Workload

REFERENCE = "redis"
MISSING = "-"
QUEUES = {REFERENCE, *SQL_PEERS}


def number(value: float) -> str:
    """Three significant digits; thousands separated."""
    if value != value or value in (float("inf"), float("-inf")):
        return MISSING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else "0"


def with_unit(value: float, unit: str) -> str:
    return f"{number(value)}{unit}" if unit in ("/s", "") else f"{number(value)} {unit}"


def shown(found: Summary, unit: str = "") -> str:
    """The median, and from where to where the runs went."""
    if found.runs == 1:
        return with_unit(found.median, unit)
    return f"{with_unit(found.median, unit)} ({number(found.least)} to {number(found.most)})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def systems_of(results: Results) -> list[System]:
    """Those that took part, ours first."""
    there = {each.system for each in results.measurements}
    return [system for system in (*OUR_SYSTEMS, *PEERS) if system.name in there]


def _lines(results: Results) -> Iterator[tuple[Workload, Figure]]:
    there = {each.workload for each in results.measurements}
    for workload in WORKLOADS:
        if workload.name in there:
            for figure in workload.figures:
                yield workload, figure


def _label(workload: Workload, figure: Figure) -> str:
    return workload.title if figure.name == "rate" else f"{workload.title}: {figure.label}"


def figures(results: Results) -> str:
    """Medians and spreads of every workload and system."""
    systems = systems_of(results)
    rows = []
    for workload, figure in _lines(results):
        cells = []
        for system in systems:
            found = results.values(workload.name, system.name, figure.name)
            failed = any(
                each.error and (each.workload, each.system) == (workload.name, system.name)
                for each in results.measurements
            )
            cell = shown(summarize(list(found.values())), figure.unit) if found else MISSING
            cells.append(f"{cell} failed" if failed else cell)
        rows.append([_label(workload, figure), *cells])
    return table(["workload", *(system.label for system in systems)], rows)


def comparison(results: Results) -> str:
    """Each system to RedisBackend within each run; above 1 is better, also for times."""
    systems = [each for each in systems_of(results) if each.name != REFERENCE]
    rows = []
    for workload, figure in _lines(results):
        reference = results.values(workload.name, REFERENCE, figure.name)
        cells = []
        for system in systems:
            own = results.values(workload.name, system.name, figure.name)
            better = (own, reference) if figure.more_is_better else (reference, own)
            found = ratios(*better)
            cells.append(shown(found) if found else MISSING)
        if any(cell != MISSING for cell in cells):
            rows.append([_label(workload, figure), *cells])
    return table(["workload", *(system.label for system in systems)], rows)


def bars(results: Results) -> str:
    """What the figures are held against."""
    rows = []
    for bar in BARS:
        found = bar.value(results)
        value = shown(found, bar.unit) if found else MISSING
        aim = MISSING if bar.aim is None else number(bar.aim)
        rows.append([bar.title, value, _bound(bar), aim, bar.verdict(found)])
    return table(["figure", "measured", "bar", "aim", ""], rows)


def _bound(bar: Bar) -> str:
    if bar.least is not None:
        return f"at least {with_unit(bar.least, bar.unit)}"
    return MISSING if bar.most is None else f"at most {with_unit(bar.most, bar.unit)}"


def losses(results: Results) -> str:
    """Where another queue is ahead of ours on PostgreSQL, by the median of the runs' ratios."""
    if OURS not in {each.system for each in results.measurements}:
        return "Our own backend was not measured."
    lines = []
    # Not raw asyncpg and memory: the one is no queue, the other stores nothing.
    others = [each for each in systems_of(results) if each.name in QUEUES]
    for workload, figure in _lines(results):
        own = results.values(workload.name, OURS, figure.name)
        for system in others:
            other = results.values(workload.name, system.name, figure.name)
            better = (other, own) if figure.more_is_better else (own, other)
            found = ratios(*better)
            if found and found.median > 1:
                lines.append(
                    f"- {_label(workload, figure)}: {system.label} is {shown(found)} times as good"
                )
    return "\n".join(lines) or "In none of the workloads measured."


def noise(results: Results) -> str:
    """Figures whose runs differ much, and what failed."""
    lines = []
    for workload, figure in _lines(results):
        for system in systems_of(results):
            found = results.values(workload.name, system.name, figure.name)
            if found and (summary := summarize(list(found.values()))).is_noisy:
                lines.append(
                    f"- {_label(workload, figure)}, {system.label}: from least to most "
                    f"{100 * summary.spread:.0f} % of the median"
                )
    text = "\n".join(lines) or "No figure spread over more than a quarter of its median."
    failures = [
        f"- {each.workload}, {each.system}, run {each.run + 1}: {each.error.splitlines()[0]}"
        for each in results.failures()
    ]
    return text + ("\n\nFailed:\n\n" + "\n".join(failures) if failures else "\n\nNothing failed.")


def conditions(results: Results) -> str:
    """Hardware, versions, settings and sizes."""
    proxy = [[way, f"{value:.3f} ms"] for way, value in results.proxy.items()]
    facts = [
        ["started", results.started],
        ["took", f"{results.minutes:.0f} minutes"],
        *([key, value] for key, value in results.machine.items()),
        ["versions", ", ".join(f"{name} {value}" for name, value in results.versions.items())],
        *(
            [server, ", ".join(f"{name} = {value or '(none)'}" for name, value in values.items())]
            for server, values in results.settings.items()
        ),
        *([f"round trip, p50, {way}", value] for way, value in proxy),
        ["sizes", ", ".join(f"{name} {value}" for name, value in results.sizes.items())],
    ]
    notes = "".join(f"\n\n{note}" for note in results.notes)
    return table(["", ""], facts) + notes


PARTS = {
    "conditions": conditions,
    "bars": bars,
    "figures": figures,
    "comparison": comparison,
    "losses": losses,
    "noise": noise,
}


def markdown(results: Results) -> str:
    """All of it, as `make bench` leaves it."""
    titles = {
        "conditions": "Where and how",
        "bars": "Against the bars",
        "figures": "Medians (least to most)",
        "comparison": "To RedisBackend, within each run; above 1 is better",
        "losses": "Where another queue is ahead",
        "noise": "What was noisy",
    }
    parts = (f"## {titles[name]}\n\n{part(results)}" for name, part in PARTS.items())
    return "# Benchmark\n\n" + "\n\n".join(parts) + "\n"
