"""sheppy's own commands, made to work with SqlBackend, and what testing needs to know of it.

THE ONE FILE THAT REACHES INTO SHEPPY'S PRIVATE PARTS. sheppy has no way to add a backend by
URL: `_create_backend_from_url` is a closed chain of schemes (in `sheppy.queue`, later in
`sheppy._queue`), and the modules of its command line import it by name. What is relied on:

- that function: it takes a URL and returns a Backend;
- `sheppy.cli.cli.app`, a Typer application, and its option `--backend-url`;
- for sheppy_sql.testing: modules that ask `datetime.now(..)` for the time, the name that a
  function has in a task, and a worker's `_task_processor`, which raises what a middleware raised.

tests/test_host.py fails where a release of sheppy changes one of these.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, tzinfo
from types import ModuleType
from typing import TYPE_CHECKING, Any

import sheppy
import typer.main
from sheppy._utils.functions import resolve_function, stringify_function

from . import _urls, migrate
from ._backend import SqlBackend

if TYPE_CHECKING:
    from sheppy import Backend, Queue, Task, Worker

FUNCTION = "_create_backend_from_url"
HOMES = ("sheppy.queue", "sheppy._queue")
OPTION = "backend_url"
NOT_OURS = frozenset({"dev-server"})
SCHEMES = frozenset({"postgres", "postgresql", "sqlite"})


class UnknownHostError(Exception):
    """sheppy is made differently than this file knows; the message says what to do."""


# What the environment may choose for the workers of the command line: option, type.
VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "SHEPPY_SQL_LEASE": ("lease", float),
    "SHEPPY_SQL_ON_CRASH": ("on_crash", str),
    "SHEPPY_SQL_MAX_CRASHES": ("max_crashes", int),
    "SHEPPY_SQL_OUTAGE_GRACE": ("outage_grace", float),
}


class CommandBackend(SqlBackend):
    """A SqlBackend whose tables, and some of whose options, the environment names."""

    def __init__(self, url: str) -> None:
        names = migrate.names_from_environment()
        super().__init__(
            url, schema=names.schema, table_prefix=names.prefix, **_options_of(os.environ)
        )
        self._given = url

    def __reduce__(self) -> tuple[Any, ...]:
        return _in_reloaded_process, (self._given,)


# "work" prints the name of the type.
CommandBackend.__name__ = SqlBackend.__name__


def _options_of(environment: Mapping[str, str]) -> dict[str, Any]:
    options = {}
    for variable, (option, convert) in VARIABLES.items():
        if given := environment.get(variable):
            try:
                options[option] = convert(given)
            except ValueError:
                raise ValueError(f"{variable} must be a number, not {given!r}") from None
    return options


def _in_reloaded_process(url: str) -> CommandBackend:
    """The worker of "work --reload" has a process of its own, where sheppy is as it came."""
    Host().install()
    return CommandBackend(url)


def backend_of(url: str) -> Backend | None:
    """None for a URL that may be one of sheppy's own."""
    scheme, separator, _ = url.partition("://")
    is_ours = not separator or scheme.lower().partition("+")[0] in SCHEMES
    return CommandBackend(url) if is_ours else None


class Host:
    """sheppy, in this process.

    Its commands print the URL that they are given. So they are given one without its secrets,
    and get the backend of the URL itself.
    """

    def __init__(self, create_backend: Callable[[str], Backend | None] = backend_of) -> None:
        self._create_backend = create_backend
        self._by_shown: dict[str, str] = {}

    def install(self) -> None:
        """Have sheppy ask `create_backend` first wherever it makes a backend from a URL.

        Where that returns None, sheppy goes on as ever. Reaches modules that were imported
        before as well. Once more, it replaces what it installed.
        """
        homes = [importlib.import_module(name) for name in HOMES if importlib.util.find_spec(name)]
        found = [vars(home)[FUNCTION] for home in homes if FUNCTION in vars(home)]
        if not found:
            raise _unknown(f"has no {FUNCTION}")
        for present in found:
            ours = self._wrap(getattr(present, "__wrapped__", present))
            for module in _host_modules():
                if vars(module).get(FUNCTION) is present:
                    setattr(module, FUNCTION, ours)

    def commands(self, find_url: Callable[[str | None], str]) -> dict[str, Any]:
        """The commands by name; `find_url` gets their --backend-url, None if it is not given."""
        try:
            from sheppy.cli.cli import app
        except ImportError:
            raise _unknown("has no sheppy.cli.cli.app") from None
        group = typer.main.get_group(app)
        options = list(_options(group))
        if not options:
            raise _unknown("has no commands with --backend-url")
        for option in options:
            # It is what SHEPPY_BACKEND_URL holds, and --help shows defaults.
            option.default = None
            option.callback = lambda _context, _option, url: self._hide(find_url(url))
        return {name: command for name, command in group.commands.items() if name not in NOT_OURS}

    def hide_in(self, message: str) -> str:
        """The message without the URLs that it may repeat."""
        for shown, url in self._by_shown.items():
            message = message.replace(url, shown)
        return message

    def _hide(self, url: str) -> str:
        shown = _urls.redact(url)
        self._by_shown[shown] = url
        return shown

    def _wrap(self, original: Callable[[str], Backend]) -> Callable[[str], Backend]:
        @functools.wraps(original)
        def create_backend_from_url(url: str) -> Backend:
            url = self._by_shown.get(url, url)
            return self._create_backend(url) or original(url)

        return create_backend_from_url


@contextmanager
def time_told_by(now: Callable[[], datetime]) -> Iterator[None]:
    """Meanwhile, all of sheppy in this process takes its time from `now`, which gives UTC."""

    class Told(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # as sheppy calls it
            moment = now()
            return moment.astimezone(tz) if tz else moment.astimezone().replace(tzinfo=None)

    replaced = []
    for module in _host_modules():
        present = vars(module).get("datetime")
        if isinstance(present, type) and issubclass(present, datetime):
            replaced.append((module, present))
            vars(module)["datetime"] = Told
    try:
        yield
    finally:
        for module, present in replaced:
            vars(module)["datetime"] = present


def name_of(function: Callable[..., Any]) -> str:
    """What a task of the function says that it runs."""
    return stringify_function(function)


def function_of(task: Task) -> Callable[..., Any]:
    """The function that a task runs; ValueError where there is none of that name."""
    return resolve_function(task.spec.func)


class Processor:
    """A worker's own, which keeps what a task or a middleware raised in `raised`."""

    def __init__(self, worker: Worker) -> None:
        self.raised: Exception | None = None
        self._processor = worker._task_processor
        worker._task_processor = self  # type: ignore[assignment]  # the worker calls one method only

    async def process_task(
        self, task: Task, queue: Queue, worker_id: str
    ) -> tuple[Exception | None, Task]:
        self.raised = None
        try:
            self.raised, task = await self._processor.process_task(task, queue, worker_id)
        except Exception as error:
            # Its own name for it tells less.
            self.raised = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise
        return self.raised, task


def _host_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.split(".")[0] == "sheppy"]


def _options(command: Any) -> Iterator[Any]:
    """The --backend-url of the command and of all below it."""
    yield from (option for option in command.params if option.name == OPTION)
    for subcommand in getattr(command, "commands", {}).values():
        yield from _options(subcommand)


def _unknown(what: str) -> UnknownHostError:
    return UnknownHostError(
        f"sheppy {sheppy.__version__} {what}, on which this command rests: "
        'run "pip install --upgrade sheppy-sql" or install an older sheppy'
    )
