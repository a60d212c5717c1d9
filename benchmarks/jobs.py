"""The tasks that are run: they do nothing, or note when they began."""

from __future__ import annotations

import asyncio
import time

from sheppy import task

STARTS: dict[int, float] = {}
"""When each stamped task began, monotonic, by its number; of this process only."""


@task
async def noop() -> None:
    """Nothing."""


@task
async def stamp(number: int) -> None:
    """Note when it began."""
    STARTS[number] = time.monotonic()


@task
async def nap() -> None:
    """Last long enough for many to run at once."""
    await asyncio.sleep(0.02)
