"""Clocks: one of the client's that is wrong, and the database's moved by moving what it wrote."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING

from sheppy_sql.schema import sqlite_timestamp

if TYPE_CHECKING:
    import pytest

    from .databases import TestDatabase

PACKAGES = ("sheppy", "sheppy_sql")
DATABASES_OWN = "sheppy_sql._dialects.sqlite"
"""Where the machine's clock stands for SQLite's, as a server's would for a server's."""


def from_now(database: TestDatabase, seconds: float) -> object:
    """That moment of the database's clock, as a parameter of its statements."""
    moment = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return sqlite_timestamp(moment) if database.dialect == "sqlite" else moment


class _AnyDatetime(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


def shift(monkeypatch: pytest.MonkeyPatch, offset: timedelta) -> None:
    """Have sheppy and sheppy-sql read a clock that is ahead by `offset`; the database does not."""

    class Shifted(datetime, metaclass=_AnyDatetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # no Shifted
            return datetime.now(tz) + offset

    shifted = []
    for name, module in sorted(sys.modules.items()):
        ours = name.partition(".")[0] in PACKAGES and name != DATABASES_OWN
        if ours and vars(module).get("datetime") is datetime:
            monkeypatch.setattr(module, "datetime", Shifted)
            shifted.append(name)
    assert {"sheppy.queue", "sheppy.models", "sheppy._utils.task_execution"} <= {*shifted}
    assert "sheppy_sql._session" in shifted
