"""What one instance at a time does now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import literal, select

from ..schema import Key

if TYPE_CHECKING:
    from .._transaction import Transaction


async def is_due(tx: Transaction, name: str) -> bool:
    """Whether `take` could succeed."""
    chores = tx.tables.chores
    taken = select(1).where(chores.c.name == name, chores.c.due_at > tx.dialect.now())
    return await tx.scalar(taken) is None


async def take(tx: Transaction, name: str, seconds: float) -> bool:
    """Whether a chore was due; it is then the caller's, and due again after `seconds`."""
    chores = tx.tables.chores
    due_at = tx.dialect.now(plus=seconds)
    taken = tx.dialect.insert(chores).values(name=literal(name, Key), due_at=due_at)
    statement = taken.on_conflict_do_update(
        index_elements=[chores.c.name],
        set_={"due_at": due_at},
        where=chores.c.due_at <= tx.dialect.now(),
    )
    return bool(await tx.rows(statement.returning(chores.c.name)))
