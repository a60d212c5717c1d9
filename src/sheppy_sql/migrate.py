"""Making and changing the tables: Alembic, run from a program.

    from sheppy_sql import migrate
    migrate.upgrade("postgresql+asyncpg://app@db/app")

Never touches the program's logging. Raises sheppy.BackendError where the
database refuses, ValueError where an argument is wrong.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from logging.config import fileConfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sheppy import BackendError
from sqlalchemy import func, inspect, select, text
from sqlalchemy.schema import CreateSchema

from . import _urls
from ._dialects import dialect_named
from ._errors import backend_error, is_driver_error
from .schema import DEFAULT_PREFIX, build_tables, version_table

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

URL_VARIABLE = "SHEPPY_SQL_URL"
SCHEMA_VARIABLE = "SHEPPY_SQL_SCHEMA"
PREFIX_VARIABLE = "SHEPPY_SQL_TABLE_PREFIX"
CONNECT_TIMEOUT = 10.0  # seconds
LONGEST_TURN = 120.0  # seconds

_turn = threading.Lock()

_LOCK_KEY = 0x7368_6570_7079  # "sheppy", for pg_advisory_xact_lock


class Names(NamedTuple):
    """Where an installation's tables are."""

    schema: str | None
    prefix: str


class Position(NamedTuple):
    """Which tables a database has."""

    revision: str | None
    """None as well where the application's own Alembic environment keeps it."""
    version: int | None


def upgrade(
    url: str | URL,
    *,
    schema: str | None = None,
    table_prefix: str = DEFAULT_PREFIX,
    revision: str = "head",
) -> None:
    """Bring the tables to `revision`; harmless where they are there already."""
    _run(url, _names(url, schema, table_prefix), lambda config: command.upgrade(config, revision))


def downgrade(
    url: str | URL,
    *,
    schema: str | None = None,
    table_prefix: str = DEFAULT_PREFIX,
    revision: str = "base",
) -> None:
    """Take the tables back to `revision`; "base" drops them, with all tasks in them."""
    _run(url, _names(url, schema, table_prefix), lambda config: command.downgrade(config, revision))


def sql(
    url: str | URL,
    *,
    schema: str | None = None,
    table_prefix: str = DEFAULT_PREFIX,
    revision: str = "head",
) -> str:
    """The statements by which `upgrade` makes the tables, for those who run them themselves.

    `url` only says which database they are for. `revision` may be a range, "from:to".
    """
    output = io.StringIO()
    config = _config(_names(url, schema, table_prefix), output, sheppy_sql_url=url)
    command.upgrade(config, revision, sql=True)
    return output.getvalue()


def current(
    url: str | URL, *, schema: str | None = None, table_prefix: str = DEFAULT_PREFIX
) -> Position:
    """Which tables are there; changes nothing."""
    names = _names(url, schema, table_prefix)
    if _is_missing_file(_urls.parse(url)):
        return Position(None, None)
    look = _connected(
        url, lambda sync: _position(sync, names), write=False, action="look at the tables"
    )
    return _wait(look)


async def upgrade_in(connection: AsyncConnection, names: Names) -> None:
    """Bring the tables to the newest revision inside the connection's open transaction."""
    async with _alone():
        await connection.run_sync(
            lambda sync: command.upgrade(_config(names, connection=sync), "head")
        )


def scripts() -> Path:
    """The folder of our revisions: inside the package, or beside it in a source tree."""
    package = Path(__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parents[1] / "migrations"


def names_in_use() -> Names:
    """For the revisions: where the tables are that are being migrated."""
    config = context.config
    given = config.attributes.get("sheppy_sql_names")
    if given is not None:
        return Names(*given)
    return names_from_environment()


def names_from_environment() -> Names:
    """Where commands, which get a URL at most, find the tables."""
    return Names(
        os.environ.get(SCHEMA_VARIABLE) or None, os.environ.get(PREFIX_VARIABLE, DEFAULT_PREFIX)
    )


def run_environment() -> None:
    """What migrations/env.py does: migrate what Alembic was called for."""
    config = context.config
    if config.cmd_opts is not None and config.config_file_name is not None:
        # Only for Alembic's own command: a program's logging is its own.
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    connection = config.attributes.get("connection")
    if connection is not None:
        _migrate(connection)
    elif context.is_offline_mode():
        _write_sql()
    else:
        _wait(_connected(_url_in_use(), lambda sync: _migrate(sync)))


def _names(url: str | URL, schema: str | None, prefix: str) -> Names:
    """ValueError where the database cannot have them, before anything is opened."""
    names = Names(schema, prefix)
    build_tables(*names)
    if schema is not None and dialect_named(_urls.parse(url).url.get_backend_name()).embedded:
        raise ValueError("schema is PostgreSQL's; on SQLite use table_prefix or another file")
    return names


def _run(url: str | URL, names: Names, action: Callable[[Config], None]) -> None:
    _wait(_connected(url, lambda sync: action(_config(names, connection=sync))))


async def _connected(
    url: str | URL,
    operation: Callable[[Connection], T],
    *,
    write: bool = True,
    action: str = "migrate the tables",
) -> T:
    """What `operation` returns, once committed."""
    target = _urls.parse(url)
    dialect = dialect_named(target.url.get_backend_name())
    engine = dialect.create_engine(target, pool_size=1, connect_timeout=CONNECT_TIMEOUT)
    try:
        async with engine.connect() as connection:
            await dialect.begin(connection, write=write)
            async with _alone():
                outcome = await connection.run_sync(operation)
            await connection.commit()
            return outcome
    except Exception as error:
        if not is_driver_error(error):
            raise
        raise backend_error(action, error) from None
    finally:
        await engine.dispose()


@asynccontextmanager
async def _alone() -> AsyncIterator[None]:
    """Alembic keeps what it is doing in module globals: one migration at a time in a process."""
    deadline = time.monotonic() + LONGEST_TURN
    # Not a blocking acquire: whoever holds it may need this event loop to go on.
    while not _turn.acquire(blocking=False):
        if time.monotonic() > deadline:
            raise BackendError("Failed to migrate: another migration in this process does not end")
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        _turn.release()


def _migrate(connection: Connection) -> None:
    names = names_in_use()
    if connection.dialect.name == "postgresql":
        # Two deployments at once: the second waits, then finds nothing to do.
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK_KEY)))
        _make_schema(connection, names.schema)
    context.configure(connection=connection, **_environment(names))
    with context.begin_transaction():
        context.run_migrations()


def _make_schema(connection: Connection, schema: str | None) -> None:
    if schema is None:
        return
    found = (
        select(text("1"))
        .select_from(text("pg_namespace"))
        .where(text("nspname = :schema").bindparams(schema=schema))
    )
    # Not IF NOT EXISTS, which asks for the right to create even where it exists.
    if connection.scalar(found) is None:
        quoted = connection.dialect.identifier_preparer.quote(schema)
        connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")


def _position(connection: Connection, names: Names) -> Position:
    heads = MigrationContext.configure(connection, opts=_version_table(names)).get_current_heads()
    stamp = build_tables(*names).schema
    version = (
        connection.scalar(select(stamp.c.version))
        if inspect(connection).has_table(stamp.name, schema=names.schema)
        else None
    )
    return Position(", ".join(heads) or None, version)


def _is_missing_file(target: _urls.Target) -> bool:
    """Whether merely connecting would make a file."""
    embedded = dialect_named(target.url.get_backend_name()).embedded
    path = target.url.database or ":memory:"
    is_path = path != ":memory:" and not path.startswith("file:")
    return embedded and is_path and not Path(path).exists()


def _write_sql() -> None:
    names = names_in_use()
    backend = _urls.parse(_url_in_use()).url.get_backend_name()
    context.configure(
        dialect_name=backend,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        **_environment(names),
    )
    with context.begin_transaction():
        if names.schema is not None:
            context.execute(CreateSchema(names.schema, if_not_exists=True))
        context.run_migrations()


def _environment(names: Names) -> dict[str, Any]:
    return {"target_metadata": build_tables(*names).metadata, **_version_table(names)}


def _version_table(names: Names) -> dict[str, Any]:
    return {
        "version_table": version_table(names.prefix),
        "version_table_schema": names.schema,
    }


def _config(names: Names, output: TextIO | None = None, **attributes: object) -> Config:
    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes.update(attributes, sheppy_sql_names=names)
    return config


def _url_in_use() -> str | URL:
    url: str | URL | None = context.config.attributes.get("sheppy_sql_url")
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise CommandError(
            f"Set {URL_VARIABLE} to the database's URL, for example "
            "postgresql+asyncpg://user@localhost/app or sqlite+aiosqlite:///dev.db"
        )
    return url


def _wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from synchronous code, be a loop running around it or not."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(asyncio.run, coroutine).result()
