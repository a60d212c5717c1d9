"""The fixtures, in projects of users with whatever runs their asynchronous tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from tests.support.processes import environment

CONFTEST = 'pytest_plugins = ["sheppy_sql.testing.fixtures"]\n'
TASKS = """
from sheppy import task

@task
async def greet(name: str) -> str:
    return f"Hello, {name}!"
"""
BODY = """
    assert await sheppy_queue.size() == 0
    await sheppy_queue.add(greet("world"))
    await assert_enqueued(sheppy_queue, greet("world"))
    [done] = await drain(sheppy_queue)
    assert done.result == "Hello, world!"
"""
IMPORTS = """
import asyncio
import pytest
from tasks import greet
from sheppy_sql.testing import assert_enqueued, drain
"""
NAMES = ("first", "second")
# One loop for all tests, the last test's backend is still connected when it ends.
FUNCTION = "asyncio_default_fixture_loop_scope = function\n"
SESSION = (
    "asyncio_default_test_loop_scope = session\nasyncio_default_fixture_loop_scope = session\n"
)
RUNNERS = {
    "asyncio strict": ("@pytest.mark.asyncio\nasync ", f"asyncio_mode = strict\n{FUNCTION}"),
    "asyncio auto": ("async ", f"asyncio_mode = auto\n{FUNCTION}"),
    "asyncio one loop": ("async ", f"asyncio_mode = auto\n{SESSION}"),
    "anyio": ("@pytest.mark.anyio\nasync ", "addopts = -p no:asyncio\n"),
}


def project(directory: Path, tests: str, settings: str) -> str:
    """What pytest said of a project; all of it must have passed."""
    (directory / "conftest.py").write_text(
        CONFTEST + "import pytest\n\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    )
    (directory / "tasks.py").write_text(TASKS)
    (directory / "test_project.py").write_text(IMPORTS + tests)
    (directory / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\npythonpath = .\n" + settings
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = subprocess.run(
        command,
        cwd=directory,
        env=environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.torture
@pytest.mark.parametrize("runner", RUNNERS)
def test_fixtures_serve_every_runner(runner: str, tmp_path: Path) -> None:
    prefix, settings = RUNNERS[runner]
    tests = "".join(f"\n{prefix}def test_{name}(sheppy_queue):{BODY}" for name in NAMES)
    assert "2 passed" in project(tmp_path, tests, settings)


@pytest.mark.torture
def test_fixtures_serve_tests_that_run_their_own_loop(tmp_path: Path) -> None:
    body = indent(BODY, "    ")
    tests = "".join(
        f"\ndef test_{name}(sheppy_queue):\n    async def main():{body}\n    asyncio.run(main())\n"
        for name in NAMES
    )
    unused = "\ndef test_nothing(sheppy_backend):\n    assert not sheppy_backend.is_connected\n"
    assert "3 passed" in project(tmp_path, tests + unused, "addopts = -p no:asyncio -p no:anyio\n")


def test_clock_and_url_are_fixtures_too(tmp_path: Path) -> None:
    tests = """
from datetime import timedelta
from sheppy import Queue
from sheppy_sql import SqlBackend

async def test_time(sheppy_clock, sheppy_url):
    backend = SqlBackend(sheppy_url)
    queue = Queue(backend, "emails")
    await queue.schedule(greet("you"), timedelta(days=1))
    await assert_enqueued(queue, greet("you"), at=timedelta(days=1))
    assert await drain(queue) == []
    sheppy_clock.advance(timedelta(days=1))
    assert len(await drain(queue)) == 1
    await backend.disconnect()
"""
    assert "1 passed" in project(tmp_path, tests, f"asyncio_mode = auto\n{FUNCTION}")


def test_package_imports_no_pytest(tmp_path: Path) -> None:
    code = (
        "import sys, sheppy_sql, sheppy_sql.testing, sheppy_sql._host\n"
        "print([name for name in sys.modules if 'pytest' in name])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"
