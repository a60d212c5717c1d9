"""What a caller may pass: checked before any SQL, so that bad input changes nothing."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

from croniter import CroniterError, croniter

MAX_KEY_BYTES = 512
"""Queue and id share one B-tree entry, which PostgreSQL ends at 2,704 bytes."""

MAX_LIMIT = 2**31 - 1

EARLIEST = datetime.min.replace(tzinfo=timezone.utc)
LATEST = datetime.max.replace(tzinfo=timezone.utc)


def check_key(value: object, what: str) -> str:
    """`value` if it can be a key in both databases; ValueError says why it cannot."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{what} must not contain a NUL character")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} cannot be written as UTF-8 (it has a lone surrogate)") from None
    if size > MAX_KEY_BYTES:
        raise ValueError(f"{what} has {size} bytes as UTF-8; at most {MAX_KEY_BYTES} are allowed")
    return value


def check_queue(value: object) -> str:
    return check_key(value, "queue name")


def check_keys(values: object, what: str) -> list[str]:
    """`values` without repetitions, in order."""
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise ValueError(f"{what}s must be a list, not {type(values).__name__}")
    return list(dict.fromkeys(check_key(value, what) for value in values))


def check_timeout(value: object) -> float | None:
    """Seconds as the host gives them; None where it gave none."""
    return None if value is None else check_number(value, "timeout", finite=False)


def check_count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} must be an int, not {type(value).__name__}")
    return value


def check_limit(value: object, what: str) -> int:
    """A number of rows, cut to what both databases take as a LIMIT."""
    return min(check_count(value, what), MAX_LIMIT)


def check_number(value: object, what: str, *, finite: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{what} is too large") from None
    if math.isnan(number) or (finite and math.isinf(number)):
        raise ValueError(f"{what} must be a finite number, not {number}")
    return number


def check_moment(value: object, what: str) -> datetime:
    """An aware datetime in UTC; the ends of the calendar where UTC would pass them."""
    if not isinstance(value, datetime):
        raise ValueError(f"{what} must be a datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise ValueError(f"{what} must be timezone-aware: use datetime.now(timezone.utc)")
    try:
        return value.astimezone(timezone.utc)
    except OverflowError:
        return EARLIEST if value.year == 1 else LATEST


def check_cron_expression(payload: dict[str, Any]) -> str | None:
    """The cron's expression if croniter can find its next run; None where there is none."""
    expression = payload.get("expression")
    if expression is None:
        return None
    if not isinstance(expression, str):
        raise ValueError(f"cron expression must be a str, not {type(expression).__name__}")
    try:
        # is_valid alone accepts the 31st of February, whose next run would stop a worker.
        croniter(expression, datetime.now(timezone.utc)).get_next(datetime)
    except (CroniterError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"cron expression {expression[:100]!r} is not valid: {error}") from None
    return expression
