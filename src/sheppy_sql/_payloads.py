"""The host's dicts as JSON text and back, and what people filter on beside it.

Text, exactly as Python wrote it, never jsonb: jsonb reorders keys (a cron's id
is a hash over them) and refuses characters that sheppy produces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ._validation import check_key

Payload = dict[str, Any]

LABEL_LENGTH = 200
MAX_NESTING = 500
"""Half of what Python's parser follows from a short stack: whoever reads may have a longer one."""

FAILURES = frozenset({"failed", "crashed", "cancelled"})


class TooLargeError(ValueError):
    """A payload that is good but for its size."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as it is stored: its text, and columns that exist for people."""

    id: str
    payload: str
    func: str | None
    status: str | None
    created_at: datetime | None


def encode(payload: Payload, what: str, max_bytes: int) -> str:
    """`payload` as ASCII JSON; ValueError where it is no dict, not JSON, or too large."""
    if not isinstance(payload, dict):
        raise ValueError(f"{what} must be a dict, not {type(payload).__name__}")
    try:
        encoded = json.dumps(payload)
    # RecursionError: nested deeper than the interpreter can follow, or into itself.
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {_reason(error)}") from None
    if encoded.count("[") + encoded.count("{") > MAX_NESTING and _nesting(payload) > MAX_NESTING:
        raise ValueError(f"{what} is not JSON: {_reason(RecursionError())}")
    if len(encoded) > max_bytes:
        raise TooLargeError(
            f"{what} has {len(encoded)} bytes as JSON; max_payload_bytes allows {max_bytes}"
        )
    return encoded


def decode(encoded: str) -> Payload:
    payload: Payload = json.loads(encoded)
    return payload


def encode_task(task: Payload, max_bytes: int) -> TaskRow:
    """A task dict as a row; ValueError says what is wrong with it, never what is in it."""
    encoded = encode(task, "task", max_bytes)
    if "id" not in task:
        raise ValueError("task has no 'id'")
    spec = task.get("spec")
    return TaskRow(
        id=check_key(task["id"], "task id"),
        payload=encoded,
        func=_label(spec.get("func") if isinstance(spec, dict) else None),
        status=_label(task.get("status")),
        created_at=moment(task.get("created_at")),
    )


def failure_of(task: Payload, error: str) -> Payload:
    """A task as it ends where nobody could run it to its own end."""
    return {
        **task,
        "status": "failed",
        "result": None,
        "error": error,
        "finished_at": datetime.now(timezone.utc).isoformat(),
    }


def moment(value: object) -> datetime | None:
    """The ISO time that sheppy wrote, in UTC; None where it is none."""
    if not isinstance(value, str):
        return None
    try:
        # Python 3.10 does not know the "Z" that pydantic writes.
        parsed = datetime.fromisoformat(value.removesuffix("Z") + "+00:00" * value.endswith("Z"))
        return parsed.astimezone(timezone.utc) if parsed.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _nesting(payload: Payload) -> int:
    """How deep the deepest value stands; without recursion."""
    depth = 0
    level: list[Any] = [payload]
    while level:
        depth += 1
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = [value for value in inner if isinstance(value, (dict, list, tuple))]
    return depth


def _label(value: object) -> str | None:
    """Never fails a write, whatever it is given."""
    if not isinstance(value, str):
        return None
    if value.isascii() and "\0" not in value:
        return value[:LABEL_LENGTH]
    return value[:LABEL_LENGTH].encode(errors="replace").decode().replace("\0", "?")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"it is nested too deeply, {MAX_NESTING} levels are allowed"
    return str(error) if isinstance(error, TypeError) else "it holds a value that JSON cannot write"
