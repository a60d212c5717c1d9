"""Where a benchmark ran: hardware, versions, and how busy the machine was with other things."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("sheppy", "sheppy-sql", "sqlalchemy", "asyncpg", "aiosqlite", "redis", "hiredis"),
    *("procrastinate", "pgqueuer", "saq", "chancy", "psycopg", "uvloop"),
)


def describe(directory: Path) -> dict[str, str]:
    """The machine and its system; `directory` is where the databases are."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "file system of the databases": _file_system(directory),
        "Python": platform.python_version(),
        "SQLite": _sqlite(),
        "load before": ", ".join(f"{load:.2f}" for load in psutil.getloadavg()),
        "revision": _revision(),
    }


def versions() -> dict[str, str]:
    """Of every package that takes part."""
    wanted = {name.replace("_", "-") for name in PACKAGES}
    found = {
        name: each.version
        for each in importlib.metadata.distributions()
        if (name := each.metadata["Name"].lower().replace("_", "-")) in wanted
    }
    return dict(sorted(found.items()))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file_system(directory: Path) -> str:
    inside = [
        part
        for part in psutil.disk_partitions(all=True)
        if directory.is_relative_to(part.mountpoint)
    ]
    return max(inside, key=lambda part: len(part.mountpoint)).fstype if inside else "unknown"


def _sqlite() -> str:
    import sqlite3

    return sqlite3.sqlite_version


def _revision() -> str:
    """The commit, marked where files differ from it; empty outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
