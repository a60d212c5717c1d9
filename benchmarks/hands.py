"""Processes that do the measured work, told what to do by the process that runs the benchmark.

They stay for the whole run, so that no measurement pays for imports, and hold nothing between two
calls. In each of them the garbage collector stays on, as in users' processes; it runs once just
before the clock starts.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

TIMEOUT = 600.0  # seconds that one step of a measurement may take


class HandError(Exception):
    """A hand failed, or took too long; the message holds what it said."""


class Cue:
    """What a measuring coroutine tells the benchmark, and hears from it."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers

    async def ready(self, value: Any = None) -> float:
        """Say that the preparations are done and wait for the start; the time, monotonic."""
        gc.collect()
        self.say(ready=value)
        await self.wait()
        return time.monotonic()

    async def wait(self) -> None:
        """Wait for the next word of the benchmark: what it means, both know."""
        # In a thread, as the loop may have tasks to run meanwhile.
        if not await asyncio.to_thread(sys.stdin.readline):
            raise HandError("The benchmark has ended")

    def say(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


class Hand:
    """One such process."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, call: str, **args: Any) -> None:
        """Begin a call "package.module:coroutine_function" with a Cue and these arguments."""
        self._write(json.dumps({"call": call, "args": args}))

    def ready(self) -> Any:
        """What the call says once its preparations are done."""
        return self._expect("ready")

    def go(self) -> None:
        """Let it go on from where it waits."""
        self._write("go")

    def result(self) -> Any:
        """What the call returns."""
        return self._expect("result")

    def run(self, call: str, **args: Any) -> Any:
        """Start a call, let it go as soon as it is ready, and return its result."""
        self.start(call, **args)
        self.ready()
        self.go()
        return self.result()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise HandError("A measuring process has died") from None

    def _expect(self, what: str) -> Any:
        message = self._read()
        if "error" in message:
            raise HandError(message["error"])
        if what not in message:
            raise HandError(f"{what} was expected, not {list(message)}")
        return message[what]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + TIMEOUT
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise HandError(f"Nothing was heard of it for {TIMEOUT:.0f} seconds")
            piece = os.read(pipe, 65_536)
            if not piece:
                raise HandError("A measuring process has died; its log says more")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


class Hands:
    """As many processes as a measurement asks for; those of a failed one are replaced."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._hands: list[Hand] = []

    def take(self, count: int) -> list[Hand]:
        while len(self._hands) < count:
            self._hands.append(Hand(self._log))
        return self._hands[:count]

    def replace(self) -> None:
        """End them all: after a failure nobody knows what they still do."""
        for hand in self._hands:
            hand.kill()
        self._hands.clear()

    def __enter__(self) -> Hands:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.replace()


def main() -> None:
    """What the process does: one call after the other, until nobody asks."""
    # Whatever a library prints must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    cue = Cue(answers)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        module, name = order["call"].split(":")
        try:
            function = getattr(importlib.import_module(module), name)
            result = asyncio.run(function(cue, **order["args"]))
        except Exception as error:  # noqa: BLE001  # told to the benchmark, which reports it
            traceback.print_exc()
            cue.say(error=f"{type(error).__name__}: {error}")
        else:
            cue.say(result=result)


if __name__ == "__main__":
    main()
