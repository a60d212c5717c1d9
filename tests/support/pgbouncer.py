"""A PgBouncer of the test's own, in front of a PostgreSQL server of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from .databases import NoServerError
from .postgres import PORT_ATTEMPTS, PostgresServer, ServerError, free_port, service_account
from .processes import POLL_INTERVAL, kill_tree

TIMEOUT = 10  # seconds until it listens

# auth_type=any takes every user for the one that the line of [databases] names.
CONFIGURATION = """\
[databases]
* = host=127.0.0.1 port={server_port} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {pool_mode}
default_pool_size = {pool_size}
max_client_conn = 200
"""

# Releases that can keep prepared statements are told not to; older ones refuse the setting.
KEEP_NONE = "max_prepared_statements = 0\n"
FIRST_TO_KEEP = (1, 21)


class PgBouncer:
    """Listens from its creation until `destroy`."""

    def __init__(
        self, server: PostgresServer, directory: Path, *, pool_mode: str, pool_size: int
    ) -> None:
        self._program = program()
        self._directory = directory
        self._log = directory / "log"
        self._account = service_account()
        directory.mkdir()
        for _ in range(PORT_ATTEMPTS):
            self.port = free_port()
            configuration = CONFIGURATION.format(
                server_port=server.port, port=self.port, pool_mode=pool_mode, pool_size=pool_size
            )
            if version(self._program) >= FIRST_TO_KEEP:
                configuration += KEEP_NONE
            (directory / "pgbouncer.ini").write_text(configuration)
            if self._start():
                return
        raise ServerError(f"PgBouncer found no free port:\n{self.log}")

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text("utf-8", errors="replace")

    def destroy(self) -> None:
        """Kill it and remove its files."""
        kill_tree(self.pid)
        self._process.wait()
        shutil.rmtree(self._directory)

    def _start(self) -> bool:
        """Whether it listens now; False where another program has taken the port."""
        account = self._account
        with self._log.open("wb") as log:
            # It refuses to run as root.
            self._process = subprocess.Popen(
                [self._program, str(self._directory / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                start_new_session=True,
            )
        deadline = time.monotonic() + TIMEOUT
        while "process up" not in self.log:
            if self._process.poll() is not None:
                if "in use" in self.log:
                    return False
                raise ServerError(f"PgBouncer did not start:\n{self.log}")
            if time.monotonic() > deadline:
                kill_tree(self.pid)
                self._process.wait()
                raise ServerError(f"PgBouncer did not start in time:\n{self.log}")
            time.sleep(POLL_INTERVAL)
        return True


def version(program: str) -> tuple[int, int]:
    """Its first two numbers."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = said.split()[1].split(".")[:2]
    return int(major), int(minor)


def program() -> str:
    """The path of pgbouncer; NoServerError says how to install it."""
    # Debian has it where only administrators look.
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    if found is None:
        raise NoServerError(
            "The tests of PgBouncer need the program pgbouncer: on Debian and Ubuntu, "
            "apt-get install pgbouncer"
        )
    return found
