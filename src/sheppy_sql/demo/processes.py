"""The demo's worker processes, seen from the demo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from types import TracebackType

COUNT = 2
STOP_TIMEOUT = 5.0  # seconds for tasks that still run
SHOWN_LINES = 15
# Ctrl-C is for the demo alone, which then stops its workers in order.
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class WorkerDiedError(Exception):
    """A worker process ended by itself; the message tells how, and what it said."""


class Workers:
    """Two processes that work from `with` to its end, and never longer."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = json.dumps(order)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        try:
            for number in range(1, COUNT + 1):
                self._workers.append(_Worker(number, self._order))
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        finally:
            self._kill()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def check(self) -> None:
        """Raise WorkerDiedError if one has ended though nobody stopped it."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                raise WorkerDiedError(worker.obituary())

    def stop(self) -> None:
        """Let them finish what they do and end; those that will not are killed."""
        for worker in self._workers:
            worker.close()
        deadline = time.monotonic() + STOP_TIMEOUT
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(deadline - time.monotonic(), 0.0))
        self._kill()

    def ran(self) -> list[Counter[str]]:
        """How often each worker ran each function, once they have stopped.

        Raises WorkerDiedError where one did not come to say it.
        """
        return [worker.ran() for worker in self._workers]

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # harmless where it has ended
            worker.process.wait()


class _Worker:
    def __init__(self, number: int, order: str) -> None:
        self.number = number
        # Files, not pipes: nobody has to read them for the worker to go on.
        self._stdout: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sheppy_sql.demo.worker"],
            # A module in the current directory must not stand in for one of Python's.
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.PIPE,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
            creationflags=OWN_GROUP,
        )
        self._stdin = cast("IO[bytes]", self.process.stdin)
        # One that ended at once is found by check().
        with contextlib.suppress(OSError):
            self._stdin.write(order.encode() + b"\n")
            self._stdin.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()

    def ran(self) -> Counter[str]:
        lines = _read(self._stdout).splitlines()
        if self.process.returncode != 0 or not lines:
            raise WorkerDiedError(self.obituary())
        return Counter(json.loads(lines[-1]))

    def obituary(self) -> str:
        lines = _read(self._stderr).splitlines()[-SHOWN_LINES:]
        said = (
            ["Its last words:", *(f"  {line}" for line in lines)] if lines else ["It was silent."]
        )
        how = _how_it_ended(self.process.returncode)
        pid = self.process.pid
        return "\n".join([f"Worker {self.number} (process {pid}) {how}. {said[0]}", *said[1:]])


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
