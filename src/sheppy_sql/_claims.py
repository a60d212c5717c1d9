"""Which tasks one backend instance has taken, and by which claim."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from ._suspects import SOLITUDE

MOST_REMEMBERED = 10_000
LATEST_ACKNOWLEDGEMENT = 60.0  # seconds after a task was postponed

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Park:
    """What the worker's next call of `schedule` for a task that it will retry must find."""

    retry_at: datetime
    """As the worker chose it; a call with another time is somebody else's."""
    token: int | None
    """Of the claim under which the task was put aside; None where that claim was lost."""
    grace: float
    """Seconds beyond the retry's time after which the task is due by itself."""


class Claims:
    """The tokens of an instance's claims; they outlive its connections.

    A claim that was lost (the task was retried or cleared, taken over by another, or handed back
    by a disconnect) is remembered too, so that a late result of it is still refused.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], int] = {}
        self._lost: dict[tuple[str, str], int] = {}
        self._suspects: dict[int, float] = {}  # tokens, and when each was taken
        self._postponed: dict[tuple[str, str], float] = {}
        self._parks: dict[tuple[str, str], Park] = {}
        self._slots: dict[tuple[str, str], datetime] = {}
        self._completed: dict[tuple[str, str], None] = {}

    def take(
        self, queue: str, task_ids: Iterable[str], token: int, *, suspect: bool = False
    ) -> None:
        """Remember a claim; `suspect`: on a task whose worker has died before."""
        for task_id in task_ids:
            self._lost.pop((queue, task_id), None)
            self._parks.pop((queue, task_id), None)
            self._slots.pop((queue, task_id), None)
            self._completed.pop((queue, task_id), None)
            self._held[queue, task_id] = token
            if suspect:
                self._suspects[token] = time.monotonic()

    def token(self, queue: str, task_id: str) -> int | None:
        """The token to write with; None where this instance never took the task."""
        key = (queue, task_id)
        return self._held.get(key, self._lost.get(key))

    def held(self, queue: str, task_id: str) -> int | None:
        """The token of a claim that is not known to be lost."""
        return self._held.get((queue, task_id))

    def queues_of(self, task_id: str) -> list[str]:
        """From which a task of that id is held."""
        return sorted(queue for queue, held in self._held if held == task_id)

    def is_lost(self, task_id: str) -> bool:
        return any(lost == task_id for _, lost in self._lost)

    def complete(self, queue: str, task_id: str) -> None:
        """Expect the host to store a task once more that has completed in its own transaction."""
        _remember(self._completed, (queue, task_id), None)

    def is_completed(self, queue: str | None, task_id: object) -> bool:
        """Whether it has, and was not taken since; None: in any queue."""
        if queue is None:
            return any(completed == task_id for _, completed in self._completed)
        return isinstance(task_id, str) and (queue, task_id) in self._completed

    def end(self, queue: str, task_id: str, token: int | None) -> None:
        """Forget a claim, its task being stored, unless the task was taken anew meanwhile."""
        for claims in (self._held, self._lost):
            if claims.get((queue, task_id)) == token:
                claims.pop((queue, task_id), None)
        self._suspects.pop(token or 0, None)

    def lose(self, queue: str, task_id: str, token: int | None) -> None:
        """Keep a claim's token only to refuse what still comes of it."""
        if token is not None and self._held.get((queue, task_id)) == token:
            _remember(self._lost, (queue, task_id), self._held.pop((queue, task_id)))
            self._suspects.pop(token, None)

    def lose_all(self) -> None:
        for (queue, task_id), token in list(self._held.items()):
            self.lose(queue, task_id, token)

    @property
    def any_held(self) -> bool:
        return bool(self._held)

    @property
    def holds_suspect(self) -> bool:
        """Whether a task is held beside which none may be taken yet."""
        lately = time.monotonic() - SOLITUDE
        return any(taken_at > lately for taken_at in self._suspects.values())

    def holds_elsewhere(self, queue: str, task_id: str) -> bool:
        """Whether a task of that id was taken from another queue, and not from this one."""
        return (queue, task_id) not in self._held and any(held == task_id for _, held in self._held)

    def park(self, queue: str, task_id: str, park: Park) -> None:
        """Expect the call of `schedule` by which the host follows up on a retry."""
        _remember(self._parks, (queue, task_id), park)

    def take_park(self, queue: str, task_id: str, at: datetime) -> Park | None:
        """The park that a call of `schedule` for the time `at` follows up, if it is one."""
        park = self._parks.get((queue, task_id))
        if park is None or park.retry_at != at:
            return None
        return self._parks.pop((queue, task_id))

    def keep_slot(self, queue: str, task_id: str, slot: datetime) -> None:
        """Expect the call of `schedule` by which the host heeds a rate limiter.

        `slot`: when the limiter lets the task start, by the database's clock.
        """
        _remember(self._slots, (queue, task_id), slot)

    def postpone(self, queue: str, task_id: str, token: int) -> None:
        """End a claim whose task was scheduled; the host will acknowledge it as well."""
        self.end(queue, task_id, token)
        _remember(self._postponed, (queue, task_id), time.monotonic())

    def take_postponed(self, queue: str, task_id: str) -> bool:
        """Whether an acknowledgement means a claim that has ended so, and not a newer one."""
        postponed_at = self._postponed.pop((queue, task_id), -math.inf)
        return time.monotonic() - postponed_at < LATEST_ACKNOWLEDGEMENT

    def take_slot(self, queue: str, task_id: str) -> datetime | None:
        return self._slots.pop((queue, task_id), None)


def _remember(memory: dict[K, V], key: K, value: V) -> None:
    memory[key] = value
    if len(memory) > MOST_REMEMBERED:
        del memory[next(iter(memory))]
