"""What sheppy_sql._host relies on in sheppy; a release that changes it fails here first."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sheppy
import sheppy.queue
import typer.main
from sheppy import Backend, MemoryBackend, Queue
from sheppy.cli.cli import app
from typer.core import TyperGroup

from sheppy_sql._host import FUNCTION, HOMES, OPTION, Host, UnknownHostError
from tests.support.processes import Spawner

URL = "ours://user:hunter2@host"
FOLDER = Path(sheppy.__file__).parent
INSTALL = """
from sheppy import MemoryBackend
from sheppy_sql._host import Host

class Ours(MemoryBackend):
    pass

Host(lambda url: Ours()).install()
"""
REPORT = f"""
import json, sys
print(json.dumps({{
    name: type(module.{FUNCTION}("ours://")).__name__
    for name, module in list(sys.modules.items())
    if name.startswith("sheppy.") and hasattr(module, "{FUNCTION}")
}}))
"""


class Ours(MemoryBackend):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """Not installed; what it installs goes with the test."""
    for name, module in sys.modules.items():
        if name.startswith("sheppy.") and hasattr(module, FUNCTION):
            monkeypatch.setattr(module, FUNCTION, getattr(module, FUNCTION))
    return Host(lambda url: Ours(url) if url.startswith("ours:") else None)


def users_of_the_function() -> set[str]:
    """The modules of sheppy that use it, by their source."""
    return {
        ".".join(("sheppy", *file.relative_to(FOLDER).with_suffix("").parts))
        for file in FOLDER.rglob("*.py")
        if FUNCTION in file.read_text("utf-8")
    }


def leaves(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(command, TyperGroup):
        for name, subcommand in command.commands.items():
            yield from leaves(subcommand, *path, name)
    else:
        yield " ".join(path), command


def test_function_takes_a_url_and_returns_a_backend() -> None:
    homes = [sys.modules[name] for name in HOMES if name in sys.modules]
    assert homes
    for home in homes:
        signature = inspect.signature(getattr(home, FUNCTION), eval_str=True)
        assert [(name, p.annotation) for name, p in signature.parameters.items()] == [("url", str)]
        assert signature.return_annotation is Backend


@pytest.mark.parametrize("order", ["installed first", "sheppy imported first"])
def test_every_module_of_sheppy_gets_our_function(spawn: Spawner, order: str) -> None:
    import_all = "import sheppy.cli.cli\n"
    parts = (INSTALL, import_all) if order == "installed first" else (import_all, INSTALL)
    child = spawn.script("".join([*parts, REPORT]))
    assert child.wait() == 0
    assert json.loads(child.stdout) == dict.fromkeys(users_of_the_function(), "Ours")


def test_commands_of_sheppy_are_those_we_know() -> None:
    commands = dict(leaves(typer.main.get_command(app)))
    with_url = {
        name
        for name, command in commands.items()
        if any(option.name == OPTION for option in command.params)
    }
    without = {"dev-server", "task test"}
    assert with_url == {
        "work",
        "cron list",
        "queue list",
        *(f"task {name}" for name in ("add", "info", "list", "retry", "schedule")),
    }
    assert commands.keys() - with_url == without


def test_queue_gets_our_backend_by_its_url(host: Host) -> None:
    host.install()
    backend = Queue(URL).backend
    assert isinstance(backend, Ours)
    assert backend.url == URL


def test_other_urls_are_left_to_sheppy(host: Host) -> None:
    host.install()
    assert type(Queue("memory://").backend) is MemoryBackend
    with pytest.raises(ValueError, match="Unsupported backend protocol: mysql"):
        Queue("mysql://host")


def test_installing_again_replaces_what_was_installed(host: Host) -> None:
    host.install()
    Host(lambda _url: None).install()
    with pytest.raises(ValueError, match="Unsupported backend protocol: ours"):
        Queue(URL)


def test_commands_see_a_redacted_url_and_get_the_backend_of_the_real_one(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def worker(_queues: Any, backend: Any, *_: Any) -> None:
        seen.append(backend.url)

    printed: list[str] = []
    monkeypatch.setattr("sheppy.cli.commands.work._start_worker", worker)
    monkeypatch.setattr("sheppy.cli.commands.work.console.print", lambda *a: printed.extend(a))
    host.install()
    commands = host.commands(find_url=lambda url: url or URL)
    for arguments in ([], ["-u", URL], [f"--backend-url={URL}"]):
        commands["work"].main(args=arguments, standalone_mode=False)
    assert seen == [URL] * 3
    assert "ours://user:***@host" in "".join(printed)
    assert "hunter2" not in "".join(printed)
    assert host.hide_in(f"no {URL}") == "no ours://user:***@host"


def test_function_may_move_to_its_later_home(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    later = ModuleType("sheppy._queue")
    setattr(later, FUNCTION, lambda _url: MemoryBackend())
    monkeypatch.setitem(sys.modules, "sheppy._queue", later)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in sys.modules or None)
    monkeypatch.delattr("sheppy.queue." + FUNCTION)

    host.install()
    create_backend = getattr(later, FUNCTION)
    assert isinstance(create_backend(URL), Ours)
    assert type(create_backend("memory://")) is MemoryBackend


def test_sheppy_made_differently_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    other = typer.Typer()
    other.command()(lambda: None)
    monkeypatch.setattr("sheppy.cli.cli.app", other)
    with pytest.raises(UnknownHostError, match="has no commands with --backend-url"):
        host.commands(str)
    monkeypatch.delattr("sheppy.cli.cli.app")
    with pytest.raises(UnknownHostError, match=r"has no sheppy\.cli\.cli\.app"):
        host.commands(str)
    monkeypatch.delattr("sheppy.queue." + FUNCTION)
    with pytest.raises(UnknownHostError, match=rf"sheppy \S+ has no {FUNCTION}"):
        host.install()
