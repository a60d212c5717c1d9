"""Making and changing the tables: Alembic, run from a program.

    from sheppy_sql import migrate
    migrate.upgrade("postgresql+asyncpg://app@db/app")

Never touches the program's logging. Raises sheppy.BackendError where the
database refuses, ValueError where an argument is wrong.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from logging.config import fileConfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sheppy import BackendError
from sqlalchemy import func, inspect, select
from sqlalchemy.schema import CreateSchema

from . import _deployments, _urls
from ._autogenerate import include_name as include_name
from ._autogenerate import include_object as include_object
from ._dialects import dialect_named
from ._grants import grants
from ._names import NAMES_ATTRIBUTE
from ._names import PREFIX_VARIABLE as PREFIX_VARIABLE
from ._names import SCHEMA_VARIABLE as SCHEMA_VARIABLE
from ._names import Names as Names
from ._names import names_from_environment as names_from_environment
from ._names import names_in_use as names_in_use
from ._names import use_names as use_names
from ._revisions import REPEATS_ATTRIBUTE, ensure_schema
from ._revisions import add_column as add_column
from ._revisions import as_string as as_string
from ._revisions import create_index as create_index
from ._revisions import create_schema as create_schema
from ._revisions import execute as execute
from ._revisions import quoted as quoted
from ._revisions import short_locks as short_locks
from ._revisions import stamp as stamp
from .schema import DEFAULT_PREFIX, NOT_COMPARED, build_tables, version_table

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection


T = TypeVar("T")

URL_VARIABLE = "SHEPPY_SQL_URL"


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
    """Bring the tables to `revision`; harmless where they are there already.

    On PostgreSQL a statement waits for a lock no longer than two seconds, and the migration is
    then tried again, for a minute. Indexes of tables with rows are built CONCURRENTLY.
    """
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
    return _deployments.wait(
        _deployments.connected(
            url, lambda sync: _position(sync, names), action="look at the tables"
        )
    )


def grant(
    url: str | URL,
    role: str,
    *,
    schema: str | None = None,
    table_prefix: str = DEFAULT_PREFIX,
) -> None:
    """Let `role` work with the tables, and nothing more; `url` is of the role that owns them.

    Repeat it after an upgrade, for what is new. ValueError on SQLite, which has no roles.
    """
    _check_roles(url)

    def execute(sync: Connection) -> None:
        here = sync.scalar(select(func.current_schema())) if schema is None else schema
        kept = inspect(sync).has_table(version_table(table_prefix), schema=schema)
        for statement in grants(role, Names(here, table_prefix), version_table=kept):
            sync.exec_driver_sql(statement)

    _deployments.wait(_deployments.connected(url, execute, action="grant rights on the tables"))


def grant_sql(role: str, *, schema: str | None = None, table_prefix: str = DEFAULT_PREFIX) -> str:
    """The statements of `grant`, for those who run them themselves."""
    return "".join(f"{each};\n" for each in grants(role, Names(schema, table_prefix)))


async def upgrade_in(connection: AsyncConnection, names: Names) -> None:
    """Bring the tables to the newest revision inside the connection's open transaction.

    So that no index can be built CONCURRENTLY.
    """
    if connection.dialect.name == "postgresql":
        await _deployments.take_turn(connection)
    await connection.run_sync(_refuse_others, names)
    async with _deployments.alone():
        await connection.run_sync(
            lambda sync: command.upgrade(_config(names, connection=sync), "head")
        )


def scripts() -> Path:
    """The folder of our revisions: inside the package, or beside it in a source tree."""
    package = Path(__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parents[1] / "migrations"


def run_environment() -> None:
    """What migrations/env.py does: migrate what Alembic was called for."""
    config = context.config
    if config.cmd_opts is not None and config.config_file_name is not None:
        # Only for Alembic's own command: a program's logging is its own.
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    connection = config.attributes.get("connection")
    config.attributes[REPEATS_ATTRIBUTE] = True
    if connection is not None:
        _migrate(connection)
    elif context.is_offline_mode():
        _write_sql()
    else:
        _deployments.wait(_deployments.migrated(_url_in_use(), _migrate))


def _names(url: str | URL, schema: str | None, prefix: str) -> Names:
    """ValueError where the database cannot have them, before anything is opened."""
    names = Names(schema, prefix)
    build_tables(*names)
    if schema is not None and dialect_named(_urls.parse(url).url.get_backend_name()).embedded:
        raise ValueError("schema is PostgreSQL's; on SQLite use table_prefix or another file")
    return names


def _check_roles(url: str | URL) -> None:
    if dialect_named(_urls.parse(url).url.get_backend_name()).embedded:
        raise ValueError("SQLite has no roles: give the file to those who may use it")


def _run(url: str | URL, names: Names, action: Callable[[Config], None]) -> None:
    migration = _deployments.migrated(
        url,
        lambda sync: action(_config(names, connection=sync)),
        check=lambda sync: _refuse_others(sync, names),
    )
    _deployments.wait(migration)


def _migrate(connection: Connection) -> None:
    names = names_in_use()
    context.configure(connection=connection, **_environment(names))
    with context.begin_transaction():
        if names.schema is not None and connection.dialect.name == "postgresql":
            ensure_schema(connection, names.schema)
        context.run_migrations()


def _refuse_others(connection: Connection, names: Names) -> None:
    """BackendError where another Alembic environment has made the tables, and so changes them."""
    position = _position(connection, names)
    if position.version is not None and position.revision is None:
        raise BackendError(
            "Failed to migrate the tables: your own Alembic environment has made them; "
            'change them there, with "alembic upgrade heads"'
        )


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
    metadata = build_tables(*names).metadata
    indexes = {index for table in metadata.tables.values() for index in table.indexes}
    not_compared = {index.name for index in indexes if NOT_COMPARED in index.info}

    def include(_item: Any, name: str | None, kind: str, _reflected: bool, _other: Any) -> bool:
        return kind != "index" or name not in not_compared

    return {"target_metadata": metadata, "include_object": include, **_version_table(names)}


def _version_table(names: Names) -> dict[str, Any]:
    return {
        "version_table": version_table(names.prefix),
        "version_table_schema": names.schema,
    }


def _config(names: Names, output: TextIO | None = None, **attributes: object) -> Config:
    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.attributes.update({**attributes, NAMES_ATTRIBUTE: names})
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
