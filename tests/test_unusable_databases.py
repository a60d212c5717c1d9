"""Databases that cannot be used: one clear error that says what to do."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sheppy import BackendError

from sheppy_sql import SqlBackend, migrate
from tests.contract.tasks import FUTURE, QUEUE, make_task
from tests.support.databases import TestDatabase

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer

MakeServer = Callable[..., "PostgresServer"]

PASSWORD = "p4ssw0rd-of-ours"
UPGRADE = "sheppy-sql db upgrade"


async def refusal(url: str, **options: object) -> str:
    """What connect() says, which must be one line and hold no password."""
    backend = SqlBackend(url, **options)  # type: ignore[arg-type]  # options by name
    with pytest.raises(BackendError) as caught:
        await asyncio.wait_for(backend.connect(), 30)
    assert backend.is_connected is False
    await backend.disconnect()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + repr(backend)
    assert "sqlalche.me" not in message
    return message


async def test_unreachable_server_is_named_as_such() -> None:
    said = await refusal(f"postgresql+asyncpg://app:{PASSWORD}@127.0.0.1:9/app")
    assert "check that the server runs" in said


async def test_unknown_host_is_named_as_such() -> None:
    said = await refusal(f"postgresql+asyncpg://app:{PASSWORD}@nowhere.invalid/app")
    assert "host and port in the URL" in said


async def test_server_that_never_answers_is_given_up() -> None:
    async def ignore(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)

    accepted: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(ignore, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    url = f"postgresql+asyncpg://app:{PASSWORD}@127.0.0.1:{port}/app"
    assert "did not answer in time" in await refusal(url, connect_timeout=0.3)
    for writer in accepted:
        writer.close()
    listener.close()
    await listener.wait_closed()


async def test_wrong_password_user_and_database_are_told_apart(
    private_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = private_server(password=PASSWORD)
    assert "check the user and the password" in await refusal(server.url(password="wrong"))
    assert "check the user and the password" in await refusal(server.url(user="nobody"))
    assert "create the database" in await refusal(server.url("unknown"))
    said = await refusal(server.url())
    assert UPGRADE in said
    with pytest.raises(BackendError) as caught:
        await asyncio.to_thread(migrate.upgrade, server.url(password="wrong"))
    assert "wrong" not in str(caught.value)
    backend = SqlBackend(server.url(), migrate=True)
    await backend.connect()
    await backend.append(QUEUE, [make_task()])
    assert PASSWORD not in repr(backend)
    await backend.disconnect()
    assert not [record for record in caplog.records if PASSWORD in record.getMessage()]


async def test_standby_and_read_only_server_are_refused(private_server: MakeServer) -> None:
    server = private_server()
    await asyncio.to_thread(migrate.upgrade, server.url())
    standby = server.make_standby()
    said = await refusal(standby.url())
    assert "standby" in said
    assert "connect to the primary" in said
    server.stop()
    read_only = private_server({"default_transaction_read_only": True})
    assert "default_transaction_read_only" in await refusal(read_only.url(), migrate=True)


async def test_missing_tables_name_the_command(empty_database: TestDatabase) -> None:
    if empty_database.dialect == "postgresql":
        assert UPGRADE in await refusal(empty_database.url)
        assert UPGRADE in await refusal(empty_database.url, schema="app")
    backend = SqlBackend(empty_database.url, migrate=True)
    await backend.connect()
    assert await backend.append(QUEUE, [make_task()]) == [True]
    await backend.disconnect()


async def test_tables_of_another_prefix_are_missing(postgres_database: TestDatabase) -> None:
    assert UPGRADE in await refusal(postgres_database.url, table_prefix="other_")


async def test_tables_that_are_too_old_or_too_new_are_refused(database: TestDatabase) -> None:
    await database.execute("UPDATE sheppy_schema SET version = version - 1")
    assert UPGRADE in await refusal(database.url)
    await database.execute("UPDATE sheppy_schema SET version = 999, oldest_code = 998")
    assert "pip install --upgrade sheppy-sql" in await refusal(database.url)
    await database.execute("UPDATE sheppy_schema SET oldest_code = 1")
    backend = SqlBackend(database.url)
    await backend.connect()
    assert await backend.append(QUEUE, [make_task()]) == [True]
    await backend.disconnect()


async def test_tables_dropped_meanwhile_name_the_command(database: TestDatabase) -> None:
    backend = SqlBackend(database.url)
    await backend.connect()
    await database.execute("DROP TABLE sheppy_scheduled_tasks")
    with pytest.raises(BackendError, match=f"^Failed to schedule a task: .*{UPGRADE}"):
        await backend.schedule(QUEUE, make_task(), FUTURE)
    assert await backend.get_all_tasks(QUEUE) == []
    assert await backend.append(QUEUE, [make_task()]) == [True]
    await backend.disconnect()


async def test_user_without_rights_is_told_what_to_grant(private_server: MakeServer) -> None:
    server = private_server()
    await asyncio.to_thread(migrate.upgrade, server.url())
    admin = TestDatabase(server.url(), "postgresql")
    await admin.execute("CREATE ROLE app LOGIN")
    said = await refusal(server.url(user="app"))
    assert "grant" in said
    await admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO app")
    backend = SqlBackend(server.url(user="app"))
    await backend.connect()
    with pytest.raises(BackendError, match="sheppy-sql db grant"):
        await backend.append(QUEUE, [make_task()])
    await admin.execute("GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app")
    await admin.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO app")
    assert await backend.append(QUEUE, [make_task()]) == [True]
    assert await backend.pop(QUEUE) == [make_task()]
    await backend.disconnect()


async def test_missing_directory_is_named_as_such(tmp_path: Path) -> None:
    said = await refusal(f"sqlite+aiosqlite:///{tmp_path}/missing/sheppy.db")
    assert "folder exists" in said
    assert not (tmp_path / "missing").exists()


async def test_directory_is_no_database(tmp_path: Path) -> None:
    assert "unable to open" in await refusal(f"sqlite+aiosqlite:///{tmp_path}")


async def test_file_that_is_no_database_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but somebody's notes\n" * 100)
    said = await refusal(f"sqlite+aiosqlite:///{file}")
    assert "the file is something else" in said
    assert file.read_text() == "not a database, but somebody's notes\n" * 100


async def test_database_of_another_program_gets_tables_beside_its_own(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    backend = SqlBackend(f"sqlite+aiosqlite:///{file}")
    await backend.connect()
    assert await backend.append(QUEUE, [make_task()]) == [True]
    await backend.disconnect()


async def test_read_only_file_can_be_looked_at(sqlite_database: TestDatabase) -> None:
    writer = SqlBackend(sqlite_database.url)
    await writer.connect()
    await writer.append(QUEUE, [make_task()])
    path = sqlite_database.url.partition("///")[2]
    reader = SqlBackend(f"sqlite+aiosqlite:///file:{path}?mode=ro&uri=true")
    for still_open in (True, False):
        await reader.connect()
        assert await reader.get_pending(QUEUE) == [make_task()]
        with pytest.raises(BackendError, match="read-only"):
            await reader.append(QUEUE, [make_task("new")])
        with pytest.raises(BackendError, match="read-only"):
            await reader.pop(QUEUE)
        assert await reader.size(QUEUE) == 1
        await reader.disconnect()
        if still_open:
            await writer.disconnect()


async def test_read_only_file_without_tables_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    said = await refusal(f"sqlite+aiosqlite:///file:{file}?mode=ro&uri=true")
    assert "read-only" in said


@pytest.mark.posix
async def test_file_that_may_not_be_written_is_named_as_such(sqlite_database: TestDatabase) -> None:
    path = Path(sqlite_database.url.partition("///")[2])
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        backend = SqlBackend(sqlite_database.url)
        await backend.connect()
        if os.geteuid() != 0:  # whom no permission stops
            with pytest.raises(BackendError, match="read-only"):
                await backend.append(QUEUE, [make_task()])
        assert await backend.get_all_tasks(QUEUE) == []
        await backend.disconnect()
    finally:
        path.parent.chmod(0o755)


async def test_damaged_file_is_an_error_and_no_loss_of_the_rest(
    sqlite_database: TestDatabase, tmp_path: Path
) -> None:
    path = Path(sqlite_database.url.partition("///")[2])
    damaged = tmp_path / "damaged.db"
    shutil.copy(path, damaged)
    content = bytearray(damaged.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    damaged.write_bytes(content)
    said = await refusal(f"sqlite+aiosqlite:///{damaged}")
    assert said.startswith("Failed to ")
