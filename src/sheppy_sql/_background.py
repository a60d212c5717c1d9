"""What runs beside a backend instance's calls, from the first time that it takes tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._heart import Heart
    from ._part import Part


class Background:
    """Signs of life, and chores, of an instance that takes tasks."""

    def __init__(self, heart: Heart | None, parts: Sequence[Part]) -> None:
        self._heart = heart
        self._parts = parts
        self._starting = asyncio.Lock()
        self._started = False
        self._stopped = False

    async def start(self) -> None:
        """Return once others know that this instance lives; harmless where they do."""
        if self._started:
            if self._heart is not None:
                await self._heart.check()
            return
        async with self._starting:
            # After a disconnect nothing starts: nobody would stop it any more.
            if self._started or self._stopped:
                return
            if self._heart is not None:
                await self._heart.start()
            self._started = True
            for part in () if self._stopped else self._parts:
                part.start()

    async def stop_parts(self) -> None:
        self._stopped = True
        for part in self._parts:
            await part.close()

    async def stop_heart(self) -> None:
        """Only after all that needs the leases has ended."""
        if self._heart is not None:
            await self._heart.close()

    def abandon(self) -> None:
        """Leave all as it is: the event loop is closed, or the threads are the parent's."""
        if self._heart is not None:
            self._heart.stop()
        for part in self._parts:
            part.abandon()
