"""Hooks for an application's own Alembic: autogenerate is to see its tables, not ours."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from alembic import context

from ._names import Names, names_in_use
from .schema import build_tables, version_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from alembic.runtime.environment import IncludeNameFn, IncludeObjectFn


def include_name(*installations: Names, then: IncludeNameFn | None = None) -> IncludeNameFn:
    """For `context.configure(include_name=...)`: hides our tables, by their exact names.

    `installations` say where they are; without one, where our revisions make them: see
    `use_names`. `then` is a hook of your own, asked about everything else.
    """
    is_ours = _matcher(installations)

    def include(name: str | None, kind: Any, parents: Any) -> bool:
        if kind == "table" and is_ours(name, parents.get("schema_name")):
            return False
        return then is None or then(name, kind, parents)

    return include


def include_object(*installations: Names, then: IncludeObjectFn | None = None) -> IncludeObjectFn:
    """The same for `context.configure(include_object=...)`; one of the two is enough.

    A table of yours that your metadata has under one of our names is not hidden.
    """
    is_ours = _matcher(installations)

    def include(item: Any, name: str | None, kind: Any, reflected: bool, other: Any) -> bool:
        if kind == "table" and reflected and other is None and is_ours(name, item.schema):
            return False
        return then is None or then(item, name, kind, reflected, other)

    return include


def _matcher(installations: tuple[Names, ...]) -> Callable[[str | None, str | None], bool]:
    def is_ours(name: str | None, schema: str | None) -> bool:
        default = _default_schema()
        for names in installations or (names_in_use(),):
            # Alembic tells the default schema as None, also where we were given its name.
            here = None if names.schema == default else names.schema
            if (schema or None) == here and name in _table_names(names.prefix):
                return True
        return False

    return is_ours


@cache
def _table_names(prefix: str) -> frozenset[str]:
    return frozenset({*build_tables(prefix=prefix).metadata.tables, version_table(prefix)})


def _default_schema() -> str | None:
    try:
        return context.get_context().dialect.default_schema_name
    except (NameError, AttributeError):  # of Alembic's proxy: before and after an environment
        return None
