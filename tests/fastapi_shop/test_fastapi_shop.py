"""The example: an order and its task are committed together, whoever dies."""

from __future__ import annotations

import asyncio
import importlib
import random
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sheppy import Queue
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from examples.fastapi_shop.tables import Base, Order, Receipt
from sheppy_sql import SqlBackend
from tests.fastapi_shop.serving import (
    ACCEPTED,
    REFUSED,
    Outcomes,
    client_of,
    place,
    place_all,
    serve,
)
from tests.faults.load import until
from tests.support.breeding import bred_by
from tests.support.databases import TestDatabase
from tests.support.processes import Child, Spawner

LEASE = 5.0  # seconds
CLIENTS = 16  # with an order each at a time
README = Path(__file__).parents[2] / "examples" / "fastapi_shop" / "README.md"


@pytest.fixture
async def engine(database: TestDatabase) -> AsyncIterator[AsyncEngine]:
    """On a database with the shop's tables."""
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
def emails(backend: SqlBackend) -> Queue:
    return Queue(backend, "emails")


async def ids(engine: AsyncEngine, column: Any) -> set[UUID]:
    async with engine.connect() as connection:
        return set(await connection.scalars(select(column)))


async def tasks_of_orders(emails: Queue) -> Counter[UUID]:
    """How many tasks each order has, whatever has become of them."""
    return Counter(UUID(task.spec.args[0]) for task in await emails.get_all_tasks())


async def check_receipts(engine: AsyncEngine, emails: Queue) -> set[UUID]:
    """The orders, once every one of them has its receipt, and its task exactly once."""

    async def all_sent() -> bool:
        return await ids(engine, Order.id) == await ids(engine, Receipt.order_id)

    async def all_ended() -> bool:
        return all(task.finished_at for task in await emails.get_all_tasks())

    await until(all_sent, "not every receipt was sent")
    await until(all_ended, "not every task has ended")
    orders = await ids(engine, Order.id)
    assert await tasks_of_orders(emails) == Counter(orders)
    assert {task.status for task in await emails.get_all_tasks()} == {"completed"}
    return orders


def settings(database: TestDatabase) -> dict[str, str]:
    return {"SHEPPY_BACKEND_URL": database.url, "SHEPPY_SQL_LEASE": str(LEASE)}


@pytest.mark.posix
async def test_commands_of_the_readme_start_a_shop_that_sends_receipts(
    empty_database: TestDatabase, spawn: Spawner
) -> None:
    programs = "|".join(("python", "sheppy-sql", "uvicorn"))
    lines = re.findall(rf"^ {{4}}({programs}) (.+)$", README.read_text("utf-8"), re.MULTILINE)
    commands = [[program, *arguments.split()] for program, arguments in lines]
    upgrade, make_tables, serve_shop, work = commands

    def start(program: str, *arguments: str) -> Child:
        script = [] if program == "python" else [str(Path(sys.executable).with_name(program))]
        return spawn.python(*script, *arguments, env=settings(empty_database))

    for command in (upgrade, make_tables):
        made = start(*command)
        assert await asyncio.to_thread(made.wait) == 0, made.report()
    server, _ = start(*serve_shop, "--port", "0"), start(*work)
    engine = create_async_engine(empty_database.url)
    emails = Queue(SqlBackend(engine), "emails")
    client = client_of(await port_of(server))
    orders = [uuid4() for _ in range(10)]
    cards = ["4242"] * 9 + ["declined"]
    for order_id, card, status in zip(orders, cards, [ACCEPTED] * 9 + [REFUSED], strict=True):
        assert await place(client, order_id, card) == status
    assert await place(client, orders[0], "4242") == ACCEPTED
    assert await check_receipts(engine, emails) == set(orders[:9])
    shown = [await client.get(f"/orders/{order_id}") for order_id in orders]
    assert [each.json() for each in shown[:9]] == [
        {"id": str(order_id), "total": 1250, "receipt_sent": True} for order_id in orders[:9]
    ]
    assert shown[9].status_code == 404
    await client.aclose()
    server.terminate()
    assert await asyncio.to_thread(server.wait) in {0, -signal.SIGTERM}, server.report()
    await emails.backend.disconnect()
    await engine.dispose()


async def port_of(server: Child) -> int:
    said = re.compile(r"running on http://127\.0\.0\.1:(\d+)")

    async def listens() -> bool:
        assert server.returncode is None, server.report()
        return said.search(server.stderr) is not None

    await until(listens, "the server does not listen")
    return int(said.findall(server.stderr)[0])


@pytest.fixture
def app(database: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The application's module, on the test's database."""
    name = "examples.fastapi_shop"
    for module in ("app", "tasks", "database"):
        monkeypatch.delitem(sys.modules, f"{name}.{module}", raising=False)
    monkeypatch.setenv("SHEPPY_BACKEND_URL", database.url)
    return importlib.import_module(f"{name}.app")


async def test_order_whose_commit_fails_is_not_answered_as_placed(
    app: Any, engine: AsyncEngine, emails: Queue
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    order_id = uuid4()
    order = {"id": str(order_id), "email": "ann", "total": 1, "card": "4242"}
    transport = httpx.ASGITransport(app.app, raise_app_exceptions=False)
    async with (
        app.lifespan(app.app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        event.listen(app.engine.sync_engine, "commit", fail)
        assert (await client.post("/orders", json=order)).status_code == 500
        event.remove(app.engine.sync_engine, "commit", fail)
        assert (await ids(engine, Order.id), await emails.size()) == (set(), 0)
        assert (await client.post("/orders", json=order)).status_code == ACCEPTED
    assert (await ids(engine, Order.id), await emails.size()) == ({order_id}, 1)


@pytest.mark.torture
@pytest.mark.posix
@pytest.mark.timeout(300)
async def test_every_committed_order_has_its_task_once_whichever_processes_die(
    database: TestDatabase, engine: AsyncEngine, emails: Queue, spawn: Spawner
) -> None:
    embedded = database.dialect == "sqlite"
    servers, count, clients = (3, 150, 4) if embedded else (8, 1000, CLIENTS)
    rng = random.Random(11)
    orders = [
        (UUID(int=rng.getrandbits(128)), "declined" if rng.random() < 0.2 else "4242")
        for _ in range(count)
    ]
    breeder = spawn(serve, str(servers), env=settings(database))
    port = (await asyncio.to_thread(breeder.wait_for, "port")).split()[1]
    script = str(Path(sys.executable).with_name("sheppy-sql"))
    kills = Counter[str]()

    outcomes = Outcomes()

    # By what was answered, not by time: on a slow machine nothing else would happen.
    async def after_answers(fewest: int, most: int) -> None:
        target = outcomes.answered + rng.randint(fewest, most)

        async def are_there() -> bool:
            return outcomes.answered >= target

        await until(are_there, f"there are not {target} answers", timeout=150)
        await asyncio.sleep(rng.uniform(0, 0.05))

    def kill_server() -> None:
        if alive := bred_by(breeder):
            rng.choice(alive).kill()
            kills["servers"] += 1

    async def kill_servers() -> None:
        while True:
            await after_answers(2, 25)
            # Beside the event loop: while it is held up, the servers answer all that it has asked.
            await asyncio.to_thread(kill_server)

    async def kill_workers() -> None:
        def start() -> Child:
            return spawn.python(script, "work", "--queue", "emails", env=settings(database))

        workers = [start(), start()]
        while True:
            await after_answers(count // 10, count // 5)
            workers.pop(0).kill()
            workers.append(start())
            kills["workers"] += 1

    killing = [asyncio.create_task(kill_servers()), asyncio.create_task(kill_workers())]
    async with client_of(int(port)) as client:
        await asyncio.gather(
            *(place_all(client, orders[number::clients], outcomes) for number in range(clients))
        )
    for killer in killing:
        killer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await killer
    breeder.kill()

    committed = await check_receipts(engine, emails)
    good = {order_id for order_id, card in orders if card != "declined"}
    found = len(committed & outcomes.unanswered)
    print(
        f"{dict(kills)}: {len(outcomes.accepted)} accepted, {len(outcomes.refused)} refused, "
        f"{len(outcomes.unanswered)} without an answer, {found} of which are there; "
        f"{outcomes.repeated} requests repeated"
    )
    assert outcomes.accepted <= committed <= good
    assert not outcomes.refused & committed
    assert committed <= outcomes.accepted | outcomes.unanswered
    assert len(committed) > count / 2
    assert kills["servers"] > count / 50
    assert outcomes.unanswered or outcomes.repeated
