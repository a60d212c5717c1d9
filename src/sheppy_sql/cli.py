"""The command `sheppy-sql`: sheppy's own commands on SQL URLs, and those for the tables."""

from __future__ import annotations

import asyncio
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
import typer.main
from alembic.util import CommandError
from pydantic import ValidationError
from sheppy import BackendError

from . import _host, _urls, migrate
from ._backend import SqlBackend
from ._errors import UPGRADE_HINT
from .schema import DEFAULT_PREFIX, SCHEMA_VERSION

BACKEND_URL_VARIABLE = "SHEPPY_BACKEND_URL"

app = typer.Typer(no_args_is_help=True, add_completion=False)
db = typer.Typer(no_args_is_help=True, help="Make, change and check the tables")
app.add_typer(db, name="db")

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        envvar=[migrate.URL_VARIABLE, BACKEND_URL_VARIABLE],
        help="The database's URL",
    ),
]
Schema = Annotated[
    str | None,
    typer.Option(envvar=migrate.SCHEMA_VARIABLE, help="PostgreSQL schema of the tables"),
]
TablePrefix = Annotated[
    str, typer.Option(envvar=migrate.PREFIX_VARIABLE, help="What the tables' names begin with")
]


def main() -> None:
    """Run the command line; where a database refuses: one line on stderr, exit status 1."""
    host = _host.Host()
    try:
        host.install()
        group = typer.main.get_group(app)
        group.commands = {**host.commands(_find_backend_url), **group.commands}
        group()
    except (BackendError, CommandError, ValueError, _host.UnknownHostError) as error:
        typer.echo(f"Error: {host.hide_in(_message(error))}", err=True)
        sys.exit(1)


def _message(error: Exception) -> str:
    if isinstance(error, ValidationError):  # whose own text quotes the task
        return "; ".join(detail["msg"] for detail in error.errors(include_input=False))
    return str(error)


def _show_versions(wanted: bool) -> None:
    if wanted:
        for package in ("sheppy-sql", "sheppy", "SQLAlchemy"):
            typer.echo(f"{package} {version(package)}")
        raise typer.Exit


@app.callback()
def _application(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Show versions and exit"
        ),
    ] = False,
) -> None:
    """Sheppy, the task queue, on PostgreSQL and SQLite."""


@app.command()
def demo(
    url: Annotated[
        str | None, typer.Option("--url", "-u", help="A database; else a temporary SQLite file")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the demo's tasks in a database that was given")
    ] = False,
) -> None:
    """Run tasks and see what becomes of them."""
    from .demo import run_demo

    raise typer.Exit(run_demo(url, keep=keep))


@db.command()
def upgrade(
    revision: Annotated[str, typer.Argument()] = "head",
    url: Url = None,
    schema: Schema = None,
    table_prefix: TablePrefix = DEFAULT_PREFIX,
    sql: Annotated[bool, typer.Option("--sql", help="Only print the statements")] = False,
) -> None:
    """Make the tables, or bring them to a newer revision."""
    url = _given(url)
    if sql:
        typer.echo(migrate.sql(url, schema=schema, table_prefix=table_prefix, revision=revision))
        return
    migrate.upgrade(url, schema=schema, table_prefix=table_prefix, revision=revision)
    _show(migrate.current(url, schema=schema, table_prefix=table_prefix))


@db.command()
def downgrade(
    revision: Annotated[str, typer.Argument()] = "base",
    url: Url = None,
    schema: Schema = None,
    table_prefix: TablePrefix = DEFAULT_PREFIX,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Take the tables back to an older revision; without one, drop them."""
    url = _given(url)
    if not yes:
        loss = "all tasks and results" if revision == "base" else "what only newer tables hold"
        typer.confirm(f"This deletes {loss} in {_urls.redact(url)}. Go on?", abort=True)
    migrate.downgrade(url, schema=schema, table_prefix=table_prefix, revision=revision)
    _show(migrate.current(url, schema=schema, table_prefix=table_prefix))


@db.command()
def grant(
    role: Annotated[str, typer.Argument(help="As pg_roles has it")],
    url: Url = None,
    schema: Schema = None,
    table_prefix: TablePrefix = DEFAULT_PREFIX,
    sql: Annotated[bool, typer.Option("--sql", help="Only print the statements")] = False,
) -> None:
    """Let a role work with the tables, and change none; the URL is of the one that owns them."""
    if sql:
        statements = migrate.grant_sql(role, schema=schema, table_prefix=table_prefix)
        typer.echo(statements, nl=False)
        return
    migrate.grant(_given(url), role, schema=schema, table_prefix=table_prefix)
    typer.echo(f"{role} can work with the tables")


@db.command()
def revisions() -> None:
    """Print the folder of the revisions, for the `version_locations` of your own Alembic."""
    typer.echo(migrate.scripts() / "versions")


@db.command()
def current(
    url: Url = None, schema: Schema = None, table_prefix: TablePrefix = DEFAULT_PREFIX
) -> None:
    """Show which tables are there."""
    _show(migrate.current(_given(url), schema=schema, table_prefix=table_prefix))


@db.command()
def check(
    url: Url = None, schema: Schema = None, table_prefix: TablePrefix = DEFAULT_PREFIX
) -> None:
    """Whether this sheppy-sql can work with the server and the tables; exit status 1 if not."""
    url = _given(url)
    position = migrate.current(url, schema=schema, table_prefix=table_prefix)
    if position.version is None:
        # Not by connecting, which on SQLite makes them.
        raise BackendError(f"There are no tables: {UPGRADE_HINT}")
    if position.version < SCHEMA_VERSION:
        raise BackendError(
            f"{_described(position)}, this sheppy-sql needs version {SCHEMA_VERSION}: "
            f"{UPGRADE_HINT}"
        )
    asyncio.run(_connect_once(SqlBackend(url, schema=schema, table_prefix=table_prefix)))
    _show(position)
    typer.echo("This sheppy-sql can work with them")


async def _connect_once(backend: SqlBackend) -> None:
    await backend.connect()
    await backend.disconnect()


def _show(position: migrate.Position) -> None:
    typer.echo(_described(position))


def _described(position: migrate.Position) -> str:
    if position.version is None:
        return "There are no tables"
    if position.revision is None:
        return f"The tables are at version {position.version}; their revision is kept elsewhere"
    return f"The tables are at revision {position.revision} (version {position.version})"


def _given(url: str | None) -> str:
    return url or _refuse("--url", f"{migrate.URL_VARIABLE} or {BACKEND_URL_VARIABLE}")


def _find_backend_url(url: str | None) -> str:
    found = url or os.environ.get(BACKEND_URL_VARIABLE)
    return found or _refuse("--backend-url", BACKEND_URL_VARIABLE)


def _refuse(option: str, variables: str) -> NoReturn:
    typer.echo(
        f"Error: which database? Pass {option} or set {variables}, for example to "
        "postgresql://user:password@host/database or sqlite:///file.db",
        err=True,
    )
    raise typer.Exit(2)
