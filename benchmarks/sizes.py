"""How much each workload does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of tasks, unless they say otherwise."""

    name: str
    runs: int
    drain: int
    backend_drain: int
    enqueue: int
    enqueue_together: int
    enqueue_bulk: int
    starts: int
    round_trips: int
    held: tuple[int, int]
    """Of the second number, drained under a snapshot, the first and last so many are timed."""
    waiters: int
    dead: tuple[int, ...]
    """Steps, ascending, at which claims are measured."""
    backlog: tuple[int, int]
    finished: int
    claims: int
    memory: tuple[int, int]
    connections: int
    idle_seconds: float
    idle_workers: int


QUICK = Sizes(
    name="quick",
    runs=1,
    drain=300,
    backend_drain=300,
    enqueue=100,
    enqueue_together=256,
    enqueue_bulk=2_000,
    starts=20,
    round_trips=20,
    held=(200, 600),
    waiters=50,
    dead=(0, 2_000),
    backlog=(1_000, 5_000),
    finished=5_000,
    claims=20,
    memory=(300, 1_000),
    connections=300,
    idle_seconds=2.0,
    idle_workers=8,
)
"""To see whether everything works; its figures mean nothing."""

USUAL = Sizes(
    name="usual",
    runs=5,
    drain=4_000,
    backend_drain=4_000,
    enqueue=1_000,
    enqueue_together=2_000,
    enqueue_bulk=10_000,
    starts=60,
    round_trips=100,
    held=(2_000, 8_000),
    waiters=1_000,
    dead=(0, 10_000, 50_000),
    backlog=(10_000, 200_000),
    finished=400_000,
    claims=100,
    memory=(2_000, 20_000),
    connections=1_000,
    idle_seconds=10.0,
    idle_workers=100,
)
"""What fits into ten minutes."""

FULL = Sizes(
    name="full",
    runs=5,
    drain=10_000,
    backend_drain=10_000,
    enqueue=2_000,
    enqueue_together=6_400,
    enqueue_bulk=50_000,
    starts=200,
    round_trips=500,
    held=(10_000, 200_000),
    waiters=1_000,
    dead=(0, 25_000, 50_000, 100_000, 200_000),
    backlog=(10_000, 1_000_000),
    finished=2_000_000,
    claims=150,
    memory=(20_000, 200_000),
    connections=5_000,
    idle_seconds=30.0,
    idle_workers=100,
)
"""The sizes that the bars are stated for; it takes about an hour."""

ALL = {sizes.name: sizes for sizes in (QUICK, USUAL, FULL)}
