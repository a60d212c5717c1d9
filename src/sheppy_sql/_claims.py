"""Which tasks one backend instance has taken, and by which claim."""

from __future__ import annotations

from collections.abc import Iterable

MOST_LOST = 10_000


class Claims:
    """The tokens of an instance's claims; they outlive its connections.

    A claim that was lost (the task was retried or cleared, or handed back by a
    disconnect) is remembered too, so that a late result of it is still refused.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], int] = {}
        self._lost: dict[tuple[str, str], int] = {}

    def take(self, queue: str, task_ids: Iterable[str], token: int) -> None:
        for task_id in task_ids:
            self._lost.pop((queue, task_id), None)
            self._held[queue, task_id] = token

    def token(self, queue: str, task_id: str) -> int | None:
        """The token to write with; None where this instance never took the task."""
        key = (queue, task_id)
        return self._held.get(key, self._lost.get(key))

    def end(self, queue: str, task_id: str, token: int | None) -> None:
        """Forget a claim, its task being stored, unless the task was taken anew meanwhile."""
        for claims in (self._held, self._lost):
            if claims.get((queue, task_id)) == token:
                claims.pop((queue, task_id), None)

    def lose(self, queue: str, task_id: str, token: int | None) -> None:
        """Keep a claim's token only to refuse what still comes of it."""
        if token is not None and self._held.get((queue, task_id)) == token:
            self._lost[queue, task_id] = self._held.pop((queue, task_id))
        if len(self._lost) > MOST_LOST:
            del self._lost[next(iter(self._lost))]

    def lose_all(self) -> None:
        for (queue, task_id), token in list(self._held.items()):
            self.lose(queue, task_id, token)

    @property
    def any_held(self) -> bool:
        return bool(self._held)

    def holds_elsewhere(self, queue: str, task_id: str) -> bool:
        """Whether a task of that id was taken from another queue, and not from this one."""
        return (queue, task_id) not in self._held and any(held == task_id for _, held in self._held)
