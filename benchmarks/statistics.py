"""Medians, spreads and ratios of the runs of one benchmark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOISY = 0.25
"""Where the spread is more than this part of the median, a figure counts as noisy."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The runs of one figure."""

    median: float
    least: float
    most: float
    runs: int

    @property
    def spread(self) -> float:
        """From the least to the most, as a part of the median; 0 for a single run."""
        return (self.most - self.least) / self.median if self.median else 0.0

    @property
    def is_noisy(self) -> bool:
        return self.spread > NOISY


def summarize(values: Sequence[float]) -> Summary:
    """ValueError where there are no values."""
    if not values:
        raise ValueError("No run has given a value")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all are not above (nearest rank); ValueError without any."""
    if not values:
        raise ValueError("No values, no percentiles")
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Summary | None:
    """Ours to theirs within each run, by the run's number; None where no run has both.

    What disturbs the machine for a while disturbs both, so this is steadier than the
    ratio of two medians.
    """
    pairs = [(ours[run], theirs[run]) for run in sorted(ours) if theirs.get(run)]
    return summarize([mine / other for mine, other in pairs]) if pairs else None
