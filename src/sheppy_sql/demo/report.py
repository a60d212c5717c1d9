"""What a person sees of the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from . import tasks
from .jobs import CRON, DELAY
from .processes import COUNT

if TYPE_CHECKING:
    from .jobs import Jobs
    from .outcome import Outcome
    from .source import Source
    from .where import Where

STEPS = 4  # lines of progress where there is no terminal

IN_YOUR_PROGRAM = """\
[dim]from[/] sheppy [dim]import[/] Queue
[dim]from[/] sheppy_sql [dim]import[/] SqlBackend
queue = Queue(SqlBackend("postgresql+asyncpg://app@db/app"), "emails")"""


class Report:
    """The demo on the screen; plain lines where that is a file or a pipe."""

    def __init__(self) -> None:
        self._out = Console(highlight=False)
        self._errors = Console(highlight=False, stderr=True)

    def introduce(self, source: Source, where: Where) -> None:
        """What goes in, and where the queue is."""
        self._say()
        self._say(
            f"[bold]{len(source.files):,} files[/] of {escape(source.title)}, one task each, "
            f"{COUNT} workers"
        )
        self._say()
        self._row("queue", escape(where.shown))

    def enqueued(self, jobs: Jobs, seconds: float) -> None:
        """What is in the queues before the first worker is up."""
        self._row("enqueued", f"{len(jobs.files):,} file tasks in one call, {seconds:.2f} s")
        self._row(
            "as well",
            f"a flaky task, one scheduled {DELAY.total_seconds():g} s ahead, a cron, "
            f"{len(jobs.rate_limited)} rate-limited",
        )
        self._say()

    @contextmanager
    def progress(self, count: int) -> Iterator[Callable[[int], None]]:
        """A function that shows how many of `count` file tasks are done."""
        if self._out.is_terminal and not self._out.is_dumb_terminal:
            with Progress(
                BarColumn(None, complete_style="green", finished_style="green"),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._out,
                expand=True,
            ) as bar:
                shown = bar.add_task("", total=count)
                yield lambda done: bar.update(shown, completed=done)
        else:
            yield self._plain_progress(count)

    def _plain_progress(self, count: int) -> Callable[[int], None]:
        shown = 0

        def show(done: int) -> None:
            nonlocal shown
            if done * STEPS // count > shown:
                shown = done * STEPS // count
                self._row("done", f"{done:,} of {count:,}")

        return show

    def conclude(self, outcome: Outcome) -> None:
        """What became of the tasks, as the database has it."""
        self._say()
        for label, value in _happenings(outcome):
            self._row(label, value)
        self._say()
        tables = Table.grid(padding=(0, 4))
        tables.add_row(_totals(outcome), _largest(outcome))
        self._out.print(tables)
        self._say()

    def complain(self, complaints: list[str]) -> None:
        """What is missing or wrong."""
        self.error("not everything ended as it should:")
        for complaint in complaints:
            self._errors.print(f"  {escape(complaint)}", soft_wrap=True)

    def lead_on(self, where: Where, jobs: Jobs, *, kept: bool) -> None:
        """How to look at what is in the database, and where to go from here."""
        self._say("[green]Every task ended as it should: none was lost, none ran twice.[/]")
        self._say()
        if kept:
            self._say("[bold]Look at it[/]")
            self._say(escape(where.look(jobs.queues)))
        else:
            self._say("The demo's queues are cleared; with --keep they stay, to be looked at.")
        self._say()
        self._say("[bold]In your program[/]")
        self._say(IN_YOUR_PROGRAM)
        self._say()

    def stopped(self) -> None:
        self._errors.print("Stopped, and the workers with it")

    def error(self, message: str) -> None:
        self._errors.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)

    def _say(self, line: str = "") -> None:
        # Not cut into lines: paths and commands are there to be copied.
        self._out.print(line, soft_wrap=True)

    def _row(self, label: str, value: str) -> None:
        self._say(f"[dim]{label:<12}[/]{value}")


def _happenings(outcome: Outcome) -> Iterator[tuple[str, str]]:
    statuses = sorted(outcome.statuses.items(), key=lambda item: -item[1])
    yield (
        "tasks",
        ", ".join(
            f"[bold]{count:,}[/] {status}" + " by the cron" * (status == "scheduled")
            for status, count in statuses
        ),
    )
    shares = " + ".join(f"{ran['analyse']:,}" for ran in outcome.ran)
    yield "files", f"[bold]{outcome.rate:,.0f}[/] tasks a second; the workers did {shares}"
    if outcome.attempts:
        yield "flaky", f"failed twice, was retried, completed at attempt {outcome.attempts}"
    if outcome.lateness is not None:
        yield "scheduled", f"ran {outcome.lateness:.1f} s after its time"
    runs = outcome.cron_runs
    yield "cron", f'"{CRON}" ran {runs} time{"s" * (runs != 1)}'
    limited = len(outcome.jobs.rate_limited)
    yield (
        "rate limit",
        f"{tasks.RATE} a second: {limited} tasks took {outcome.limited_seconds:.1f} s",
    )
    if outcome.sentence:
        yield "chain", f"collect -> summarise: {outcome.sentence}"


def _totals(outcome: Outcome) -> Table:
    totals = outcome.totals
    table = _table("In the files", "")
    for label, number in (
        ("files", totals.files),
        ("lines", totals.lines),
        ("functions", totals.functions),
        ("classes", totals.classes),
        ("not valid Python", totals.unparsable),
    ):
        table.add_row(label, f"{number:,}")
    return table


def _largest(outcome: Outcome) -> Table:
    table = _table("Largest modules", "lines")
    for module in outcome.largest:
        table.add_row(escape(module.name), f"{module.lines:,}")
    return table


def _table(label: str, number: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(label)
    table.add_column(number, justify="right")
    return table
