"""What tells a process of this machine from every other, and whether one is gone."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
STARTED = 19  # the process's start among the fields of /proc/<pid>/stat that follow its name


class Process(NamedTuple):
    """None where the system cannot tell; a process of which something is None is never gone."""

    hostname: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    process_started: str | None


def this_process() -> Process:
    hostname, pid = socket.gethostname(), os.getpid()
    if sys.platform != "linux":
        return Process(hostname, None, None, pid, None)
    try:
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return Process(hostname, boot_id, _pid_namespace(), pid, _started(pid))
    except OSError:
        return Process(hostname, None, None, pid, None)


def is_gone(other: Process) -> bool:
    """Whether that process, of whatever machine, has certainly ended.

    Only a process of this boot and this pid namespace can be known to have: elsewhere its pid
    means another process. One that has the same pid and began at another time took it over.
    """
    me = this_process()
    if None in other or None in me or other[:3] != me[:3]:
        return False
    try:
        os.kill(other.pid, 0)
        return _started(other.pid) != other.process_started
    except ProcessLookupError:
        return True
    except OSError:  # it exists, and is somebody else's
        return False


def _pid_namespace() -> str:
    return str((PROC / "self/ns/pid").readlink())


def _started(pid: int) -> str:
    # Its name, in parentheses, may hold anything.
    stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2]
    return stat.split()[STARTED]
