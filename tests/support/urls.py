"""What the tests of database URLs share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from sheppy_sql._urls import Target, parse

SECRET = "hunter2"


@pytest.fixture
def no_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables and no files in a home directory that say where to connect, or how."""
    for name in os.environ:
        if name.startswith("PG"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))


def refusal(url: Any) -> str:
    """Why the URL is refused, in a message that holds nothing of what it quotes."""
    with pytest.raises(ValueError, match=r"^The database URL cannot be used: ") as caught:
        parse(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return str(caught.value)


def driver_arguments(target: Target) -> Mapping[str, Any]:
    """What SQLAlchemy hands to the driver for it."""
    _, arguments = target.url.get_dialect()().create_connect_args(target.url)
    return {**arguments, **target.connect_args}


def engine_of(url: str | URL) -> AsyncEngine:
    """An engine that keeps no connections, so that it need not be disposed of."""
    target = parse(url)
    return create_async_engine(
        target.url, connect_args=dict(target.connect_args), poolclass=NullPool
    )
