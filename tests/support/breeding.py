"""Processes that are killed and replaced, quickly: forked where all is imported already."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil

from .processes import Child, is_alive


def keep_alive(count: int, run: Callable[[], None]) -> None:
    """Keep `count` children that call `run` alive, for ever."""
    alive: set[int] = set()
    while True:
        while len(alive) < count:
            pid = os.fork()
            if pid == 0:
                run()
                os._exit(0)
            alive.add(pid)
            print("started", pid)
        pid, _ = os.wait()
        alive.discard(pid)


def bred_by(breeder: Child) -> list[psutil.Process]:
    """The children that it has at the moment."""
    return [process for process in psutil.Process(breeder.pid).children() if is_alive(process)]
