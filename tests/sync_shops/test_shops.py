"""The examples of synchronous code: orders and their tasks, in Django and in Flask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from sheppy import Queue

from sheppy_sql import SqlBackend
from tests.support import make_worker, run_worker
from tests.support.databases import TestDatabase
from tests.support.processes import Spawner
from tests.sync_shops.customers import in_django, in_flask
from tests.sync_shops.django_project import check
from tests.transactions.applications import engine_url


@pytest.mark.parametrize("shop", [in_django, in_flask])
async def test_orders_are_placed_with_their_tasks_and_not_without(
    database: TestDatabase,
    backend: SqlBackend,
    spawn: Spawner,
    shop: Callable[[str], None],
) -> None:
    url = engine_url(database).render_as_string(hide_password=False)
    child = spawn(shop, url)
    status, _ = await asyncio.gather(
        asyncio.to_thread(child.wait, 90),
        run_worker(make_worker(backend, "emails"), max_tasks=3, timeout=90),
    )
    assert status == 0, child.report()
    bought = json.loads(child.stdout)
    assert bought["statuses"] == [201, 201, 400]
    assert bought["receipts"] == [
        [200, "Receipt for order 1: 500 cents"],
        [200, "Receipt for order 2: 2000 cents"],
    ]
    assert await database.fetch("SELECT total FROM orders ORDER BY total") == [(500,), (2000,)]
    results = [task.result for task in await Queue(backend, "emails").get_all_tasks()]
    assert sorted(map(str, results)) == [
        "Receipt for order 1: 500 cents",
        "Receipt for order 2: 2000 cents",
        "Voucher for order 2",
    ]


def test_calls_keep_to_djangos_rules_for_transactions(
    database: TestDatabase, spawn: Spawner
) -> None:
    child = spawn(check, engine_url(database).render_as_string(hide_password=False))
    assert child.wait() == 0, child.report()
    assert child.stderr == ""
