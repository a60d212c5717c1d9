"""What the revisions are made of, beside Alembic's own operations: tables that are in use.

Revisions import this from sheppy_sql.migrate, old ones too: what is here keeps its meaning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import sqlalchemy as sa
from alembic import op
from sqlalchemy.schema import CreateSchema

from ._errors import Fault, backend_error, fault, is_driver_error
from ._names import config_in_use, names_in_use

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

P = ParamSpec("P")

logger = logging.getLogger("sheppy_sql")

LOCK_TIMEOUT = 2  # seconds
REPEATS_ATTRIBUTE = "sheppy_sql_repeats"
"""Set where whoever called Alembic tells driver errors by himself, and tries again."""


def short_locks(step: Callable[P, None]) -> Callable[P, None]:
    """An `upgrade` or `downgrade` in which no statement waits for a lock beyond LOCK_TIMEOUT.

    Whoever comes after a waiting ALTER TABLE queues behind it, workers and all. A lock_timeout
    that is set already, by the role for example, stays. Raises BackendError when it has run out.
    """

    @functools.wraps(step)
    def limited(*args: P.args, **kwargs: P.kwargs) -> None:
        was_unlimited = _limit_lock_waits()
        try:
            step(*args, **kwargs)
        except Exception as error:
            config = config_in_use()
            told = config is not None and config.attributes.get(REPEATS_ATTRIBUTE)
            if told or not is_driver_error(error) or fault(error) is not Fault.CONFLICT:
                raise
            raise backend_error("migrate the tables", error) from None
        if was_unlimited:
            # What else is in the transaction is not ours.
            value = "DEFAULT" if op.get_context().as_sql else "0"
            op.execute(f"SET LOCAL lock_timeout TO {value}")

    return limited


def create_schema() -> None:
    """Make the schema of the tables, unless it is there."""
    schema, context = names_in_use().schema, op.get_context()
    # Alembic's own table is in it already.
    if schema is None or context.version_table_schema == schema:
        return
    if context.as_sql:
        op.execute(CreateSchema(schema, if_not_exists=True))
    else:
        ensure_schema(op.get_bind(), schema)


def ensure_schema(connection: sa.Connection, schema: str) -> None:
    """Make a schema, unless it is there."""
    # Not IF NOT EXISTS, which asks for the right to create even where it exists.
    namespace = sa.table("pg_namespace", sa.column("nspname", sa.Text))
    if not connection.scalar(sa.select(sa.exists().where(namespace.c.nspname == schema))):
        connection.execute(CreateSchema(schema))


def add_column(table: str, column: sa.Column[Any], *, schema: str | None = None) -> None:
    """Add a column, unless a try that was cut short has added it."""
    if not op.get_context().as_sql:
        found = sa.inspect(op.get_bind()).get_columns(table, schema=schema)
        if any(each["name"] == column.name for each in found):
            return
    op.add_column(table, column, schema=schema)


def create_index(
    name: str,
    table: str,
    columns: Sequence[str | sa.TextClause],
    *,
    schema: str | None = None,
    **options: Any,
) -> None:
    """Make an index, on PostgreSQL without stopping those who write to the table.

    Of a table with rows it is made CONCURRENTLY, for which the transaction is committed before:
    what the revision did so far must be possible twice. `options` are those of Alembic.
    """
    context = op.get_context()

    def create(**more: Any) -> None:
        op.create_index(name, table, list(columns), schema=schema, **options, **more)

    if context.dialect.name != "postgresql":
        create()
    elif context.as_sql:
        # From nothing, the same script has made the table.
        if _starts_from_nothing(context):
            create()
        else:
            with context.autocommit_block():
                create(postgresql_concurrently=True)
            _limit_lock_waits()
    else:
        _create_online(context, name, table, schema, create)


def stamp(version: int, oldest_code: int) -> None:
    """Say in the tables which version they are, and which is the oldest that can use them."""
    schema, prefix = names_in_use()
    columns = [sa.column("version", sa.Integer), sa.column("oldest_code", sa.Integer)]
    table = sa.table(f"{prefix}schema", *columns, schema=schema)
    op.execute(table.update().values(version=version, oldest_code=oldest_code))


def quoted(name: str) -> str:
    """The name of something of ours, as SQL has it."""
    schema, prefix = names_in_use()
    quote = op.get_context().dialect.identifier_preparer.quote_identifier
    return ".".join(quote(part) for part in (schema, prefix + name) if part)


def as_string(text: str) -> str:
    """A text, as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def execute(statement: str) -> None:
    """Carry out a statement in which no colon begins a parameter."""
    op.execute(sa.text(statement.replace(":", r"\:")))


def _create_online(
    context: MigrationContext,
    name: str,
    table: str,
    schema: str | None,
    create: Callable[..., None],
) -> None:
    is_valid = _is_valid(name, table, schema)
    if is_valid:
        return  # An earlier try got that far.
    left_behind = is_valid is not None
    in_use = _has_rows(table, schema)
    if in_use and _can_commit(context):
        with context.autocommit_block():
            if left_behind:
                op.drop_index(name, table, schema=schema, postgresql_concurrently=True)
            create(postgresql_concurrently=True)
        _limit_lock_waits()
        return
    if in_use:
        logger.warning(
            "Index %s is made inside the caller's transaction: nobody writes to %s meanwhile",
            name,
            table,
        )
    if left_behind:
        op.drop_index(name, table, schema=schema)
    create()


def _limit_lock_waits() -> bool:
    """Whether there was no limit before, within the transaction."""
    context = op.get_context()
    if context.dialect.name != "postgresql":
        return False
    if not context.as_sql:
        setting = op.get_bind().scalar(sa.select(sa.func.current_setting("lock_timeout")))
        if setting != "0":
            return False
    op.execute(f"SET LOCAL lock_timeout TO '{LOCK_TIMEOUT}s'")
    return True


def _can_commit(context: MigrationContext) -> bool:
    connection = op.get_bind()
    # Alembic asserts this, and offers no way to ask.
    return context._transaction is not None or not connection.in_transaction()


def _starts_from_nothing(context: MigrationContext) -> bool:
    start = context.opts.get("starting_rev")
    return not start or start == "base"


def _has_rows(table: str, schema: str | None) -> bool:
    rows: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(
        sa.table(table, schema=schema)
    )
    return bool(op.get_bind().scalar(sa.select(rows.exists())))


def _is_valid(name: str, table: str, schema: str | None) -> bool | None:
    """False of what a build that failed has left behind, None where there is no such index."""
    index = sa.table(
        "pg_index", sa.column("indexrelid"), sa.column("indrelid"), sa.column("indisvalid")
    )
    relation = sa.table("pg_class", sa.column("oid"), sa.column("relname", sa.Text))
    path = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, table) if part)
    found: bool | None = op.get_bind().scalar(
        sa.select(index.c.indisvalid)
        .join(relation, relation.c.oid == index.c.indexrelid)
        .where(index.c.indrelid == sa.func.to_regclass(path), relation.c.relname == name)
    )
    return found
