"""Python child processes for tests, and a guard that ends what a crashed run leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

POLL_INTERVAL = 0.01  # seconds
# Ctrl-C is for pytest alone, which then ends its children in order.
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
CALL = """\
import asyncio, importlib, inspect, sys
module, function = sys.argv[1].split(":")
outcome = getattr(importlib.import_module(module), function)(*sys.argv[2:])
if inspect.iscoroutine(outcome):
    asyncio.run(outcome)
"""


def wait_until(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    """Return once the condition holds; TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} within {timeout} seconds")
        time.sleep(POLL_INTERVAL)


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started; none of them runs afterwards."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    wait_until(lambda: not any(map(is_alive, family)), 30, f"process {pid} did not end")


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs and is not merely waiting to be collected."""
    # A zombie's parent may never ask how it ended.
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_server(data_dir: Path) -> None:
    """Kill the PostgreSQL server of this directory, if it runs, with all its processes."""
    pid_file = data_dir / "postmaster.pid"
    try:
        lines = pid_file.read_text().splitlines()
        pid = int(lines[0])
        # The file of a server that crashed may name a pid which is someone else's by now.
        ours = data_dir in map(Path, psutil.Process(pid).cmdline())
    except (FileNotFoundError, IndexError, psutil.NoSuchProcess):
        return
    if not ours:
        return
    kill_tree(pid)
    if sys.platform != "win32" and len(lines) > 6:
        # The segment by which PostgreSQL notices orphans outlives its processes.
        segment, remove = int(lines[6].split()[1]), 0
        ctypes.CDLL(None).shmctl(segment, remove, None)
    # Where nobody collects zombies the next start would find the old pid in use.
    pid_file.unlink(missing_ok=True)


async def drop_databases(url: str, prefix: str) -> None:
    """Drop every database of the server, then every role, whose name starts with `prefix`."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    databases = text("SELECT datname FROM pg_database WHERE starts_with(datname::text, :prefix)")
    roles = text("SELECT rolname FROM pg_roles WHERE starts_with(rolname::text, :prefix)")
    async with engine.connect() as connection:
        for name in (await connection.execute(databases, {"prefix": prefix})).scalars().all():
            await connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        for name in (await connection.execute(roles, {"prefix": prefix})).scalars().all():
            await connection.execute(text(f'DROP ROLE IF EXISTS "{name}"'))
    await engine.dispose()


class Guard:
    """Cleans up after this process, however it ends.

    A process of its own that waits for the end of a pipe which only we hold open. It kills what it
    was told to kill and every PostgreSQL server below `directory`, drops databases, and removes
    the directory.
    """

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(directory)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            creationflags=OWN_GROUP,
        )

    def kill_later(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._tell({"pid": pid, "created": psutil.Process(pid).create_time()})

    def drop_later(self, url: str, prefix: str) -> None:
        self._tell({"url": url, "prefix": prefix})

    def close(self) -> None:
        """Clean up now; RuntimeError says what could not be cleaned."""
        # Said, not only closed: a forked process may hold the pipe open as well.
        _, errors = self._process.communicate('"end"\n', timeout=60)
        if self._process.returncode:
            raise RuntimeError(f"The tests could not be cleaned up after:\n{errors}")

    def _tell(self, order: dict[str, str | float]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()


def guard(directory: Path) -> None:
    """What the guard's process does."""
    orders = []
    for line in sys.stdin:
        order = json.loads(line)
        if order == "end":
            break
        orders.append(order)
    for order in orders:
        if "pid" in order:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Computed from a clock that may have been set since.
                if abs(psutil.Process(order["pid"]).create_time() - order["created"]) < 5:
                    kill_tree(order["pid"])
    for pid_file in directory.glob("*/postmaster.pid"):
        kill_server(pid_file.parent)
    # A program that was just starting may still write.
    wait_until(lambda: _removed(directory), 30, f"{directory} could not be removed")
    for order in orders:
        if "url" in order:
            asyncio.run(drop_databases(order["url"], order["prefix"]))


def _removed(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables of a child that imports what we can import and prints at once."""
    own = {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return {**os.environ, **own, **(extra or {})}


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Child:
    """A running Python process whose output is kept in files."""

    def __init__(self, arguments: list[str], directory: Path, env: Mapping[str, str]) -> None:
        self._outputs = {name: directory / name for name in ("stdout", "stderr")}
        self._read = 0  # lines of stdout that wait_for has consumed
        directory.mkdir()
        with self._outputs["stdout"].open("wb") as out, self._outputs["stderr"].open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                creationflags=OWN_GROUP,
                # Whoever runs the tests in the background has them ignore SIGINT.
                preexec_fn=heed_interrupts if os.name == "posix" else None,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, None while it runs; minus the signal's number when killed."""
        return self._process.poll()

    @property
    def stdout(self) -> str:
        return self._outputs["stdout"].read_text("utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return self._outputs["stderr"].read_text("utf-8", errors="replace")

    def wait_for(self, event: str, timeout: float = 30) -> str:
        """The next line of stdout that starts with `event`, each line being found only once.

        Blocks: where the event loop must go on meanwhile, `await asyncio.to_thread(..)`.
        AssertionError, with the output, when the child ends first or `timeout` seconds pass.
        """
        deadline = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None  # asked first: what it wrote last still counts
            lines = self.stdout.split("\n")[:-1]
            for number in range(self._read, len(lines)):
                if lines[number].startswith(event):
                    self._read = number + 1
                    return lines[number].rstrip("\r")
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"Child did not say {event!r}:\n{self.report()}")
            time.sleep(POLL_INTERVAL)

    def wait(self, timeout: float = 30) -> int:
        """The exit status once it has ended by itself; TimeoutExpired after `timeout` seconds."""
        return self._process.wait(timeout)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM; on Windows it ends at once); does not wait."""
        self._process.terminate()

    def kill(self) -> None:
        """End it, and what it started, without warning (SIGKILL); returns when it is gone."""
        kill_tree(self.pid)
        self._process.wait()

    def report(self) -> str:
        """The exit status and all output, for people."""
        status = "running" if self.returncode is None else f"exit status {self.returncode}"
        return f"{status}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Spawner:
    """Starts Python child processes; `close` kills those that still run."""

    def __init__(self, directory: Path, started: Callable[[int], None]) -> None:
        self.children: list[Child] = []
        self._directory = directory
        self._started = started

    def __call__(
        self,
        target: str | Callable[..., object],
        *args: str,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """A child that calls a function, or runs a coroutine function, with these strings.

        The function is at the top level of a module: itself, or "package.module:function".
        """
        if not isinstance(target, str):
            target = f"{target.__module__}:{target.__qualname__}"
        return self.python("-c", CALL, target, *args, env=env)

    def script(self, source: str, *args: str, env: Mapping[str, str] | None = None) -> Child:
        """A child that runs this source; `args` are its sys.argv[1:]."""
        file = self._directory / f"script-{len(self.children)}.py"
        file.write_text(source, "utf-8")
        return self.python(str(file), *args, env=env)

    def python(self, *arguments: str, env: Mapping[str, str] | None = None) -> Child:
        """A child `python *arguments`, as `("-m", "package", "--option")`."""
        directory = self._directory / f"child-{len(self.children)}"
        child = Child(list(arguments), directory, env or {})
        self.children.append(child)
        self._started(child.pid)
        return child

    def close(self) -> None:
        for child in self.children:
            child.kill()


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
