"""Keeping payloads out of other libraries' logs, which at DEBUG quote every value."""

from __future__ import annotations

import functools
import logging

ENGINE = "sheppy_sql"
"""Logging name of our engines: theirs is the logger sqlalchemy.engine.Engine.sheppy_sql."""


def hide_rows() -> None:
    """Leave the rows that our engines fetched out; an application's engines are not concerned."""
    logger = logging.getLogger(f"sqlalchemy.engine.Engine.{ENGINE}")
    if _is_no_row not in logger.filters:
        logger.addFilter(_is_no_row)


def hide_parameters() -> None:
    """Have aiosqlite, which has one logger for all, name its calls without their values."""
    logger = logging.getLogger("aiosqlite")
    if _without_values not in logger.filters:
        logger.addFilter(_without_values)


def _is_no_row(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _without_values(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(_named(value) for value in record.args)
    return True


def _named(value: object) -> str:
    call = value.func if isinstance(value, functools.partial) else value
    return str(getattr(call, "__qualname__", type(call).__qualname__))
