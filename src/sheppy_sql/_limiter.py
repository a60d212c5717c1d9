"""Rate limits."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from ._stores import rate_limits as rate_limit_store
from ._stores.receipts import once
from ._validation import check_count, check_key, check_number, check_queue

if TYPE_CHECKING:
    from ._claims import Claims
    from ._database import Database

FIXED_WINDOW = "fixed_window"
LONGEST_PERIOD = 100 * 365 * 86_400.0  # seconds


class Limiter:
    """The rate limiters of one installation."""

    def __init__(self, database: Database, claims: Claims) -> None:
        self._database = database
        self._claims = claims

    async def acquire(
        self,
        queue: str,
        key: str,
        max_rate: int,
        rate_period: float,
        task_id: str,
        strategy: str,
    ) -> float | None:
        check_queue(queue)
        check_key(key, "rate limit key")
        check_key(task_id, "task id")
        if check_count(max_rate, "max_rate") <= 0:
            raise ValueError("max_rate must be at least 1")
        if not 0 < check_number(rate_period, "rate_period") <= LONGEST_PERIOD:
            raise ValueError(
                f"rate_period must be a positive number of seconds, at most {LONGEST_PERIOD:g}"
            )
        wait = await self._database.write(
            "acquire a rate limit",
            once(rate_limit_store.acquire),
            queue,
            key,
            task_id,
            max_rate=max_rate,
            period=timedelta(seconds=rate_period),
            fixed_window=strategy == FIXED_WINDOW,
        )
        if wait is None:
            return None
        seconds, slot = wait
        self._claims.keep_slot(queue, task_id, datetime.fromisoformat(slot))
        return seconds
