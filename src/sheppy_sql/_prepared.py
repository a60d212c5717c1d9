"""Statements that are carried out again and again, on the driver's own connection.

SQLAlchemy compiles each of them once. To execute it through SQLAlchemy as well costs this process
more than all that the driver does, each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import asyncpg
from sqlalchemy import ARRAY
from sqlalchemy.util.concurrency import await_

if TYPE_CHECKING:
    from sqlalchemy import ClauseElement, Connection, Executable
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine


class Row(asyncpg.Record):  # type: ignore[misc]  # the driver is not typed
    """One with its columns as attributes, like a row of SQLAlchemy's."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of a statement's, in the place that it has there."""

    name: str
    default: Any
    process: Callable[[Any], Any] | None
    """What makes the driver's value of it."""

    def value(self, given: Mapping[str, Any]) -> Any:
        value = given.get(self.name, self.default)
        return value if self.process is None else self.process(value)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A statement as the driver takes it."""

    sql: str
    parameters: Sequence[Parameter]

    def fetch(
        self, connection: Connection, given: Mapping[str, Any], name: Callable[[], str]
    ) -> Sequence[Any]:
        """The rows for the parameters, in a greenlet, with no transaction around it.

        `name` names the statement where the connection does not have it yet.
        """
        values = [parameter.value(given) for parameter in self.parameters]
        try:
            rows: Sequence[Any] = await_(self._fetch(connection, values, name))
        except Exception:
            raise
        except BaseException:
            # Its end, as that of an event loop, did not wait for the server's answer.
            connection.invalidate()
            raise
        return rows

    async def _fetch(
        self, connection: Connection, values: Sequence[Any], name: Callable[[], str]
    ) -> Any:
        # SQLAlchemy keeps this as long as the driver's connection lives.
        statements = connection.info
        if self not in statements:
            driver: Any = connection.connection.driver_connection
            statements[self] = await driver.prepare(self.sql, name=name(), record_class=Row)
        return await statements[self].fetch(*values)


def is_watched(connection: Connection) -> bool:
    """Whether somebody is to see each statement on SQLAlchemy's way, tracing or logging it."""
    engine = connection.engine
    statements, errors = engine.dispatch, engine.dialect.dispatch
    listeners = (
        statements.before_cursor_execute
        or statements.after_cursor_execute
        or errors.handle_error
        or errors.do_execute
    )
    return bool(listeners) or engine.logger.isEnabledFor(logging.INFO)


def prepare(statement: Executable, dialect: Dialect) -> Prepared:
    """A statement, compiled."""
    compiled = cast("SQLCompiler", cast("ClauseElement", statement).compile(dialect=dialect))
    parameters = []
    for name in compiled.positiontup or ():
        process = _processor(compiled.binds[name].type, dialect)
        parameters.append(Parameter(name, compiled.params[name], process))
    return Prepared(compiled.string, parameters)


def _processor(type_: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    if isinstance(type_, ARRAY) and _processor(type_.item_type, dialect) is None:
        # SQLAlchemy's would copy each list.
        return None
    return type_.dialect_impl(dialect).bind_processor(dialect)
