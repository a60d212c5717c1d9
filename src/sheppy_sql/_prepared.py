"""Statements as a driver takes them, for its own connection.

SQLAlchemy compiles what is carried out again and again once. To execute it through SQLAlchemy as
well costs this process more than all that the driver does, each time.
"""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import ARRAY
from sqlalchemy.sql.selectable import ReturnsRows

from ._greenlets import await_

if TYPE_CHECKING:
    from sqlalchemy import ClauseElement, Connection, Executable
    from sqlalchemy.engine import Dialect
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of a statement's, in the place that it has there."""

    name: str
    is_required: bool
    default: Any
    make: Callable[[], Any] | None
    """What gives the default anew each time."""
    process: Callable[[Any], Any] | None
    """What makes the driver's value of it."""

    def value(self, given: Mapping[str, Any]) -> Any:
        if self.is_required or self.name in given:
            value = given[self.name]
        else:
            value = self.default if self.make is None else self.make()
        return value if self.process is None else self.process(value)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One of them."""

    sql: str
    parameters: Sequence[Parameter]
    columns: tuple[str, ...]
    """The names of those of its rows."""

    def fetch(
        self, connection: Connection, given: Mapping[str, Any], fetch: Fetch
    ) -> Sequence[Any]:
        """The rows for the parameters, in a greenlet, as the driver gives them."""
        values = self.values(given)
        try:
            rows: Sequence[Any] = await_(fetch(connection, self, values))
        except Exception:
            raise
        except BaseException:
            # Its end, as that of an event loop, did not wait for the driver's answer.
            connection.invalidate()
            raise
        return rows

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """Of the parameters, in their order."""
        return [parameter.value(given) for parameter in self.parameters]


Fetch = Callable[["Connection", Prepared, Sequence[Any]], Awaitable[Sequence[Any]]]
"""How a driver carries out a statement on its own connection: the rows for the values."""


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
    for name in compiled.positiontup or compiled.bind_names.values():
        bind = compiled.binds[name]
        process = _processor(bind.type, dialect)
        parameters.append(Parameter(name, bind.required, bind.value, bind.callable, process))
    returns = statement.exported_columns.keys() if isinstance(statement, ReturnsRows) else ()
    return Prepared(compiled.string, parameters, tuple(returns))


prepared_once = lru_cache(maxsize=1000)(prepare)
"""Of a statement that is made once, for a dialect."""


@lru_cache(maxsize=100)
def row_type(columns: tuple[str, ...]) -> Callable[..., Any]:
    """What makes a row, with its columns as attributes, of their values."""
    return namedtuple("Row", columns, rename=True)  # the names come at run time


def _processor(type_: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    if isinstance(type_, ARRAY) and _processor(type_.item_type, dialect) is None:
        # SQLAlchemy's would copy each list.
        return None
    return type_.dialect_impl(dialect).bind_processor(dialect)
