"""Revisions to come, made here: an additive one under running workers, and a breaking one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from sheppy import BackendError, Queue, Task, Worker

from sheppy_sql import SqlBackend, migrate
from sheppy_sql.schema import SCHEMA_VERSION
from tests.host import tasks
from tests.support import make_worker
from tests.support.databases import TestDatabase

ADDITIVE = SCHEMA_VERSION + 1
BREAKING = SCHEMA_VERSION + 2
QUEUE = "test"
PATIENCE = 60.0  # seconds

REVISION = """
import sqlalchemy as sa
from alembic import op
from sqlalchemy.sql import quoted_name
from sheppy_sql.migrate import add_column, create_index, names_in_use, short_locks

revision = "sheppy_sql_{version:04}"
down_revision = "sheppy_sql_{before:04}"
branch_labels = depends_on = None


@short_locks
def upgrade():
    schema, prefix = names_in_use()
    {steps}
    stamp = sa.table(f"{{prefix}}schema", sa.column("version"), sa.column("oldest_code"))
    op.execute(stamp.update().values(version={version}, oldest_code={oldest_code}))


def downgrade():
    raise NotImplementedError
"""
ADDS = """
    column = sa.Column("priority", sa.Integer, nullable=False, server_default=sa.text("0"))
    add_column(f"{prefix}tasks", column, schema=schema)
    create_index(f"{prefix}tasks_priority", f"{prefix}tasks", ["queue", "priority"])
    op.create_table(f"{prefix}batches", sa.Column("id", sa.Text, primary_key=True))
"""
BREAKS = """
    op.drop_column(f"{prefix}tasks", "func")
"""


@pytest.fixture(autouse=True)
def revisions(database: TestDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this release, which made `database`, and two more."""
    folder = tmp_path / "migrations"
    shutil.copytree(migrate.scripts(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(migrate, "scripts", lambda: folder)
    for version, oldest_code, steps in (
        (ADDITIVE, SCHEMA_VERSION, ADDS),
        (BREAKING, BREAKING, BREAKS),
    ):
        text = REVISION.format(
            version=version, before=version - 1, oldest_code=oldest_code, steps=steps.strip()
        )
        (folder / "versions" / f"{version:04}_to_come.py").write_text(text, "utf-8")


@contextlib.asynccontextmanager
async def working(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    running = asyncio.create_task(worker.work(register_signal_handlers=False))
    try:
        yield running
    finally:
        worker._shutdown_event.set()
        await asyncio.wait([running])


async def upgrade(database: TestDatabase, version: int) -> None:
    await asyncio.to_thread(migrate.upgrade, database.url, revision=f"sheppy_sql_{version:04}")


async def test_workers_run_through_an_additive_revision(
    database: TestDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sheppy_sql")
    backend, producer = SqlBackend(database.worker_url), SqlBackend(database.worker_url)
    queue = Queue(producer, QUEUE)
    added: list[Task | UUID | str] = []
    expected = {}
    upgraded = asyncio.Event()

    async def produce() -> None:
        # Before, while and after.
        left = 20
        while left:
            task = tasks.add(len(added), 1)
            assert await queue.add(task)
            added.append(task)
            expected[task.id] = task.spec.args[0] + 1
            left -= upgraded.is_set()

    async with working(make_worker(backend, QUEUE)) as running:
        producing = asyncio.create_task(produce())
        await upgrade(database, ADDITIVE)
        upgraded.set()
        await asyncio.wait_for(producing, PATIENCE)
        done = await queue.wait_for(added, timeout=PATIENCE)
        assert not running.done()
    assert {task_id: task.result for task_id, task in done.items()} == expected
    assert await database.fetch("SELECT version FROM sheppy_schema") == [(ADDITIVE,)]
    assert await database.fetch("SELECT crashes FROM sheppy_tasks") == []
    await backend.disconnect()
    await producer.disconnect()
    another = SqlBackend(database.worker_url)
    await another.connect()
    assert await another.append("q", [{"id": "a"}]) == [True]
    await another.disconnect()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert f"The tables have version {ADDITIVE}, newer than" in caplog.text


async def test_breaking_revision_refuses_this_code_and_loses_nothing(
    database: TestDatabase,
) -> None:
    running = SqlBackend(database.worker_url, outage_grace=1)
    await running.connect()
    assert await running.append("q", [{"id": "before"}]) == [True]
    await upgrade(database, BREAKING)
    another = SqlBackend(database.worker_url)
    with pytest.raises(BackendError) as caught:
        await another.connect()
    assert str(caught.value) == (
        f"Failed to connect: the tables have version {BREAKING}, which this sheppy-sql (made for "
        f'{SCHEMA_VERSION}) can no longer use; run "pip install --upgrade sheppy-sql"'
    )
    # One that is connected meets what has changed.
    with pytest.raises(BackendError, match="the tables are of another version"):
        await running.append("q", [{"id": "after"}])
    await running.disconnect()
    assert await database.fetch("SELECT id FROM sheppy_tasks") == [("before",)]
