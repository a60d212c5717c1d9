"""The command line, in processes of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import sheppy.cli.cli  # what `call` restores  # noqa: F401
from sheppy import Queue, task
from sqlalchemy import make_url

from sheppy_sql import migrate
from sheppy_sql._host import FUNCTION
from sheppy_sql.cli import main
from tests.support import make_worker, run_worker
from tests.support.databases import Databases, TestDatabase
from tests.support.postgres import PostgresServer
from tests.support.processes import Child, Spawner, wait_until

CALL = "import os; os.chdir(os.environ['DIRECTORY']); from sheppy_sql.cli import main; main()"
SECRET = "hunter2"
URL_WITH_SECRET = f"postgresql+asyncpg://app:{SECRET}@127.0.0.1:1/app"
POSITION = "The tables are at revision sheppy_sql_0004 (version 4)\n"

Start = Callable[..., Child]
Run = Callable[..., str]
Call = Callable[..., tuple[object, str]]


@task
async def double(number: int) -> int:
    return 2 * number


@task
async def fail() -> None:
    raise RuntimeError("on purpose")


@task
async def wait_for_file(begun: str, awaited: str) -> str:
    Path(begun).touch()
    while not Path(awaited).exists():  # noqa: ASYNC110  # another process makes it
        await asyncio.sleep(0.01)
    return "finished"


DOUBLE = f"{__name__}:double"


@pytest.fixture
def empty_postgres(postgres_server: str, databases: Databases) -> Iterator[TestDatabase]:
    """A fresh database without our tables, on each PostgreSQL server."""
    with databases.postgresql(postgres_server, migrated=False) as database:
        yield database


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of whoever runs the tests names no database and no queue."""
    for name in [name for name in os.environ if name.startswith("SHEPPY_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the commands are run, and import from."""
    directory = tmp_path / "project"
    directory.mkdir()
    return directory


@pytest.fixture
def start(spawn: Spawner, directory: Path) -> Start:
    """Starts `sheppy-sql` with these arguments; Python warns of all that is left open."""

    def start(*arguments: str, **env: str) -> Child:
        own = {
            "DIRECTORY": str(directory),
            "PYTHONWARNINGS": "default::ResourceWarning",
            "COLUMNS": "200",
        }
        return spawn.python("-c", CALL, *arguments, env={**own, **env})

    return start


@pytest.fixture
def run(start: Start) -> Run:
    """What `sheppy-sql` printed; it must have succeeded, with nothing on stderr."""

    def run(*arguments: str, **env: str) -> str:
        child = start(*arguments, **env)
        assert child.wait() == 0
        assert child.stderr == ""
        return child.stdout

    return run


@pytest.fixture
def refuse(start: Start) -> Run:
    """The one line on stderr with which `sheppy-sql` failed."""

    def refuse(*arguments: str, status: int = 1, **env: str) -> str:
        child = start(*arguments, **env)
        assert child.wait() == status
        assert child.stderr.startswith("Error: ")
        assert child.stderr.count("\n") == 1
        assert SECRET not in child.report()
        return child.stderr.removeprefix("Error: ")

    return refuse


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The exit status and the one line on stderr of `sheppy-sql`, run in this process."""
    for name, module in sys.modules.items():
        if name.startswith("sheppy.") and hasattr(module, FUNCTION):
            monkeypatch.setattr(module, FUNCTION, getattr(module, FUNCTION))  # to be restored

    def call(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["sheppy-sql", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed, error = capsys.readouterr()
        assert printed == ""
        assert error.startswith("Error: ")
        assert error.count("\n") == 1
        assert SECRET not in error
        return ended.value.code, error

    return call


class TestSheppysCommands:
    @pytest.mark.posix
    def test_added_task_is_run_by_a_worker_and_shown(
        self, start: Start, run: Run, database: TestDatabase
    ) -> None:
        where = ("-u", database.url)
        worker = start("work", *where)
        added = run("task", "add", DOUBLE, "-a", "[21]", "--wait", "-t", "30", *where)
        assert added.splitlines()[-1] == "42"
        [task_id] = re.findall(r"Task ID: (\S+)", added)
        worker.kill()

        assert "Status: completed" in run("task", "info", task_id, *where)
        listed = json.loads(run("task", "list", "-f", "json", SHEPPY_BACKEND_URL=database.url))
        assert [entry["id"] for entry in listed["tasks"]] == [task_id]

    async def test_failed_task_is_retried(
        self, run: Run, database: TestDatabase, queue: Queue
    ) -> None:
        failing = fail()
        await queue.add(failing)
        await run_worker(make_worker(queue.backend), 1)

        run("task", "retry", str(failing.id), "-q", "test", "-u", database.url)
        assert await queue.size() == 1
        assert re.search(r"test\D+1", run("queue", "list", "-u", database.url))

    async def test_task_is_scheduled(self, run: Run, database: TestDatabase, queue: Queue) -> None:
        run(
            *("task", "schedule", DOUBLE, "-a", "[1]", "--delay", "1h"),
            *("-q", "test", "-u", database.url),
        )
        [scheduled] = await queue.get_scheduled()
        assert scheduled.spec.func == DOUBLE

    async def test_crons_are_listed(self, run: Run, database: TestDatabase, queue: Queue) -> None:
        await queue.add_cron(double(1), "*/7 * * * *")
        assert "*/7 * * * *" in run("cron", "list", "-q", "test", "-u", database.url)

    @pytest.mark.posix
    @pytest.mark.parametrize("option", [["--oneshot"], ["--max-tasks", "2"]])
    async def test_worker_ends_by_itself(
        self, run: Run, database: TestDatabase, queue: Queue, option: list[str]
    ) -> None:
        jobs = [double(1), double(2)]
        await queue.add(jobs)
        run("work", *option, "-q", "test", "-u", database.url)
        finished = await queue.wait_for(list(jobs), timeout=1)
        assert [finished[job.id].result for job in jobs] == [2, 4]

    @pytest.mark.posix
    async def test_terminated_worker_finishes_its_task(
        self, start: Start, database: TestDatabase, queue: Queue, tmp_path: Path
    ) -> None:
        begun, awaited = tmp_path / "begun", tmp_path / "awaited"
        job = wait_for_file(str(begun), str(awaited))
        await queue.add(job)
        worker = start("work", "-q", "test", "-u", database.url)
        wait_until(begun.exists, 30, "the task did not begin")

        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM" in worker.stdout, 30, "the worker did not hear")
        awaited.touch()
        assert worker.wait() == 0
        assert worker.stderr == ""
        finished = await queue.get_task(job)
        assert finished is not None
        assert finished.result == "finished"

    @pytest.mark.posix
    async def test_reloaded_worker_knows_our_urls(
        self, start: Start, run: Run, sqlite_database: TestDatabase, directory: Path
    ) -> None:
        (directory / "jobs.py").write_text(
            "from sheppy import Queue, task\n"
            "queue = Queue()\n"
            "@task\nasync def size() -> int: return await queue.size()\n"
        )
        env = {"SHEPPY_BACKEND_URL": sqlite_database.url}
        worker = start("work", "--reload", **env)
        added = run("task", "add", "jobs:size", "--wait", "-t", "30", **env)
        assert added.splitlines()[-1] == "0"
        worker.send_signal(signal.SIGTERM)
        worker.wait()
        assert "Traceback" not in worker.report()

    @pytest.mark.torture
    def test_schema_and_prefix_come_from_the_environment(
        self, run: Run, empty_database: TestDatabase
    ) -> None:
        env = {"SHEPPY_BACKEND_URL": empty_database.url, "SHEPPY_SQL_TABLE_PREFIX": "jobs_"}
        if empty_database.dialect == "postgresql":
            env["SHEPPY_SQL_SCHEMA"] = "queues"
        assert run("db", "upgrade", **env) == POSITION
        run("task", "add", DOUBLE, "-a", "[1]", **env)
        assert re.search(r"default\D+1", run("queue", "list", **env))
        assert run("db", "current", "-u", empty_database.url) == "There are no tables\n"

    def test_backends_of_sheppys_own_still_work(self, run: Run) -> None:
        assert "No active queues" in run("queue", "list", "-u", "memory://")


class TestErrors:
    """Each is one line that says what to do."""

    @pytest.mark.parametrize(
        ("command", "variable"),
        [
            (("work",), "SHEPPY_BACKEND_URL"),
            (("queue", "list"), "SHEPPY_BACKEND_URL"),
            (("db", "check"), "SHEPPY_SQL_URL or SHEPPY_BACKEND_URL"),
        ],
    )
    def test_no_url(self, call: Call, command: tuple[str, ...], variable: str) -> None:
        status, error = call(*command)
        assert status == 2
        assert variable in error

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            (URL_WITH_SECRET, "check that the server runs"),
            (f"postgresql+psycopg2://app:{SECRET}@db/app", "is not supported; accepted are"),
            (f"mysql://app:{SECRET}@db/app", "Unsupported backend protocol: mysql"),
            (f"app:{SECRET}@db/app", "does not begin with a scheme"),
            (f"://app:{SECRET}@db/app", "Invalid backend URL: ***"),
            (f"postgresql://app:{SECRET}/@db/app", "write @ : / ? %"),
        ],
    )
    def test_bad_url(self, call: Call, url: str, said: str) -> None:
        status, error = call("queue", "list", "-u", url)
        assert status == 1
        assert said in error

    def test_missing_folder(self, refuse: Run) -> None:
        said = refuse("queue", "list", "-u", "sqlite+aiosqlite:////no/such/folder/x.db")
        assert "/no/such/folder" in said

    def test_wrong_password(
        self, refuse: Run, private_server: Callable[..., PostgresServer]
    ) -> None:
        url = private_server(password="right").url(password=SECRET)
        said = "check the user and the password"
        assert said in refuse("work", SHEPPY_BACKEND_URL=url)
        assert said in refuse("db", "upgrade", SHEPPY_BACKEND_URL=url)

    def test_missing_tables(self, refuse: Run, empty_postgres: TestDatabase) -> None:
        said = refuse("work", "-u", empty_postgres.url)
        assert 'tables are missing; run "sheppy-sql db upgrade --url URL"' in said

    @pytest.mark.posix
    def test_finished_task_of_an_unknown_function(
        self, refuse: Run, run: Run, sqlite_database: TestDatabase, directory: Path
    ) -> None:
        module = directory / "jobs.py"
        module.write_text(
            "from sheppy import task\n@task\nasync def gone(it: str) -> str: return it\n"
        )
        where = ("-u", sqlite_database.url)
        run("task", "add", "jobs:gone", "-a", f'["{SECRET}"]', *where)
        run("work", "--max-tasks", "1", *where)
        module.unlink()
        assert "Cannot resolve function: jobs:gone" in refuse("task", "list", *where)


class TestSecrets:
    @pytest.mark.parametrize("command", [["work"], ["db", "upgrade"]])
    def test_help_does_not_show_the_url(self, start: Start, command: list[str]) -> None:
        child = start(*command, "--help", SHEPPY_BACKEND_URL=URL_WITH_SECRET)
        assert child.wait() == 0
        assert "SHEPPY_BACKEND_URL" in child.stdout
        assert SECRET not in child.report()

    @pytest.mark.posix
    def test_worker_shows_no_password_even_when_its_server_goes_away(
        self, start: Start, private_server: Callable[..., PostgresServer]
    ) -> None:
        server = private_server(password=SECRET)
        migrate.upgrade(server.url())
        worker = start("work", "-u", server.url(), SHEPPY_SQL_OUTAGE_GRACE="1")
        wait_until(lambda: "<CronManager> started" in worker.stdout, 30, "it did not start")
        assert "Backend: SqlBackend [postgresql+asyncpg://postgres:***@127.0.0.1" in worker.stdout
        server.stop("immediate")
        worker.wait(60)
        assert "Worker stopped" in worker.stdout
        assert "Traceback" not in worker.stderr
        assert SECRET not in worker.report()


class TestTables:
    @pytest.mark.torture
    def test_they_are_made_checked_and_dropped(
        self, start: Start, run: Run, refuse: Run, empty_database: TestDatabase
    ) -> None:
        env = {"SHEPPY_SQL_URL": empty_database.url}
        assert run("db", "current", **env) == "There are no tables\n"
        assert "db upgrade" in refuse("db", "check", **env)
        assert run("db", "upgrade", **env) == POSITION
        assert run("db", "current", **env) == POSITION
        assert run("db", "check", **env) == f"{POSITION}This sheppy-sql can work with them\n"

        unconfirmed = start("db", "downgrade", **env)
        assert unconfirmed.wait() == 1
        assert "deletes all tasks" in unconfirmed.stdout
        assert run("db", "downgrade", "--yes", **env) == "There are no tables\n"

    @pytest.mark.parametrize(
        ("version", "oldest_code", "said"),
        [(0, 0, 'run "sheppy-sql db upgrade'), (9, 9, "pip install --upgrade sheppy-sql")],
    )
    async def test_other_versions_are_refused(
        self, refuse: Run, sqlite_database: TestDatabase, version: int, oldest_code: int, said: str
    ) -> None:
        await sqlite_database.execute(
            "UPDATE sheppy_schema SET version = :version, oldest_code = :oldest_code",
            version=version,
            oldest_code=oldest_code,
        )
        assert said in refuse("db", "check", "-u", sqlite_database.url)

    async def test_newer_version_that_accepts_this_code_is_fine(
        self, run: Run, sqlite_database: TestDatabase
    ) -> None:
        await sqlite_database.execute("UPDATE sheppy_schema SET version = 9")
        assert "can work with them" in run("db", "check", "-u", sqlite_database.url)

    async def test_their_statements_can_be_run_by_hand(
        self, run: Run, empty_database: TestDatabase
    ) -> None:
        where = ("-u", empty_database.url)
        names = ["--table-prefix", "jobs_"]
        if empty_database.dialect == "postgresql":
            names += ["--schema", "queues"]
        await empty_database.run_script(run("db", "upgrade", "--sql", *names, *where))
        assert "can work with them" in run("db", "check", *names, *where)

    def test_grant_is_printed_for_names_of_all_kinds(self, run: Run) -> None:
        said = run("db", "grant", 'W"o', "--sql", "--schema", "Jobs", "--table-prefix", "a b_")
        lines = said.splitlines()
        assert lines[0] == 'GRANT USAGE ON SCHEMA "Jobs" TO "W""o";'
        assert 'SELECT, INSERT, UPDATE, DELETE ON "Jobs"."a b_' in lines[1]
        read = '"Jobs"."a b_schema", "Jobs"."a b_alembic_version"'
        assert lines[2] == f'GRANT SELECT ON {read} TO "W""o";'
        assert lines[3] == 'GRANT USAGE ON SEQUENCE "Jobs"."a b_positions" TO "W""o";'
        assert lines[4] == 'GRANT EXECUTE ON FUNCTION "Jobs"."a b_append" TO "W""o";'

    def test_grant_needs_roles(
        self, run: Run, refuse: Run, sqlite_database: TestDatabase, postgres_database: TestDatabase
    ) -> None:
        assert "SQLite has no roles" in refuse("db", "grant", "app", "-u", sqlite_database.url)
        url = ("-u", postgres_database.url)
        assert "does not exist" in refuse("db", "grant", "nobody there", *url)
        role = make_url(postgres_database.worker_url).username or ""
        assert run("db", "grant", role, *url) == f"{role} can work with the tables\n"

    def test_folder_of_the_revisions_is_printed(self, run: Run) -> None:
        folder = Path(run("db", "revisions").strip())
        assert (folder / "0001_first_tables.py").is_file()

    @pytest.mark.parametrize("command", ["upgrade", "downgrade", "current", "check"])
    def test_sqlite_has_no_schemas(
        self, call: Call, sqlite_database: TestDatabase, command: str
    ) -> None:
        yes = ["--yes"] if command == "downgrade" else []
        status, error = call("db", command, "--schema", "x", "-u", sqlite_database.url, *yes)
        assert status == 1
        assert "on SQLite use table_prefix" in error

    def test_looking_for_them_makes_no_file(self, run: Run, refuse: Run, tmp_path: Path) -> None:
        file = tmp_path / "new.db"
        url = f"sqlite+aiosqlite:///{file.as_posix()}"
        assert run("db", "current", "-u", url) == "There are no tables\n"
        refuse("db", "check", "-u", url)
        assert not file.exists()

    def test_unknown_revision_is_refused(self, refuse: Run, sqlite_database: TestDatabase) -> None:
        assert "'nothing'" in refuse("db", "upgrade", "nothing", "-u", sqlite_database.url)


def test_versions_are_shown(run: Run) -> None:
    shown = dict(line.split() for line in run("--version").splitlines())
    assert shown == {name: version(name) for name in ("sheppy-sql", "sheppy", "SQLAlchemy")}
