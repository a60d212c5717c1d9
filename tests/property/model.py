"""What a queue should do, in plain dicts: one queue, used by several backend instances."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

Payload = dict[str, Any]

PENDING = "pending"
CLAIMED = "claimed"
SCHEDULED = "scheduled"  # by a call of schedule
LEASED = "leased"  # popped from the schedule, not yet appended
PARKED = "parked"  # to be retried, not yet scheduled
IDLE = "idle"  # stored, and in no queue
FINISHED = "finished"


@dataclass
class Entry:
    """A stored task."""

    payload: Payload
    state: str
    position: int = 0  # in line
    due: tuple[float, int] = (0.0, 0)  # days from now, then the order of parking
    token: int = 0  # of the claim or the lease


@dataclass
class Held:
    """What one backend instance remembers."""

    claims: dict[str, int] = field(default_factory=dict)
    leases: dict[str, tuple[int, Payload]] = field(default_factory=dict)

    def forget(self, task_id: str) -> None:
        self.claims.pop(task_id, None)
        self.leases.pop(task_id, None)


class Model:
    """The methods of the backend, each as the sentences of its documentation."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.crons: dict[str, Payload] = {}
        self.used = False
        self._held: defaultdict[int, Held] = defaultdict(Held)
        self._numbers = itertools.count(1)

    def append(self, tasks: list[Payload]) -> list[bool]:
        self.used = True
        return [self._add(task, PENDING) for task in tasks]

    def append_again(self, who: int, tasks: list[Payload]) -> None:
        self.used = True
        # The last of several with one id, in the place of the first.
        for task in {task["id"]: task for task in tasks}.values():
            lease = self._held[who].leases.get(task["id"])
            if lease and list(task.items()) == list({**lease[1], "status": "pending"}.items()):
                entry = self.entries.get(task["id"])
                if entry and entry.state == LEASED and entry.token == lease[0]:
                    self._put(task, PENDING)
            else:
                self._put(task, PENDING)
            self._held[who].forget(task["id"])

    def schedule(self, who: int, task: Payload, days: float, *, unique: bool) -> bool:
        self.used = True
        if unique:
            if not self._add(task, SCHEDULED):
                return False
        else:
            self._put(task, SCHEDULED)
            self._held[who].forget(task["id"])
        self.entries[task["id"]].due = (days, 0)
        return True

    def pop(self, who: int, limit: int) -> list[Payload]:
        taken = self._in_line()[: max(limit, 0)]
        token = next(self._numbers)
        for entry in taken:
            entry.state, entry.token = CLAIMED, token
            self._held[who].claims[entry.payload["id"]] = token
        return [entry.payload for entry in taken]

    def pop_scheduled(self, who: int, days: float) -> list[Payload]:
        due = [e for e in self._by_time(SCHEDULED) if e.due[0] <= days]
        # Parked ones by the database's clock, whatever time is given.
        due += [e for e in self._by_time(PARKED) if e.due[0] <= 0]
        due.sort(key=lambda entry: (entry.due, entry.payload["id"]))
        token = next(self._numbers)
        for entry in due:
            entry.state, entry.token = LEASED, token
            self._held[who].leases[entry.payload["id"]] = (token, entry.payload)
        return [entry.payload for entry in due]

    def store_result(self, who: int, task: Payload, *, retry_in_days: float | None) -> None:
        task_id = task["id"]
        entry, token = self.entries.get(task_id), self._held[who].claims.get(task_id)
        if token is not None and not self._claimed(task_id, token):
            return
        if task["finished_at"]:
            self.entries[task_id] = Entry(task, FINISHED)
        elif token is not None:
            parked = retry_in_days is not None
            self.entries[task_id] = Entry(task, PARKED if parked else IDLE)
            self.entries[task_id].due = (retry_in_days or 0.0, next(self._numbers))
        elif entry is None or entry.state == FINISHED:
            self.entries[task_id] = Entry(task, IDLE)
        else:
            entry.payload = task
        self._held[who].claims.pop(task_id, None)

    def acknowledge(self, who: int, ids: list[str]) -> None:
        for task_id in ids:
            token = self._held[who].claims.pop(task_id, None)
            if token is not None and self._claimed(task_id, token):
                self.entries[task_id].state = IDLE

    def clear(self) -> int:
        removed = len(self.entries) + len(self.crons)
        self.entries, self.crons, self.used = {}, {}, False
        return removed

    def add_cron(self, cron_id: str, cron: Payload) -> bool:
        return self.crons.setdefault(cron_id, cron) is cron

    def delete_cron(self, cron_id: str) -> bool:
        return self.crons.pop(cron_id, None) is not None

    def disconnect(self, who: int) -> None:
        """What it took returns to its old place; what it leased stays leased."""
        for task_id, token in self._held[who].claims.items():
            if self._claimed(task_id, token):
                self.entries[task_id].state = PENDING
        # Its claims stay remembered: what still comes of them is late.
        self._held[who].leases.clear()

    def claims_of(self, who: int) -> list[str]:
        """Ids that it popped and has not stored since, still its own or not."""
        return list(self._held[who].claims)

    def leases_of(self, who: int) -> dict[str, Payload]:
        """What it popped from the schedule and has not appended since."""
        return {task_id: payload for task_id, (_, payload) in self._held[who].leases.items()}

    def is_listed(self) -> bool:
        return self.used or bool(self.entries)

    def pending(self) -> list[Payload]:
        return [entry.payload for entry in self._in_line()]

    def scheduled(self) -> list[Payload]:
        return [entry.payload for entry in self._by_time(SCHEDULED)]

    def tasks(self) -> dict[str, Payload]:
        return {task_id: entry.payload for task_id, entry in self.entries.items()}

    def results(self) -> dict[str, Payload]:
        return {i: entry.payload for i, entry in self.entries.items() if entry.state == FINISHED}

    def stats(self) -> dict[str, int]:
        return {
            "pending": len(self.pending()),
            "completed": len(self.results()),
            "scheduled": len(self.scheduled()),
        }

    def _add(self, task: Payload, state: str) -> bool:
        if task["id"] in self.entries:
            return False
        self._put(task, state)
        return True

    def _put(self, task: Payload, state: str) -> None:
        before = self.entries.get(task["id"])
        stays = before is not None and before.state == state == PENDING
        position = before.position if before and stays else next(self._numbers)
        self.entries[task["id"]] = Entry(task, state, position)

    def _claimed(self, task_id: str, token: int) -> bool:
        entry = self.entries.get(task_id)
        return entry is not None and entry.state == CLAIMED and entry.token == token

    def _in_line(self) -> list[Entry]:
        pending = [entry for entry in self.entries.values() if entry.state == PENDING]
        return sorted(pending, key=lambda entry: entry.position)

    def _by_time(self, state: str) -> list[Entry]:
        found = [entry for entry in self.entries.values() if entry.state == state]
        return sorted(found, key=lambda entry: (entry.due, entry.payload["id"]))
