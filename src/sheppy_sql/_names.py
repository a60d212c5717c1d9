"""Where an installation's tables are, as Alembic's environments and revisions are told."""

from __future__ import annotations

import os
from typing import NamedTuple

from alembic import context
from alembic.config import Config

from .schema import DEFAULT_PREFIX, build_tables

SCHEMA_VARIABLE = "SHEPPY_SQL_SCHEMA"
PREFIX_VARIABLE = "SHEPPY_SQL_TABLE_PREFIX"
NAMES_ATTRIBUTE = "sheppy_sql_names"


class Names(NamedTuple):
    """Where an installation's tables are."""

    schema: str | None = None
    prefix: str = DEFAULT_PREFIX


def use_names(*, schema: str | None = None, table_prefix: str = DEFAULT_PREFIX) -> Names:
    """For the `env.py` of an application: where our revisions make the tables.

    Goes before the environment variables. ValueError where PostgreSQL cannot have such names.
    """
    names = Names(schema, table_prefix)
    build_tables(*names)
    context.config.attributes[NAMES_ATTRIBUTE] = names
    return names


def names_in_use() -> Names:
    """For the revisions: where the tables are that are being migrated."""
    config = config_in_use()
    given = None if config is None else config.attributes.get(NAMES_ATTRIBUTE)
    return names_from_environment() if given is None else Names(*given)


def names_from_environment() -> Names:
    """Where commands, which get a URL at most, find the tables."""
    return Names(
        os.environ.get(SCHEMA_VARIABLE) or None, os.environ.get(PREFIX_VARIABLE, DEFAULT_PREFIX)
    )


def config_in_use() -> Config | None:
    """The configuration of the environment that Alembic runs, None where it runs none."""
    try:
        return context.config
    except (NameError, AttributeError):  # of Alembic's proxy: before and after an environment
        return None
