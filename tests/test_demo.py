from __future__ import annotations

import hashlib
import re
import shlex
import signal
import sqlite3
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest

from sheppy_sql.demo import run_demo, source
from tests.support.databases import TestDatabase
from tests.support.processes import Child, Spawner, wait_until

PROGRAM = """\
import signal, sys
from pathlib import Path
from sheppy_sql.demo import run_demo

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
url, source, time_limit = sys.argv[1:]
sys.exit(run_demo(url or None, source=Path(source), time_limit=float(time_limit)))
"""
ONE_FILE_TOO_MANY = """\
from sheppy_sql.demo import source as sources

read = sources.read

def read_and_add(directory):
    found = read(directory)
    found.files.append(sources.SourceFile("gone.py", sha256="", lines=0))
    return found

sources.read = read_and_add
"""
TIME_LIMIT = "90"  # seconds: how fast a busy machine is, is not what is tested
LATEST_END = 120.0

RESULTS_GO_MISSING = """\
CREATE TRIGGER lost AFTER INSERT ON sheppy_results WHEN NEW.payload LIKE '%module_3.py%'
BEGIN DELETE FROM sheppy_results WHERE id = NEW.id; END"""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Seven modules: number N has N functions, of which one is a method, and N lines more."""
    root = tmp_path / "a [source] tree"
    for number in range(1, 8):
        functions = ["class Thing:", "    async def method(self): ...", ""]
        functions += [f"def function_{n}(): ..." for n in range(1, number)]
        write(root / "package" / f"module_{number}.py", functions)
    write(root / "not_python.py", ["def"])
    write(root / "site-packages" / "foreign.py", ["def foreign(): ..."])
    return root


def write(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def start(
    spawn: Spawner, url: str, tree: Path, time_limit: str = TIME_LIMIT, until: str | None = None
) -> Child:
    child = spawn.script(PROGRAM, url, str(tree), time_limit)
    if until:
        child.wait_for(until, timeout=60)
    return child


def workers_of(child: Child) -> list[psutil.Process]:
    """Its worker processes, once they have all been started."""
    found: list[psutil.Process] = []

    def all_started() -> bool:
        found[:] = psutil.Process(child.pid).children()
        return len(found) == 2

    wait_until(all_started, 60, "the workers were not started")
    return found


def have_ended(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


def rows(output: str) -> dict[str, str]:
    """The lines of the output by their first words."""
    found = re.findall(r"^(\S+(?: \S+)*)  +(.*)$", output, re.MULTILINE)
    return {label: value.strip() for label, value in found}


async def left(database: TestDatabase) -> list[tuple[str, int]]:
    tables = ("tasks", "results", "scheduled_tasks", "crons", "rate_limits", "queues")
    counts = [
        (name, await database.fetch(f"SELECT count(*) FROM sheppy_{name}")) for name in tables
    ]
    return [(name, found[0][0]) for name, found in counts if found[0][0]]


async def test_demo_counts_what_is_in_the_files_and_leaves_nothing(
    database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    demo = start(spawn, database.url, tree)

    assert demo.wait(LATEST_END) == 0, demo.report()
    shown = rows(demo.stdout)
    totals = {name: shown[name].split()[0] for name in ("lines", "functions", "classes")}
    lines = sum(3 + number - 1 for number in range(1, 8)) + 1
    assert totals == {"lines": str(lines), "functions": "28", "classes": "7"}
    assert shown["not valid Python"].split()[0] == "1"
    largest = re.findall(r"package/(module_\d)\.py +(\d+)$", demo.stdout, re.MULTILINE)
    assert largest == [(f"module_{number}", str(2 + number)) for number in (7, 6, 5, 4, 3)]
    assert "completed at attempt 3" in shown["flaky"]
    assert demo.stderr == ""
    assert await left(database) == []


def test_demo_without_a_database_leaves_a_file_to_look_at(
    spawn: Spawner, tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(variable, str(tmp_path))

    demo = start(spawn, "", tree)

    assert demo.wait(LATEST_END) == 0, demo.report()
    command = demo.stdout.partition("Look at it\n")[2].splitlines()[0]
    *_, file, statement = shlex.split(command)
    with sqlite3.connect(file) as connection:
        found = {func: (status, tasks) for func, status, tasks in connection.execute(statement)}
    connection.close()
    assert found["sheppy_sql.demo.tasks:analyse"] == ("completed", 8)
    assert tmp_path in Path(file).parents


@pytest.mark.torture
def test_demo_fails_where_a_result_goes_missing(
    sqlite_database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    file = sqlite_database.url.partition(":///")[2]
    with sqlite3.connect(file) as connection:
        connection.execute(RESULTS_GO_MISSING)
    connection.close()

    demo = start(spawn, sqlite_database.url, tree, time_limit="20")

    assert demo.wait(LATEST_END) == 1
    assert demo.stderr.startswith("Error: not finished after 20 s; missing: ")
    assert "package/module_3.py" in demo.stderr


@pytest.mark.torture
def test_demo_fails_where_a_task_does(
    sqlite_database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    demo = spawn.script(ONE_FILE_TOO_MANY + PROGRAM, sqlite_database.url, str(tree), TIME_LIMIT)

    assert demo.wait(LATEST_END) == 1
    assert demo.stderr.splitlines() == [
        "Error: not everything ended as it should:",
        f"  gone.py: failed, FileNotFoundError: [Errno 2] No such file or directory: "
        f"{str(tree / 'gone.py')!r}",
        "  the chained summary: its sums are not those of the files",
    ]


@pytest.mark.torture
def test_demo_fails_where_a_worker_is_killed(
    sqlite_database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    demo = start(spawn, sqlite_database.url, tree, until="enqueued")
    victim, other = workers_of(demo)
    victim.kill()

    assert demo.wait(LATEST_END) == 1
    assert f"(process {victim.pid}) " in demo.stderr
    assert have_ended([other])


@pytest.mark.torture
@pytest.mark.posix
async def test_demo_stopped_by_ctrl_c_leaves_nothing(
    database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    demo = start(spawn, database.url, tree, until="enqueued")
    workers = workers_of(demo)
    demo.send_signal(signal.SIGINT)

    assert demo.wait(LATEST_END) == 130, demo.report()
    assert demo.stderr == "Stopped, and the workers with it\n"
    assert have_ended(workers)
    assert await left(database) == []


@pytest.mark.torture
@pytest.mark.posix
async def test_demo_that_is_terminated_leaves_nothing(
    sqlite_database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    demo = start(spawn, sqlite_database.url, tree, until="enqueued")
    workers = workers_of(demo)
    demo.terminate()

    assert demo.wait(LATEST_END) == 130, demo.report()
    assert have_ended(workers)
    assert await left(sqlite_database) == []


@pytest.mark.torture
def test_workers_end_with_a_demo_that_is_killed(
    sqlite_database: TestDatabase, spawn: Spawner, tree: Path
) -> None:
    demo = start(spawn, sqlite_database.url, tree, until="enqueued")
    workers = workers_of(demo)
    psutil.Process(demo.pid).kill()

    wait_until(lambda: have_ended(workers), 60, "the workers went on")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:hunter2@127.0.0.1:1/x", "Failed to connect: .* check that the server"),
        ("mysql://me:hunter2@127.0.0.1/x", "mysql is not supported"),
        ("sqlite://", "cannot see :memory:; name a file"),
    ],
)
def test_database_that_cannot_be_used_is_one_line(
    url: str, message: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(url, source=tree) == 1

    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(f"Error: .*{message}.*\n", errors)
    assert "hunter2" not in errors


def test_directory_without_python_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(source=tmp_path) == 1

    assert capsys.readouterr() == (
        "",
        f"Error: {tmp_path} holds no .py files: name a directory that does\n",
    )


def test_source_is_the_standard_library() -> None:
    library = Path(sysconfig.get_path("stdlib"))

    found = source.read()

    names = {file.name for file in found.files}
    assert {"ast.py", "asyncio/__init__.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name for name in names)
    assert found.root == library
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in found.title
    ast = next(file for file in found.files if file.name == "ast.py")
    content = (library / "ast.py").read_bytes()
    assert (ast.sha256, ast.lines) == (hashlib.sha256(content).hexdigest(), content.count(b"\n"))
