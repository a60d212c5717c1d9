"""Waiting within a greenlet, by whichever name SQLAlchemy has for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.util import concurrency

# 2.1 has renamed it.
await_: Callable[[Awaitable[Any]], Any] = (
    getattr(concurrency, "await_", None) or vars(concurrency)["await_only"]
)
