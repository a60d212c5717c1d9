"""A demo on real input: every file of Python's standard library becomes a task."""

from __future__ import annotations

from pathlib import Path

TIME_LIMIT = 50.0  # seconds; with connecting and stopping it ends within a minute


def run_demo(
    url: str | None = None,
    *,
    source: Path | None = None,
    keep: bool = False,
    time_limit: float = TIME_LIMIT,
) -> int:
    """The exit status, after a run whose course is printed as it happens.

    0: every task ended as it should, exactly once. 1: something is missing or wrong, and the
    last lines say what. 130: stopped by Ctrl-C or SIGTERM. No process is left behind.

    Args:
        url: The database. None for a new SQLite file in a temporary directory, which stays
            there to be looked at. On a database that is given, tables are made or upgraded,
            the queues are the demo's own, and at the end they are cleared.
        source: Directory of .py files to work on instead of the standard library.
        keep: Leave the demo's queues in a database that was given.
        time_limit: Seconds after which whatever has not finished counts as missing.
    """
    # The workers import this package too, and none of what the screen needs.
    from .runner import run

    return run(url, source=source, keep=keep, time_limit=time_limit)


__all__ = ["run_demo"]
