"""Threads, event loops and forks of programs that take tasks, and how such programs end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosqlite
import httpx
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from sheppy_sql import SqlBackend
from sheppy_sql._heart import Heart
from tests.contract.tasks import QUEUE, MakeBackend, finished, ids, make_task, make_tasks
from tests.support.processes import wait_until

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase
    from tests.support.processes import Child, Spawner

LEASE = 1.0  # seconds, the shortest
PATIENCE = 30.0  # seconds
PROMPTLY = 5.0  # seconds
HEART = "sheppy-sql-heart"

PRELUDE = f"""
import asyncio, os, sys, threading, time
from sheppy_sql import SqlBackend
backend = SqlBackend(sys.argv[1], lease={LEASE})
QUEUE = "{QUEUE}"

async def take():
    await backend.connect()
    return [task["id"] for task in await backend.pop(QUEUE)]

def say(*words):
    print(*words, flush=True)

def threads():
    return [t for t in threading.enumerate() if t is not threading.main_thread()]
"""


def script(spawn: Spawner, database: TestDatabase, source: str) -> Child:
    return spawn.script(PRELUDE + source, database.url)


async def consumers(database: TestDatabase) -> list[str]:
    return [row[0] for row in await database.fetch("SELECT id FROM sheppy_consumers")]


async def claimed(database: TestDatabase) -> list[str]:
    rows = await database.fetch("SELECT id FROM sheppy_tasks WHERE state = 'claimed' ORDER BY id")
    return [row[0] for row in rows]


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == HEART]


async def test_no_thread_of_ours_survives_a_disconnect(database: TestDatabase) -> None:
    before = {*threading.enumerate()}
    for _ in range(5):
        backend = SqlBackend(database.url)
        await backend.connect()
        await backend.pop(QUEUE)
        assert len(ours()) == 1
        await backend.disconnect()
        assert ours() == []
    # Those of aiosqlite end on their own.
    await asyncio.to_thread(
        wait_until,
        lambda: not {t for t in threading.enumerate() if "asyncio" not in t.name} - before,
        PATIENCE,
        "a thread did not end",
    )


async def test_disconnect_waits_for_the_very_end_of_its_thread(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Heart._run

    def run_and_end_slowly(heart: Heart) -> None:
        run(heart)
        time.sleep(0.1)

    monkeypatch.setattr(Heart, "_run", run_and_end_slowly)
    backend = SqlBackend(database.url)
    await backend.connect()
    await backend.pop(QUEUE)
    await backend.disconnect()
    assert ours() == []


async def test_a_disconnect_right_after_the_first_pop_does_not_wait(
    database: TestDatabase,
) -> None:
    """The thread may not have come to run yet."""
    started = time.monotonic()
    for _ in range(5):
        backend = SqlBackend(database.url)
        await backend.connect()
        pop = asyncio.create_task(backend.pop(QUEUE, timeout=60))
        while not ours():  # noqa: ASYNC110  # an event in another thread
            await asyncio.sleep(0)
        pop.cancel()
        await backend.disconnect()
        assert ours() == []
        assert await consumers(database) == []
    assert time.monotonic() - started < PATIENCE


async def test_one_instance_may_be_run_in_one_event_loop_after_another(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backend, watching = SqlBackend(database.url, lease=LEASE), await make_backend()
    await watching.append(QUEUE, make_tasks(4))
    owners: list[str] = []

    async def work(*, leave: bool) -> list[str]:
        await backend.connect()
        taken = await backend.pop(QUEUE)
        owners.extend(
            row[0]
            for row in await database.fetch("SELECT owner FROM sheppy_tasks WHERE id = 'task-0'")
        )
        assert [thread.name for thread in ours()] == [HEART]
        assert await consumers(database) == owners[-1:]
        if leave:
            await backend.disconnect()
        return ids(taken)

    def run() -> list[list[str]]:
        taken = []
        for number in range(4):
            taken.append(asyncio.run(work(leave=number % 2 == 1)))
            assert ours() == []
        return taken

    # What one loop took is handed back at its end, and is the next one's first again.
    assert await asyncio.to_thread(run) == [["task-0"]] * 4
    assert len(set(owners)) == 4
    assert await consumers(database) == []
    assert await claimed(database) == []
    assert await watching.size(QUEUE) == 4


async def test_result_of_an_earlier_event_loops_task_is_dropped(
    database: TestDatabase, make_backend: MakeBackend
) -> None:
    backend, watching = SqlBackend(database.url), await make_backend()
    await watching.append(QUEUE, [make_task()])

    async def take() -> None:
        await backend.connect()
        assert ids(await backend.pop(QUEUE)) == ["task"]

    async def store() -> None:
        await backend.connect()
        await backend.store_result(QUEUE, finished(make_task()))

    def run() -> None:
        asyncio.run(take())
        asyncio.run(store())

    await asyncio.to_thread(run)
    assert await watching.get_results(QUEUE, ["task"]) == {}
    assert ids(await watching.pop(QUEUE, 5)) == ["task"]


ENDINGS = {
    "by asyncio.run": """
say(*asyncio.run(take()))
""",
    "disconnected": """
async def main():
    say(*await take())
    await backend.disconnect()
    left = [t.name for t in threads() if t.name.startswith("sheppy")]
    assert not left, left
asyncio.run(main())
""",
    "with the loop closed by hand": """
loop = asyncio.new_event_loop()
say(*loop.run_until_complete(take()))
loop.close()
""",
    "with the loop left open": """
loop = asyncio.new_event_loop()
say(*loop.run_until_complete(take()))
""",
    "by sys.exit in the loop": """
async def main():
    say(*await take())
    sys.exit(0)
asyncio.run(main())
""",
    "with a pop under way": """
async def main():
    say(*await take())
    waiting = asyncio.create_task(backend.pop(QUEUE, timeout=60))
    await asyncio.sleep(0)
asyncio.run(main())
""",
}


@pytest.mark.torture
@pytest.mark.parametrize("ending", ENDINGS)
async def test_program_that_took_a_task_ends_promptly(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner, ending: str
) -> None:
    watching = await make_backend(lease=LEASE)
    await watching.append(QUEUE, [make_task()])
    # The line's end is the last that the program itself does.
    child = script(spawn, database, ENDINGS[ending] + "\nsay('ends')\n")
    await asyncio.to_thread(child.wait_for, "task")
    if ending != "by sys.exit in the loop":
        await asyncio.to_thread(child.wait_for, "ends")
    started = time.monotonic()
    assert await asyncio.to_thread(child.wait) == 0
    assert time.monotonic() - started < PROMPTLY
    # A loop that is left to the garbage is complained of by asyncio itself.
    assert "Traceback" not in child.stderr or "with the loop" in ending
    # Handed back by it, or seen to be gone.
    assert ids(await watching.pop(QUEUE, timeout=PATIENCE)) == ["task"]


@pytest.mark.torture
@pytest.mark.parametrize("ending", ["by asyncio.run", "disconnected"])
async def test_program_that_ends_in_order_leaves_nothing(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner, ending: str
) -> None:
    watching = await make_backend()
    await watching.append(QUEUE, [make_task()])
    child = script(spawn, database, ENDINGS[ending])
    assert await asyncio.to_thread(child.wait) == 0
    assert await consumers(database) == []
    assert await claimed(database) == []
    assert await database.fetch("SELECT crashes FROM sheppy_tasks") == [(0,)]


FORK = """
async def child_works():
    assert not backend.is_connected
    await backend.connect()
    assert not backend._claims.any_held
    # Not its claim: as by anybody who never took the task.
    await backend.acknowledge(QUEUE, ["task-0"])
    await backend.heartbeat(QUEUE, ["task-0"])
    assert [task["id"] for task in await backend.pop(QUEUE)] == ["task-1"]
    await backend.disconnect()

def in_child():
    assert [t.name for t in threads()] == [], threads()
    asyncio._set_running_loop(None)
    asyncio.run(child_works())
    assert [t.name for t in threads() if t.name.startswith("sheppy")] == []

async def parent_works():
    assert await take() == ["task-0"]
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            in_child()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    status = await asyncio.to_thread(os.waitpid, pid, 0)
    say("child", os.waitstatus_to_exitcode(status[1]))
    assert "sheppy-sql-heart" in [t.name for t in threads()]
    assert await backend.pop("signals", timeout=60)
    await backend.store_result(QUEUE, {"id": "task-0", "result": 1, "finished_at": "now"})
    await backend.disconnect()
asyncio.run(parent_works())
"""


@pytest.mark.torture
@pytest.mark.posix
async def test_forked_child_leaves_its_parents_claims_alone(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    watching = await make_backend(lease=LEASE)
    await watching.append(QUEUE, make_tasks(2))
    parent = script(spawn, database, FORK)
    said = await asyncio.to_thread(parent.wait_for, "child")
    assert said == "child 0", parent.report()
    assert await claimed(database) == ["task-0"]
    [owner] = await consumers(database)
    assert await database.fetch("SELECT owner FROM sheppy_tasks WHERE id = 'task-0'") == [(owner,)]
    # The parent's signs of life go on, for longer than one of them counts.
    assert ids(await watching.pop(QUEUE)) == ["task-1"]
    assert await watching.pop(QUEUE, timeout=1.5 * LEASE) == []
    await watching.append("signals", [make_task()])
    results = await watching.get_results(QUEUE, ["task-0"], timeout=PATIENCE)
    assert results["task-0"]["result"] == 1
    assert await asyncio.to_thread(parent.wait) == 0


@pytest.mark.torture
@pytest.mark.posix
async def test_forked_child_that_does_nothing_harms_nobody(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner
) -> None:
    """It ends as any program does, its parent's objects with it."""
    watching = await make_backend(lease=LEASE)
    await watching.append(QUEUE, [make_task()])
    source = """
import gc
loop = asyncio.new_event_loop()
say(*loop.run_until_complete(take()))
if (pid := os.fork()) == 0:
    asyncio._set_running_loop(None)
    gc.collect()
    sys.exit(0)
say("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert loop.run_until_complete(backend.pop("signals", timeout=60))
stored = backend.store_result(QUEUE, {"id": "task", "result": 1, "finished_at": "now"})
loop.run_until_complete(stored)
loop.run_until_complete(backend.disconnect())
loop.close()
"""
    parent = script(spawn, database, source)
    assert await asyncio.to_thread(parent.wait_for, "child") == "child 0", parent.report()
    assert await watching.pop(QUEUE, timeout=1.5 * LEASE) == []
    await watching.append("signals", [make_task()])
    results = await watching.get_results(QUEUE, ["task"], timeout=PATIENCE)
    assert results["task"]["result"] == 1
    assert await asyncio.to_thread(parent.wait) == 0
    assert "Traceback" not in parent.stderr


@pytest.mark.torture
@pytest.mark.posix
async def test_preforking_server_uses_its_masters_backend_in_its_workers(
    make_backend: MakeBackend, database: TestDatabase, spawn: Spawner, tmp_path: Path
) -> None:
    watching = await make_backend(lease=LEASE)
    # A file, as only that may have settings which this gunicorn does not know.
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(
        "bind, workers, preload_app, control_socket_disable = '127.0.0.1:0', 2, True, True"
    )
    server = spawn.python(
        *("-m", "gunicorn", "--config", str(config), "tests.support.wsgi:application"),
        env={"APPLICATION_DATABASE": database.url},
    )
    await asyncio.to_thread(
        wait_until,
        lambda: server.stderr.count("Booting worker") == 2 or server.returncode is not None,
        PATIENCE,
        "the server did not start",
    )
    answers: list[dict[str, Any]] = []
    address = re.search(r"Listening at: (http://127\.0\.0\.1:\d+)", server.stderr)
    assert address is not None, server.report()
    deadline = time.monotonic() + PATIENCE
    async with httpx.AsyncClient(base_url=address[1], timeout=PATIENCE) as web:
        while len({answer["pid"] for answer in answers}) < 2 or len(answers) < 6:
            assert time.monotonic() < deadline
            together = (web.get(f"/{len(answers)}-{number}") for number in range(4))
            for response in await asyncio.gather(*together):
                assert response.status_code == 200, server.report()
                answers.append(response.json())
    assert all(answer["added"] for answer in answers)
    assert {answer["parent"] for answer in answers} == {server.pid}
    assert await watching.size("web") == len(answers)
    # Of the workers nobody has touched what the master holds.
    assert await claimed(database) == ["of the master"]
    assert await watching.pop("master", timeout=1.5 * LEASE) == []
    server.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.wait) == 0
    assert "Traceback" not in server.stderr
    assert ids(await watching.pop("master", timeout=PATIENCE)) == ["of the master"]


@pytest.mark.parametrize("own_engine", [False, True])
async def test_an_event_loop_that_ends_within_a_write_leaves_the_file_unlocked(
    sqlite_database: TestDatabase, monkeypatch: pytest.MonkeyPatch, own_engine: bool
) -> None:
    """SQLite keeps a closed connection's transaction open for as long as a cursor is unfinished."""
    path = str(make_url(sqlite_database.url).database)
    # The one is the way of our own engines, the other that of SQLAlchemy.
    execute, fetch = aiosqlite.Connection.execute_fetchall, aiosqlite.Cursor.fetchall

    async def run() -> None:
        stuck = asyncio.Event()

        async def execute_and_stay(connection: aiosqlite.Connection, *args: Any) -> Any:
            rows = await execute(connection, *args)
            if connection.in_transaction and "INSERT" in args[0]:
                stuck.set()
                await asyncio.sleep(PATIENCE)
            return rows

        async def fetch_or_stay(cursor: aiosqlite.Cursor) -> Any:
            if cursor._conn.in_transaction:
                stuck.set()
                await asyncio.sleep(PATIENCE)
            return await fetch(cursor)

        backend = SqlBackend(
            create_async_engine(sqlite_database.url) if own_engine else sqlite_database.url
        )
        await backend.connect()
        monkeypatch.setattr(aiosqlite.Connection, "execute_fetchall", execute_and_stay)
        monkeypatch.setattr(aiosqlite.Cursor, "fetchall", fetch_or_stay)
        appending.append(asyncio.create_task(backend.append(QUEUE, [make_task()])))
        await stuck.wait()

    appending: list[asyncio.Task[list[bool]]] = []  # as whoever logs its error would keep it
    gc.disable()
    try:
        await asyncio.to_thread(asyncio.run, run())
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as another:
            another.execute("BEGIN IMMEDIATE")
            assert another.execute("SELECT id FROM sheppy_tasks").fetchall() == []
    finally:
        gc.enable()
