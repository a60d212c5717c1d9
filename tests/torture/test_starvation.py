"""Several processes put tasks in line, in every way there is, and none is left behind."""

from __future__ import annotations

import os

import pytest

from tests.support.databases import TestDatabase
from tests.support.processes import Spawner

PROCESSES = 3
SECONDS = float(os.environ.get("SHEPPY_SQL_FLOOR_SECONDS", "60"))
"""Ten minutes are SHEPPY_SQL_FLOOR_SECONDS=600."""

SOURCE = """
import asyncio, sys
from tests.torture.floors import Actor

asyncio.run(Actor(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run())
"""


@pytest.mark.torture
@pytest.mark.timeout(SECONDS + 240)
async def test_no_task_is_left_below_a_floor(
    postgres_database: TestDatabase, spawn: Spawner
) -> None:
    await postgres_database.execute("CREATE TABLE accepted (id text PRIMARY KEY)")
    children = [
        spawn.script(SOURCE, postgres_database.url, str(number), str(SECONDS))
        for number in range(PROCESSES)
    ]
    codes = [child.wait(SECONDS + 180) for child in children]
    [(accepted,)] = await postgres_database.fetch("SELECT count(*) FROM accepted")
    left = await postgres_database.fetch(
        "SELECT id FROM accepted WHERE id NOT IN (SELECT id FROM sheppy_results) ORDER BY id"
    )
    assert left == []
    assert codes == [0] * PROCESSES
    assert accepted > SECONDS
