"""SqlBackend's options, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from ._payloads import FAILURES, Payload
from ._validation import check_count, check_number
from .schema import DEFAULT_PREFIX

DAY = 86_400.0
DEFAULT_TTL = 30 * DAY
DEFAULT_MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
LARGEST_PAYLOAD_BYTES = 512 * 1024 * 1024
LONGEST_GRACE = 1_000 * 365 * DAY
LONGEST_TTL = 10_000 * 365 * DAY / 2  # beyond it, the databases' calendars end
INHERIT = "inherit"
SHORTEST_LEASE = 1.0  # seconds
LONGEST_LEASE = DAY
LONGEST_HANDOVER = 30.0  # seconds
CRASH_POLICIES = ("requeue", "fail")
NOTIFY_MODES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See SqlBackend for what each one means."""

    schema: str | None = None
    table_prefix: str = DEFAULT_PREFIX
    ttl: float | None = DEFAULT_TTL
    error_ttl: float | str | None = INHERIT
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    pool_size: int = 4
    connect_timeout: float = 10.0
    max_poll_interval: float = 0.25
    notify: str = "auto"
    outage_grace: float = 60.0
    lease: float = 60.0
    max_loop_stall: float | None = None
    on_crash: str = "requeue"
    max_crashes: int = 5
    resume_workflows_after: float | None = 60.0
    migrate: bool = False
    prepared_statements: bool | None = None

    def __post_init__(self) -> None:
        _check_ttl("ttl", self.ttl)
        if self.error_ttl != INHERIT:
            if isinstance(self.error_ttl, str):
                raise ValueError('error_ttl must be a number of seconds, None or "inherit"')
            _check_ttl("error_ttl", self.error_ttl)
        _check_range("max_payload_bytes", self.max_payload_bytes, 1, LARGEST_PAYLOAD_BYTES)
        _check_range("pool_size", self.pool_size, 1, 1000)
        _check_seconds("connect_timeout", self.connect_timeout)
        _check_seconds("max_poll_interval", self.max_poll_interval)
        if self.notify not in NOTIFY_MODES:
            raise ValueError(f"notify must be one of {', '.join(map(repr, NOTIFY_MODES))}")
        if check_number(self.outage_grace, "outage_grace") < 0:
            raise ValueError("outage_grace must be a number of seconds, 0 for none")
        if not SHORTEST_LEASE <= check_number(self.lease, "lease") <= LONGEST_LEASE:
            raise ValueError(
                f"lease must be between {SHORTEST_LEASE:g} and {LONGEST_LEASE:g} seconds"
            )
        if self.max_loop_stall is not None:
            _check_seconds("max_loop_stall", self.max_loop_stall)
        if self.on_crash not in CRASH_POLICIES:
            raise ValueError(f"on_crash must be one of {', '.join(map(repr, CRASH_POLICIES))}")
        _check_range("max_crashes", self.max_crashes, 1, 1000)
        _check_grace("resume_workflows_after", self.resume_workflows_after)
        if not isinstance(self.migrate, bool):
            raise ValueError("migrate must be True or False")
        if not (self.prepared_statements is None or isinstance(self.prepared_statements, bool)):
            raise ValueError("prepared_statements must be True, False or None")

    @property
    def handover(self) -> float:
        """Seconds in which the second of two calls of a worker must follow the first.

        It takes from the schedule and puts in line, or stores a failure and schedules the retry.
        Where it died in between, the task is due again by then.
        """
        return min(LONGEST_HANDOVER, self.lease)

    def ttl_for(self, task: Payload) -> float | None:
        """Seconds that a finished task is kept; None for ever.

        What the task itself says goes first. sheppy 0.0.7 knows no such fields, its next
        release does.
        """
        status = task.get("status")
        failed = isinstance(status, str) and status in FAILURES
        ttl = _own_ttl(task, "error_ttl") if failed else INHERIT
        if isinstance(ttl, str):
            ttl = _own_ttl(task, "ttl")
        if isinstance(ttl, str) and failed:
            ttl = self.error_ttl
        return self.ttl if isinstance(ttl, str) else ttl


def _own_ttl(task: Payload, name: str) -> float | str | None:
    """What a task says of its own; whatever it is, it fails no write."""
    config = task.get("config")
    ttl = config[name] if isinstance(config, dict) and name in config else task.get(name, INHERIT)
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not ttl > 0:
        return INHERIT
    return float(min(ttl, LONGEST_TTL))


def _check_ttl(name: str, value: float | str | None) -> None:
    if value is None:
        return
    seconds = check_number(value, name)
    if not 0 < seconds <= LONGEST_TTL:
        raise ValueError(f"{name} must be a positive number of seconds, or None to keep for ever")


def _check_grace(name: str, value: float | None) -> None:
    if value is None:
        return
    if not 0 < check_number(value, name) <= LONGEST_GRACE:
        raise ValueError(f"{name} must be a positive number of seconds, or None for never")


def _check_seconds(name: str, value: float) -> None:
    if check_number(value, name) <= 0:
        raise ValueError(f"{name} must be a positive number of seconds")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= check_count(value, name) <= most:
        raise ValueError(f"{name} must be between {least} and {most}")
