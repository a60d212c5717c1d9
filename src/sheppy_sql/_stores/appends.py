"""New tasks by one statement: a function that the revisions have made on the server.

Its own statements each see what has been committed meanwhile, which one INSERT would not: an id may
be finishing at this moment. And there is one round trip to wait for, with its COMMIT.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, BigInteger, Boolean, Text, bindparam, select
from sqlalchemy.sql.functions import Function

from ..schema import Routine, Timestamp
from ._common import milliseconds

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.types import TypeEngine

    from .._payloads import TaskRow
    from .._transaction import Transaction
    from .._waiting import Notice

PARAMETERS: dict[str, TypeEngine[Any]] = {
    "queue": Text(),
    "token": BigInteger(),
    "lock_timeout": Text(),
    "registers": Boolean(),
    "ids": ARRAY(Text()),
    "payloads": ARRAY(Text()),
    "funcs": ARRAY(Text()),
    "statuses": ARRAY(Text()),
    "created": ARRAY(Timestamp()),
    "places": ARRAY(BigInteger()),
    "channel": Text(),
    "notice": Text(),
}
"""In the function's order."""


async def append(
    tx: Transaction,
    queue: str,
    rows: Sequence[TaskRow],
    token: int,
    *,
    registers: bool,
    lock_timeout: float,
    notice: Notice | None = None,
) -> set[str]:
    """The ids that were new to the queue, now in line; an id occurs once in `rows`.

    Fails where a row is locked for longer than `lock_timeout` seconds. The same ids again where it
    is repeated under the same token. `registers`: the queue becomes known. A notice is sent with
    the commit.
    """
    # In the order of the ids, as everybody locks; the places are the caller's order.
    order = sorted(range(len(rows)), key=lambda index: rows[index].id)
    ordered = [rows[index] for index in order]
    [stored] = await tx.rows(
        _calling(tx.tables.append),
        {
            "queue": queue,
            "token": token,
            # What is set is set until the transaction ends: not to be felt in the caller's.
            "lock_timeout": None if tx.is_callers else milliseconds(lock_timeout),
            "registers": registers,
            "ids": [row.id for row in ordered],
            "payloads": [row.payload for row in ordered],
            "funcs": [row.func for row in ordered],
            "statuses": [row.status for row in ordered],
            "created": [row.created_at for row in ordered],
            "places": order,
            "channel": None if notice is None else notice.channel,
            "notice": None if notice is None else notice.text,
        },
    )
    return set(stored.ids)


@functools.cache
def _calling(routine: Routine) -> Select[tuple[list[str]]]:
    # Made once: it would be a fifth of what a lone append costs here.
    arguments = [bindparam(name, type_=type_) for name, type_ in PARAMETERS.items()]
    called = Function(routine.name, *arguments, type_=ARRAY(Text()), packagenames=routine.schema)
    return select(called.label("ids"))
