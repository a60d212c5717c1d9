"""What is said to other processes. It names topics by their marks, and holds nothing of a task."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sqlalchemy import Text, func, literal, select

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._database import Transaction

TO_ALL = "-"
"""In the place of a sender who wants to hear it himself."""


def channel_of(installation: str) -> str:
    """The channel of one installation, by the random name of its tables; 43 bytes."""
    digest = hashlib.blake2b(installation.encode(), digest_size=16).hexdigest()
    return f"sheppy_sql_{digest}"


def text_of(sender: str, marks: Iterable[str]) -> str:
    return " ".join([sender, *marks])


async def send(tx: Transaction, channel: str, text: str) -> None:
    """Notify whoever listens, once the transaction is committed."""
    await tx.execute(select(func.pg_notify(literal(channel, Text), literal(text, Text))))
