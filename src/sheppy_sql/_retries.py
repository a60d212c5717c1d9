"""What a task that failed says of its next attempt."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from ._payloads import Payload, moment

RETRYING = "retrying"
LONGEST_DELAY = 100 * 365 * 86_400.0  # seconds; beyond it, SQLite's calendar ends


class Retry(NamedTuple):
    """An attempt that is to come."""

    due: datetime | None
    """By the clock of the worker, who will name this time again as it schedules the attempt."""
    delay: float
    """Seconds from the decision to retry; what counts, whatever the worker's clock."""
    grace: float
    """Seconds after its time in which the worker may still schedule it itself."""


def retry_of(task: Payload, grace: float) -> Retry | None:
    """None where the task is not to be retried.

    The worker of sheppy 0.0.7 does not schedule the last attempt at all: that has no grace.
    """
    if task.get("status") != RETRYING:
        return None
    decided, due = moment(task.get("last_retry_at")), moment(task.get("next_retry_at"))
    delay = (due - decided).total_seconds() if due and decided else 0.0
    config = task.get("config")
    retries = config.get("retry") if isinstance(config, dict) else None
    used = task.get("retry_count")
    is_last = isinstance(retries, int) and isinstance(used, int) and used >= retries
    return Retry(due, min(max(delay, 0.0), LONGEST_DELAY), 0.0 if is_last else grace)
