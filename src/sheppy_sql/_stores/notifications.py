"""What is said to other processes. It names topics by their marks, and holds nothing of a task."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sqlalchemy import Text, bindparam, func, select
from sqlalchemy.types import NullType

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import ColumnElement

    from .._transaction import Transaction
from .._waiting import Notice

CALL: ColumnElement[None] = func.pg_notify(
    bindparam("channel", type_=Text), bindparam("text", type_=Text), type_=NullType
)
"""What sends a notice with the commit of a statement, if it is evaluated for any row there."""
_NOTIFY = select(CALL)

TO_ALL = "-"
"""In the place of a sender who wants to hear it himself."""


def channel_of(installation: str) -> str:
    """The channel of one installation, by the random name of its tables; 43 bytes."""
    digest = hashlib.blake2b(installation.encode(), digest_size=16).hexdigest()
    return f"sheppy_sql_{digest}"


def notice_of(installation: str, sender: str, marks: Iterable[str]) -> Notice:
    """Of topics, by their marks. There is no space in any of them."""
    return Notice(channel_of(installation), " ".join([sender, *marks]))


async def send(tx: Transaction, notice: Notice) -> None:
    """Notify whoever listens, once the transaction is committed."""
    await tx.execute(_NOTIFY, notice._asdict())
