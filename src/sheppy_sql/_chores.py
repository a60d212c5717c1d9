"""What one instance of all does, now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._stores import chores as chore_store

if TYPE_CHECKING:
    from ._database import Database


async def take(database: Database, action: str, chore: str, seconds: float) -> bool:
    """Whether a chore was due; it is then the caller's, and due again after `seconds`."""
    # Not to be taken, its row would be locked all the same, which writes.
    if not await database.read(action, chore_store.is_due, chore):
        return False
    return await database.write_one(action, chore_store.take, chore, seconds)
