"""What rare calls answered, for those whose answer was lost on the way."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import delete, select

from .._database import new_token

if TYPE_CHECKING:
    from .._database import Transaction

KEPT = 86_400.0
"""Seconds; longer than any call goes on trying."""

P = ParamSpec("P")
T = TypeVar("T")


def once(
    operation: Callable[Concatenate[Transaction, P], Awaitable[T]],
) -> Callable[Concatenate[Transaction, P], Awaitable[T]]:
    """The operation, for one call of `Database.write`; tried again, it answers as the first time.

    Its answer must be something that JSON knows. For calls that are rare: each leaves a row.
    """
    token = new_token()

    @functools.wraps(operation)
    async def receipted(tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if tx.repeated and (answers := await _find(tx, token)):
            answer: T = json.loads(answers[0].answer)
            return answer
        outcome = await operation(tx, *args, **kwargs)
        await tx.execute(
            tx.dialect.insert(tx.tables.receipts).values(
                token=token, answer=json.dumps(outcome), created_at=tx.dialect.now()
            )
        )
        return outcome

    return receipted


async def prune(tx: Transaction) -> None:
    """Delete receipts that nobody will ask for any more."""
    receipts = tx.tables.receipts
    await tx.execute(delete(receipts).where(receipts.c.created_at <= tx.dialect.now(plus=-KEPT)))


async def _find(tx: Transaction, token: int) -> Any:
    receipts = tx.tables.receipts
    return await tx.rows(select(receipts.c.answer).where(receipts.c.token == token))
