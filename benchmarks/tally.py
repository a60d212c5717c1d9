"""How many tasks are done, counted by several processes in one file."""

from __future__ import annotations

import asyncio
import mmap
import struct
import time
from pathlib import Path

SLOTS = 8
SLOT = struct.Struct("q")
LOOK = 0.005  # seconds


class Tally:
    """A file with a count for each process; each writes only its own."""

    def __init__(self, path: str, slot: int) -> None:
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), SLOTS * SLOT.size)
        self._slot = slot
        self._count = 0
        self.last_at = 0.0
        """When this process counted last, monotonic, which all processes share."""

    @staticmethod
    def create(path: Path) -> str:
        """An empty file for one measurement."""
        path.write_bytes(bytes(SLOTS * SLOT.size))
        return str(path)

    def add(self, count: int = 1) -> None:
        self._count += count
        SLOT.pack_into(self._map, self._slot * SLOT.size, self._count)
        self.last_at = time.monotonic()

    def total(self) -> int:
        return sum(SLOT.unpack_from(self._map, slot * SLOT.size)[0] for slot in range(SLOTS))

    async def reach(self, target: int, timeout: float) -> None:
        """Wait until all processes together have counted so far; TimeoutError says how far."""
        deadline = time.monotonic() + timeout
        while self.total() < target:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.total()} of {target} done in {timeout:.0f} seconds")
            await asyncio.sleep(LOOK)
