"""The documentation: its programs run, its statements work, and what it names exists."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import sheppy.cli.cli
import typer.main
from sheppy import BackendError, Queue, Task, task
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from trustme import CA
from typer.core import TyperGroup

from sheppy_sql import (
    BoundBackend,
    SqlBackend,
    TransactionConflictError,
    _urls,
    cli,
    migrate,
)
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.support.postgres import PostgresServer
from tests.support.processes import Spawner, environment
from tests.support.urls import no_defaults as no_defaults
from tests.transactions.applications import engine_url

ROOT = Path(__file__).parents[1]
GUIDES = [
    "README.md",
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
    "examples/fastapi_shop/README.md",
]
PAGES = [*GUIDES, "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]

# A block of Python is found by a line of it; each has a test below.
PROGRAM = "async def greet("
ENGINE = "\nengine = create_async_engine("
ROUTER = "app.include_router("
WORKER = ").work()"
ROLES = 'schema="sheppy")'
ASYNC_ENVIRONMENT = "asyncio.run(run_online())"
SYNC_ENVIRONMENT = "\nengine = create_engine("
HOOKS = "then=mine,"
MIDDLEWARE = "middleware=[children_with_result]"
CHECKOUT = "async def check_out("
BINDING = "database = create_async_engine("
CONNECTION = "async def import_order("
ROUTE = '@app.post("/orders/{order_id}"'
WAITING = "async def place_and_wait("
CONFLICTS = "except TransactionConflictError"
COMPLETION = "backend.complete(current)"
DJANGO = "from django.db import connection, transaction"
SQLALCHEMY = "with Session(database) as session"
FIXTURES = "pytest_plugins ="
SHOP = "async def place_order(queue"
ASSERTING = "async def test_order_gets_a_receipt("
CLOCK = "async def test_label_is_printed_once_the_printer_works("
UNITTEST = "[receipt] = await drain(queue)\n    print("
ROLLBACK = "async def test_stored_order_gets_a_receipt("
# Parts of a proposal: to be read, not run.
SKETCHES = ("def create_backend(",)

URL = re.compile(r"(?:postgres|postgresql|sqlite)(?:\+\w+)?://[^\s\"'`|]*")


@task
async def double(number: int) -> int:
    return 2 * number


@task
async def then_double(number: int) -> Task:
    return double(number)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.DOTALL | re.MULTILINE)


def block(page: str, part: str, language: str = "python") -> str:
    [found] = [text for text in blocks(page, language) if part in text]
    return found


def source(page: str, part: str, url: str) -> str:
    """A block of Python on another database."""
    return URL.sub(lambda _: url, block(page, part))


def names(page: str, part: str, url: str, directory: Path) -> dict[str, Any]:
    """What a block of Python defines, run in this process."""
    file = directory / "block.py"
    file.write_text(source(page, part, url), "utf-8")
    return runpy.run_path(str(file))


def run(*command: str, directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What a program printed; it must have succeeded."""
    ran = subprocess.run(
        command, cwd=directory, env=environment(env), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def code(page: str) -> Iterator[str]:
    """The lines that are code, in blocks and in the text."""
    text = re.sub(r"^```(?:diff|toml)\n.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for fenced in re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield from fenced.splitlines()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"^ {4,}(.+)$", text, re.MULTILINE)
    yield from re.findall(r"(?<!`)`([^`\n]+)`", text)


def table(page: str, first_column: str) -> list[list[str]]:
    """The cells of the table with this heading, row by row."""
    rows = read(page).partition(f"| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_block_of_python_is_tested_or_a_sketch() -> None:
    tested = (
        *(FIXTURES, SHOP, ASSERTING, CLOCK, UNITTEST, ROLLBACK),
        *(DJANGO, SQLALCHEMY),
        *(PROGRAM, ENGINE, ROUTER, WORKER, ROLES, MIDDLEWARE),
        *(ASYNC_ENVIRONMENT, SYNC_ENVIRONMENT, HOOKS),
        *(COMPLETION, CHECKOUT, BINDING, CONNECTION, ROUTE, WAITING, CONFLICTS),
    )
    for page in GUIDES:
        for text in blocks(page, "python"):
            compile(text, page, "exec")
            assert sum(part in text for part in (*tested, *SKETCHES)) == 1, text


@pytest.mark.posix
def test_program_runs_on_every_database(database: TestDatabase, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(source("README.md", PROGRAM, database.url), "utf-8")
    # In its directory: sheppy finds the task of a program by the path from there.
    ran = run(sys.executable, "hello.py", directory=tmp_path)
    assert (ran.stdout, ran.stderr) == ("Hello, world!\n", "")


async def test_engine_of_the_application_is_shared(database: TestDatabase, tmp_path: Path) -> None:
    found = names("README.md", ENGINE, database.url, tmp_path)
    queue: Queue = found["queue"]
    assert await queue.add(double(1))
    assert await queue.size() == 1
    await queue.backend.disconnect()
    async with found["engine"].connect():
        pass
    await found["engine"].dispose()


async def test_router_serves_the_queues(database: TestDatabase, tmp_path: Path) -> None:
    found = names("README.md", ROUTER, database.url, tmp_path)
    app, backend = found["app"], found["backend"]
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app):
        await Queue(backend, "emails").add(double(1))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            assert (await client.get("/sheppy/queues")).json() == {"emails": 1}
    assert not backend.is_connected


@pytest.mark.posix
async def test_worker_with_options_works_until_it_is_stopped(
    database: TestDatabase, backend: SqlBackend, spawn: Spawner
) -> None:
    child = spawn.script(source("README.md", WORKER, database.url))
    queue, number = Queue(backend, "reports"), double(21)
    await queue.add(number)
    finished = await queue.wait_for(number, timeout=60)
    assert finished is not None
    assert finished.result == 42
    child.terminate()
    assert child.wait() == 0, child.report()
    assert child.stderr == ""


async def test_worker_with_the_middleware_enqueues_a_tasks_children(
    database: TestDatabase, tmp_path: Path
) -> None:
    found = names("docs/durability.md", MIDDLEWARE, database.url, tmp_path)
    queue, parent = Queue(found["backend"], "emails"), then_double(21)
    await queue.add(parent)
    await run_worker(found["worker"], max_tasks=2)
    assert sorted(str(task.result) for task in await queue.get_all_tasks())[0] == "42"
    await found["backend"].disconnect()


TRANSACTIONS = "docs/transactions.md"


@pytest.fixture
async def shop(
    database: TestDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """The module that the blocks on transactions import, with its table."""
    (tmp_path / "shop.py").write_text(source(TRANSACTIONS, BINDING, database.url), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    shop = importlib.import_module("shop")
    async with shop.database.begin() as connection:
        await connection.run_sync(shop.Base.metadata.create_all)
    yield shop
    await shop.backend.disconnect()
    await shop.database.dispose()
    del sys.modules["shop"]


async def check_orders(shop: Any, *order_ids: int) -> None:
    """Fails unless there are these orders, and a task for each."""
    async with shop.database.connect() as connection:
        orders = await connection.scalars(select(shop.Order.id).order_by(shop.Order.id))
    tasks = await Queue(shop.backend, "emails").get_all_tasks()
    assert (list(orders), sorted(task.spec.args[0] for task in tasks)) == ([*order_ids],) * 2


async def test_order_and_its_task_are_stored_together(
    shop: Any, database: TestDatabase, tmp_path: Path
) -> None:
    await shop.take_order(1)
    with pytest.raises(IntegrityError):
        await shop.take_order(1)
    await check_orders(shop, 1)
    import_order = names(TRANSACTIONS, CONNECTION, "", tmp_path)["import_order"]
    async with shop.database.connect() as connection:
        await import_order(connection, 2)
        await connection.rollback()
        await import_order(connection, 3)
        await connection.commit()
    found = names("README.md", CHECKOUT, database.url, tmp_path)
    async with shop.sessions() as session:
        await found["check_out"](session, shop.Order(id=4))
    await found["backend"].disconnect()
    await check_orders(shop, 1, 3, 4)


async def test_route_stores_an_order_with_its_task(shop: Any, tmp_path: Path) -> None:
    transport = httpx.ASGITransport(
        names(TRANSACTIONS, ROUTE, "", tmp_path)["app"], raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        answers = [(await client.post("/orders/1")).status_code for _ in range(2)]
    # The second fails at its commit, which comes before the response.
    assert answers == [201, 500]
    await check_orders(shop, 1)


async def test_task_is_waited_for_after_the_commit(shop: Any, tmp_path: Path) -> None:
    place_and_wait = names(TRANSACTIONS, WAITING, "", tmp_path)["place_and_wait"]
    working = asyncio.create_task(run_worker(make_worker(shop.backend, "emails"), 1))
    assert await place_and_wait(1) == "Order 1 has been placed"
    await working


async def test_transaction_that_met_another_is_run_again(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind, bound = shop.backend.bind, []

    def conflict_once(session: AsyncSession) -> BoundBackend:
        bound.append(session)
        if len(bound) == 1:
            raise TransactionConflictError
        return bind(session)  # type: ignore[no-any-return]  # of a module made by the test

    monkeypatch.setattr(shop.backend, "bind", conflict_once)
    await names(TRANSACTIONS, CONFLICTS, "", tmp_path)["place_strictly"](1)
    assert len(bound) == 2
    await check_orders(shop, 1)


async def test_task_completes_in_its_transaction(
    database: TestDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = source("docs/transactions.md", COMPLETION, database.url)
    (tmp_path / "shop.py").write_text(page, "utf-8")
    # sheppy finds a task by its module.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    shop: Any = importlib.import_module("shop")
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        await connection.run_sync(shop.Base.metadata.create_all)
    await engine.dispose()

    queue, placed = Queue(shop.backend, "orders"), shop.place_order(1, 20)
    await queue.add(placed)
    await run_worker(make_worker(shop.backend, "orders"), max_tasks=1)
    done = await queue.wait_for(placed, timeout=30)
    assert done is not None
    assert (done.status, done.result) == ("completed", {"order": 1})
    assert await database.fetch("SELECT id, total FROM orders") == [(1, 20)]
    [receipt] = await Queue(shop.backend, "emails").get_pending(10)
    assert receipt.spec.args[0] == 1
    await shop.backend.disconnect()
    del sys.modules["shop"]


@pytest.mark.parametrize("part", [DJANGO, SQLALCHEMY])
async def test_synchronous_programs_enqueue_with_their_orders(
    part: str, database: TestDatabase, backend: SqlBackend, spawn: Spawner, tmp_path: Path
) -> None:
    url = engine_url(database).render_as_string(hide_password=False)
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "models.py").write_text("from examples.django_shop.shop import Order\n", "utf-8")
    (shop / "tables.py").write_text("from examples.flask_shop.shop import Base, Order\n", "utf-8")
    (shop / "tasks.py").write_text(RECEIPTS, "utf-8")
    (shop / "__init__.py").touch()
    setup = DJANGO_SETUP if part == DJANGO else SQLALCHEMY_SETUP
    program = f"{source('docs/transactions.md', part, url)}\n{setup}\nprint(place_order(7))\n"
    env = {"DATABASE_URL": url, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    first = "import examples.django_shop.shop\n" if part == DJANGO else ""
    child = spawn.script(first + program, env=env)
    assert child.wait() == 0, child.report()
    queue, receipt = Queue(backend, "emails"), child.stdout.strip()
    assert [str(task.id) for task in await queue.get_pending()] == [receipt]
    assert await database.fetch("SELECT total FROM orders") == [(7,)]


RECEIPTS = """
from sheppy import task

@task
async def send_receipt(order_id: int) -> str:
    return f"sent for {order_id}"
"""
DJANGO_SETUP = """
with connection.schema_editor() as editor:
    editor.create_model(Order)
assert get_receipt.__annotations__ == {"task_id": str, "return": str | None}
"""
SQLALCHEMY_SETUP = """
from shop.tables import Base
Base.metadata.create_all(database)
"""


async def test_two_roles_are_enough_and_the_statements_work(
    private_server: Callable[..., PostgresServer], tmp_path: Path
) -> None:
    page, server = "docs/postgresql.md", private_server()
    first = await asyncpg.connect(server.url(driver=None))
    await first.execute("CREATE DATABASE app")
    await first.close()
    admin = await asyncpg.connect(server.url("app", driver=None))
    await admin.execute(block(page, "CREATE ROLE", "sql"))
    owner, app = server.url("app", user="app_owner"), server.url("app", user="app")
    migrate.upgrade(owner, schema="sheppy")

    queue = Queue(names(page, ROLES, app, tmp_path)["backend"], "emails")
    number = double(1)
    await queue.add(number)
    [popped] = await queue.backend.pop("emails")
    [claimed] = await admin.fetch(block(page, "'claimed'", "sql"))
    assert (claimed["queue"], claimed["id"]) == ("emails", str(number.id))
    assert f"-{os.getpid()}-" in claimed["owner"]

    assert await queue.retry(number.id)
    assert await queue.backend.pop("emails") == [popped]
    done = {**popped, "status": "completed", "finished_at": "2030-01-01T00:00:00Z"}
    await queue.backend.store_result("emails", done)
    delete = block(page, "DELETE FROM", "sql")
    assert await admin.execute(delete) == "DELETE 0"
    await admin.execute("UPDATE sheppy.sheppy_results SET expires_at = now() - interval '2 days'")
    assert await admin.execute(delete) == "DELETE 1"
    assert await queue.clear() == 0
    await queue.backend.disconnect()
    assert migrate.current(app, schema="sheppy").version is not None
    with pytest.raises(
        BackendError, match=r"must be owner of table sheppy_results .* migrate as the owner"
    ):
        migrate.downgrade(app, schema="sheppy")

    # The same without default privileges, and in a schema that is not ours alone.
    migrate.upgrade(owner, schema="sheppy", table_prefix='o"dd ')
    await admin.execute("REVOKE ALL ON ALL TABLES IN SCHEMA sheppy FROM app")
    await admin.execute("REVOKE ALL ON ALL SEQUENCES IN SCHEMA sheppy FROM app")
    statements = migrate.grant_sql("app", schema="sheppy", table_prefix='o"dd ')
    granted = SqlBackend(app, schema="sheppy", table_prefix='o"dd ')
    with pytest.raises(BackendError, match="db grant"):
        await granted.connect()
    await admin.execute(statements)
    await granted.connect()
    assert await granted.append("q", [{"id": "a"}]) == [True]
    await granted.disconnect()
    await admin.close()


def test_hook_hides_both_installations_and_asks_the_applications(tmp_path: Path) -> None:
    include = names("docs/migrations.md", HOOKS, "", tmp_path)["include_name"]
    assert not include("sheppy_tasks", "table", {"schema_name": None})
    assert not include("jobs_tasks", "table", {"schema_name": "reports"})
    assert not include("spatial_ref_sys", "table", {"schema_name": None})
    assert include("users", "table", {"schema_name": None})


@pytest.mark.torture
async def test_examples_of_testing_pass(database: TestDatabase, tmp_path: Path) -> None:
    page = "docs/testing.md"
    for name, part in {
        "conftest.py": FIXTURES,
        "shop.py": SHOP,
        "test_asserting.py": ASSERTING,
        "test_clock.py": CLOCK,
        "program.py": UNITTEST,
    }.items():
        (tmp_path / name).write_text(block(page, part), "utf-8")
    (tmp_path / "test_rollback.py").write_text(source(page, ROLLBACK, database.url), "utf-8")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "pythonpath = .\nfilterwarnings = error\n",
        "utf-8",
    )
    await database.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
    ran = run(sys.executable, "-m", "pytest", "-p", "no:xdist", directory=tmp_path)
    assert "3 passed" in ran.stdout
    assert await database.fetch("SELECT id FROM orders") == []
    assert await database.fetch("SELECT id FROM sheppy_results") == []
    ran = run(sys.executable, "program.py", directory=tmp_path)
    assert ran.stdout == "receipt of order 1\n"


def test_options_table_is_the_signature_and_its_docstring() -> None:
    parameters = [
        parameter
        for parameter in inspect.signature(SqlBackend).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    rows = table("README.md", "option")
    assert [row[0] for row in rows] == [f"`{each.name}`" for each in parameters]
    described = re.split(r"^ {4,}(\w+): ", inspect.getdoc(SqlBackend) or "", flags=re.MULTILINE)
    said = dict(zip(described[1::2], described[2::2], strict=True))
    for (_, default, _), parameter in zip(rows, parameters, strict=True):
        literal, remark = re.fullmatch(r"`([^`]+)`(?: \((.+)\))?", default or "").groups()  # type: ignore[union-attr]  # a failure is one either way
        value = ast.literal_eval(literal)
        assert (value, type(value)) == (parameter.default, type(parameter.default))
        stated = re.search(r"Default ([\d.]*\d(?: days| MiB)?)\.", said[parameter.name])
        if stated:
            assert stated[1] == remark or float(stated[1]) == value
        else:
            assert remark is None


def test_variables_of_the_environment_are_read_somewhere() -> None:
    package, host = Path(cli.__file__).parent, Path(sheppy.__file__).parent
    text = "".join(path.read_text("utf-8") for p in (package, host) for path in p.rglob("*.py"))
    named = {row[0].strip("`") for row in table("README.md", "variable")}
    assert len(named) == 12
    assert named == {name for name in named if f'"{name}"' in text}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), target


def anchors(text: str) -> set[str]:
    """The names that headings get on GitHub."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    for line in code(page):
        assert set(re.findall(r"\bmake ([a-z]+)", line)) <= targets, line
        for words in re.findall(r"\bsheppy-sql((?: [^\s`|;)\"]+)+)", line):
            check_command(words.split())


def check_command(words: list[str]) -> None:
    """Fails unless the words begin with a command and name options that it has."""
    host, ours = (typer.main.get_command(each) for each in (sheppy.cli.cli.app, cli.app))
    assert isinstance(host, TyperGroup)
    assert isinstance(ours, TyperGroup)
    command: Any = TyperGroup(commands={**host.commands, **ours.commands})
    command.params = ours.params
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, name
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= options, words


@pytest.mark.usefixtures("no_defaults")
@pytest.mark.parametrize("page", PAGES)
def test_urls_are_accepted(page: str, tmp_path: Path) -> None:
    root = tmp_path / "provider.pem"
    CA().cert_pem.write_to_path(str(root))
    for line in code(page):
        for url in URL.findall(re.sub(r"(?<=sslrootcert=)/[^\s`]+", str(root), line)):
            # Neither an example of a scheme alone, nor one with a variable in it, nor one for a
            # synchronous engine of the application's.
            if not re.search(r"://$|\.\.\.|\$|\+psycopg:", url):
                _urls.parse(url)


def test_commands_for_windows_are_those_that_run_there() -> None:
    written = re.findall(r"^ +(\.venv\\.+)$", read("README.md"), re.MULTILINE)
    workflow = read(".github/workflows/ci.yml")
    assert len(written) == 3
    assert [line for line in written if f"- run: {line}\n" in workflow] == written
