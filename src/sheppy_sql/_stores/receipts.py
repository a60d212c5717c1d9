"""What rare calls answered, for those whose answer was lost on the way."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from sqlalchemy import delete, select

from .._transaction import new_token

if TYPE_CHECKING:
    from .._transaction import Transaction

P = ParamSpec("P")
T = TypeVar("T")


def once(
    operation: Callable[Concatenate[Transaction, P], Awaitable[T]],
) -> Callable[Concatenate[Transaction, P], Awaitable[T]]:
    """The operation, for one call of `Database.write`; tried again, it answers as the first time.

    Its answer must be something that JSON knows. For calls that are rare: each leaves a row for a
    while.
    """
    token = new_token()

    @functools.wraps(operation)
    async def receipted(tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if tx.repeated and not await _begin(tx, token):
            answer: T = json.loads(await _answer(tx, token))
            return answer
        outcome = await operation(tx, *args, **kwargs)
        await _put(tx, token, json.dumps(outcome))
        return outcome

    return receipted


async def prune(tx: Transaction, seconds: float, most: int) -> int:
    """Delete up to `most` receipts that are older than so many seconds; how many there were."""
    receipts = tx.tables.receipts
    old = (
        select(receipts.c.token)
        .where(receipts.c.created_at <= tx.dialect.now(plus=-seconds))
        .order_by(receipts.c.created_at)
        .limit(most)
        .with_for_update(skip_locked=True)
        .cte("old")
        .prefix_with("MATERIALIZED")
    )
    pruned = delete(receipts).where(receipts.c.token.in_(select(old.c.token)))
    return len(await tx.rows(pruned.returning(receipts.c.token)))


async def _begin(tx: Transaction, token: int) -> bool:
    """False where an earlier try is committed; one that is just committing is waited for."""
    receipts = tx.tables.receipts
    receipt = tx.dialect.insert(receipts).values(
        token=token, answer="null", created_at=tx.dialect.now()
    )
    statement = receipt.on_conflict_do_nothing().returning(receipts.c.token)
    return bool(await tx.rows(statement))


async def _put(tx: Transaction, token: int, answer: str) -> None:
    receipts = tx.tables.receipts
    receipt = tx.dialect.insert(receipts).values(
        token=token, answer=answer, created_at=tx.dialect.now()
    )
    await tx.execute(
        receipt.on_conflict_do_update(
            index_elements=[receipts.c.token], set_={"answer": receipt.excluded.answer}
        )
    )


async def _answer(tx: Transaction, token: int) -> str:
    receipts = tx.tables.receipts
    answer: str = await tx.scalar(select(receipts.c.answer).where(receipts.c.token == token))
    return answer
