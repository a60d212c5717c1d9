"""The wheel, installed as a user does: in a fresh environment, away from this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from sheppy_sql import migrate
from tests.support.databases import TestDatabase
from tests.test_docs import SYNC_ENVIRONMENT, block

# Seconds; packages may have to be downloaded.
pytestmark = [pytest.mark.torture, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
CONSUMER = """
from sheppy import Queue, Worker
from sheppy_sql import SqlBackend, migrate

backend = SqlBackend("postgresql://app@db/app", schema="queues", ttl=None)
queue = Queue(backend, "emails")
worker = Worker("emails", backend)

async def waiting() -> int:
    position: migrate.Position = migrate.current("sqlite:///dev.db")
    return position.version or (await backend.list_queues())["emails"]
"""
TESTS = """
import asyncio
from sheppy import task
from sheppy_sql.testing import assert_enqueued, drain

@task
async def double(number: int) -> int:
    return 2 * number

def test_doubling(sheppy_queue):
    async def main():
        await sheppy_queue.add(double(21))
        await assert_enqueued(sheppy_queue, double(21))
        assert [task.result for task in await drain(sheppy_queue)] == [42]
    asyncio.run(main())
"""
MISTAKE = 'SqlBackend("sqlite://", ttl="a day")\n'


def outcome(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a program said, in an environment that does not point here."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SHEPPY_"))
    }
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )


def said(*command: str | Path, cwd: Path) -> str:
    done = outcome(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    said(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", directory, ROOT, cwd=directory)
    [wheel] = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a fresh environment, with the wheel and mypy in it, has its programs."""
    directory = tmp_path_factory.mktemp("environment")
    builder = venv.EnvBuilder(with_pip=True)
    builder.create(directory)
    programs = directory / ("Scripts" if os.name == "nt" else "bin")
    said(
        programs / "python", *PIP, "install", "--no-compile", wheel, "mypy", "pytest", cwd=directory
    )
    return programs


def test_wheel_holds_the_package_and_its_migrations_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    revisions = [f.relative_to(ROOT).as_posix() for f in ROOT.glob("migrations/versions/*.py")]
    assert revisions
    testing = ("testing/__init__.py", "testing/fixtures.py")
    expected = ["migrations/env.py", "py.typed", "cli.py", *testing, *revisions]
    assert not {f"sheppy_sql/{name}" for name in expected} - set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"sheppy_sql"}
    assert not [name for name in names if "/test_" in name or "__pycache__" in name]


def test_installed_command_makes_and_checks_the_tables(
    programs: Path, empty_database: TestDatabase, tmp_path: Path
) -> None:
    def db(command: str) -> str:
        url = ("--url", empty_database.url)
        return said(programs / "sheppy-sql", "db", command, *url, cwd=tmp_path)

    position = "The tables are at revision sheppy_sql_0004 (version 4)\n"
    assert db("upgrade") == position
    assert db("current") == position
    assert "can work with them" in db("check")


def test_migrations_are_found_where_they_are(programs: Path, tmp_path: Path) -> None:
    code = "from sheppy_sql import migrate; print(migrate.scripts())"
    installed = Path(said(programs / "python", "-c", code, cwd=tmp_path).strip())
    assert programs.parent in installed.parents
    assert (installed / "env.py").is_file()
    assert migrate.scripts() == ROOT / "migrations"


def test_revisions_of_an_installed_package_are_a_branch(programs: Path, tmp_path: Path) -> None:
    page = "docs/migrations.md"
    (tmp_path / "migrations" / "versions").mkdir(parents=True)
    environment = block(page, SYNC_ENVIRONMENT)
    url = f'"sqlite:///{(tmp_path / "app.db").as_posix()}"'
    environment = environment.replace('os.environ["DATABASE_URL"]', url)
    (tmp_path / "migrations" / "env.py").write_text(environment, "utf-8")
    settings = block(page, "version_locations", "ini")
    (tmp_path / "alembic.ini").write_text(
        f"[alembic]\nscript_location = %(here)s/migrations\n{settings}", "utf-8"
    )
    alembic = (programs / "python", "-m", "alembic")
    said(*alembic, "upgrade", "heads", cwd=tmp_path)
    assert "sheppy_sql_0004 (head)" in said(*alembic, "current", cwd=tmp_path)
    assert "No new upgrade operations" in said(*alembic, "check", cwd=tmp_path)


def test_installed_package_is_typed(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text(CONSUMER + MISTAKE)
    mypy = (programs / "python", "-m", "mypy", "--strict", "--no-incremental")
    done = outcome(*mypy, "right.py", "wrong.py", cwd=tmp_path)
    assert 'wrong.py:12: error: Argument "ttl" to "SqlBackend"' in done.stdout
    assert "Found 1 error in 1 file (checked 2 source files)" in done.stdout


def test_fixtures_need_pytest_and_nothing_else(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["sheppy_sql.testing.fixtures"]\n')
    (tmp_path / "test_doubling.py").write_text(TESTS)
    pytest_command = (programs / "python", "-m", "pytest", "-q", "-W", "error", ".")
    assert "1 passed" in said(*pytest_command, cwd=tmp_path)
