"""SqlBackend's options, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from ._payloads import FAILURES
from ._validation import check_count, check_number
from .schema import DEFAULT_PREFIX

DAY = 86_400.0
DEFAULT_TTL = 30 * DAY
DEFAULT_MAX_PAYLOAD_BYTES = 64 * 1024 * 1024
LARGEST_PAYLOAD_BYTES = 512 * 1024 * 1024
LONGEST_TTL = 10_000 * 365 * DAY / 2  # beyond it, the databases' calendars end
INHERIT = "inherit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See SqlBackend for what each one means."""

    schema: str | None = None
    table_prefix: str = DEFAULT_PREFIX
    ttl: float | None = DEFAULT_TTL
    error_ttl: float | str | None = INHERIT
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    pool_size: int = 5
    connect_timeout: float = 10.0
    max_poll_interval: float = 0.25
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
        if not isinstance(self.migrate, bool):
            raise ValueError("migrate must be True or False")
        if not (self.prepared_statements is None or isinstance(self.prepared_statements, bool)):
            raise ValueError("prepared_statements must be True, False or None")

    def ttl_for(self, status: str | None) -> float | None:
        """Seconds that a finished task of this status is kept; None for ever."""
        if status in FAILURES and not isinstance(self.error_ttl, str):
            return self.error_ttl
        return self.ttl


def _check_ttl(name: str, value: float | str | None) -> None:
    if value is None:
        return
    seconds = check_number(value, name)
    if not 0 < seconds <= LONGEST_TTL:
        raise ValueError(f"{name} must be a positive number of seconds, or None to keep for ever")


def _check_seconds(name: str, value: float) -> None:
    if check_number(value, name) <= 0:
        raise ValueError(f"{name} must be a positive number of seconds")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= check_count(value, name) <= most:
        raise ValueError(f"{name} must be between {least} and {most}")
