"""Run the tests on every Python found, and on the oldest with the lowest dependencies.

python tools/matrix.py [--only 3.10,3.13] [--pin sqlalchemy==2.0.30] [--lowest-only] [-- -k cron]
What follows `--` goes to pytest. The tests run against the built wheel, as users install it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
PROJECT = "sheppy-sql"
OLDEST = (3, 10)
EXTRAS = {"test", "sync"}  # what the tests need
SELECTION = "not torture and not system"

PROBE = """
import ensurepip, json, sys, sysconfig, venv
final = sys.version_info.releaselevel == "final" and not sysconfig.get_config_var("Py_GIL_DISABLED")
print(json.dumps([sys.version_info[:3], final, sys.executable]))
"""

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?(?P<bounds>[^;]*)(?P<marker>;.*)?")
_EXTRA = re.compile(r"extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")
_LOWER_BOUND = re.compile(r">=\s*(?P<version>[^\s,]+)")
_LAUNCHER_LINE = re.compile(r"^\s*-\S+\s+(?:\*\s+)?(?P<path>\S.*\.exe)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Interpreter:
    """A Python that can make virtual environments."""

    version: tuple[int, int, int]
    executable: str

    @property
    def minor(self) -> str:
        """Return the version as users name it, such as 3.12."""
        return f"{self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Job:
    """One line of the closing table: a Python with a set of dependencies."""

    interpreter: Interpreter
    dependencies: str
    constraints: tuple[str, ...] = ()

    @property
    def venv(self) -> Path:
        """Return the directory of the virtual environment, which later runs use again."""
        suffix = "" if self.dependencies == "newest" else f"-{self.dependencies}"
        return VENVS / f"{self.interpreter.minor}{suffix}"


def call(*command: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program in the checkout; the caller looks at `returncode`."""
    # S603: all that runs here are Pythons found on this machine, and pip and pytest in them.
    return subprocess.run(command, cwd=ROOT, capture_output=capture, text=True, check=False)  # noqa: S603


def lowest_constraints(requirements: Iterable[str]) -> list[str]:
    """Return `name==lower bound` for each direct dependency, those of the tests included.

    Raises ValueError for a dependency that states no lower bound.
    """
    constraints = []
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement.strip())
        if match is None:
            raise ValueError(f"Cannot read the requirement {requirement!r}")
        extra = _EXTRA.search(match["marker"] or "")
        if match["name"] == PROJECT or (extra and extra["extra"] not in EXTRAS):
            continue
        bound = _LOWER_BOUND.search(match["bounds"])
        if bound is None:
            raise ValueError(f"Give {match['name']} a lower bound in pyproject.toml")
        constraints.append(f"{match['name']}=={bound['version']}")
    return constraints


def launcher_paths(listing: str) -> list[str]:
    """Return the programs that the Windows launcher names: `py -0p`, one at the end of a line."""
    return [match["path"] for match in _LAUNCHER_LINE.finditer(listing)]


def candidates() -> Iterator[str]:
    """Yield the programs that may be a Python: from PATH, pyenv and the Windows launcher."""
    name = re.compile(r"python3\.\d+(\.exe)?")
    for directory in map(Path, os.get_exec_path()):
        if directory.is_dir():
            yield from (str(path) for path in directory.iterdir() if name.fullmatch(path.name))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, pyenv.glob("versions/3.*/bin/python"))
    if shutil.which("py"):
        yield from launcher_paths(call("py", "-0p", capture=True).stdout)
    yield sys.executable


def probe(program: str) -> Interpreter | None:
    """Return the Python behind `program`; None if it fails, is too old or is no final release."""
    try:
        answer = call(program, "-c", PROBE, capture=True)
    except OSError:  # a dangling link, or built for another machine
        return None
    if answer.returncode != 0:
        return None
    (major, minor, micro), final, executable = json.loads(answer.stdout)
    if (major, minor) < OLDEST or not final:
        return None
    return Interpreter((major, minor, micro), executable)


def newest_of_each_minor(found: Iterable[Interpreter | None]) -> list[Interpreter]:
    """Return one Python per minor version, oldest first."""
    in_order = sorted(filter(None, found), key=lambda each: each.version)
    return list({each.minor: each for each in in_order}.values())


def plan(interpreters: list[Interpreter], pins: list[str], *, lowest_only: bool) -> list[Job]:
    """Return the jobs: every Python, and the oldest once more with the lowest dependencies."""
    requirements = importlib.metadata.requires(PROJECT) or []
    lowest = Job(interpreters[0], "lowest", tuple(lowest_constraints(requirements)))
    if lowest_only:
        return [lowest]
    if pins:
        return [Job(interpreter, "pinned", tuple(pins)) for interpreter in interpreters]
    return [*(Job(interpreter, "newest") for interpreter in interpreters), lowest]


def build_wheel() -> Path:
    """Return the wheel of this checkout, freshly built."""
    directory = VENVS / "wheel"
    shutil.rmtree(directory, ignore_errors=True)
    if not pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(directory), str(ROOT)):
        sys.exit("The wheel could not be built: see pip's message above.")
    (wheel,) = directory.glob("*.whl")
    return wheel


def pip(python: str, *arguments: str) -> bool:
    """Run pip; returns False after pip has said on stderr what went wrong."""
    quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    return call(python, *quiet, *arguments).returncode == 0


def prepare(job: Job, wheel: Path) -> str | None:
    """Return the Python of the job's environment with the wheel in it; None if that failed."""
    python = str(job.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    known = probe(python) if Path(python).exists() else None
    if known is None or known.version != job.interpreter.version:
        made = call(job.interpreter.executable, "-m", "venv", "--clear", str(job.venv))
        if made.returncode != 0:
            return None
    constraints = job.venv / "constraints.txt"
    constraints.write_text("".join(f"{line}\n" for line in job.constraints), encoding="utf-8")
    eager = ("--upgrade", "--upgrade-strategy", "eager", "--constraint", str(constraints))
    # The wheel's version stays while its content changes, and pip would keep the old one.
    installed = pip(python, "install", *eager, f"{wheel}[test]") and pip(
        python, "install", "--force-reinstall", "--no-deps", str(wheel)
    )
    return python if installed else None


def run(job: Job, wheel: Path, pytest_args: list[str]) -> tuple[str, float]:
    """Install and test; returns the result as one word or two, and the seconds it took."""
    started = time.monotonic()
    print(f"\n=== Python {job.interpreter.minor}, {job.dependencies} dependencies", flush=True)
    python = prepare(job, wheel)
    if python is None:
        return "FAILED to install", time.monotonic() - started
    # Old releases next to new ones of what *they* depend on: those warnings are not ours.
    tolerant = ("-W", "default::DeprecationWarning") if job.dependencies == "lowest" else ()
    tests = call(python, "-m", "pytest", "-m", SELECTION, *tolerant, *pytest_args)
    return "FAILED" if tests.returncode else "passed", time.monotonic() - started


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and what follows `--` for pytest."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description="Run the tests on every Python found.")
    parser.add_argument("--only", default="", help="comma separated versions, such as 3.10,3.13")
    parser.add_argument("--pin", action="append", default=[], help="such as sqlalchemy==2.0.30")
    parser.add_argument("--lowest-only", action="store_true", help="only the lowest dependencies")
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def main(arguments: list[str]) -> int:
    """Run every job; returns 1 if one failed, 2 if a Python is missing."""
    options, pytest_args = parse_arguments(arguments)
    interpreters = newest_of_each_minor(map(probe, dict.fromkeys(candidates())))
    found = [each.minor for each in interpreters]
    wanted = [version for version in options.only.split(",") if version] or found
    if not wanted or set(wanted) - set(found):
        print(f"Found Python {', '.join(found) or 'none'}, not all of {wanted}.", file=sys.stderr)
        return 2
    interpreters = [each for each in interpreters if each.minor in wanted]
    jobs = plan(interpreters, options.pin, lowest_only=options.lowest_only)
    wheel = build_wheel()
    outcomes = [(job, *run(job, wheel, pytest_args)) for job in jobs]
    print(f"\n{'python':<8} {'dependencies':<13} {'seconds':>7}  result")
    for job, result, seconds in outcomes:
        version = ".".join(map(str, job.interpreter.version))
        print(f"{version:<8} {job.dependencies:<13} {seconds:>7.0f}  {result}")
    return 0 if all(result == "passed" for _, result, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
