"""What the jobs of other libraries do: no result of theirs is waited for, so the run counts.

Their clock stops when the last job has run, that of sheppy's systems when its result is stored;
the difference is at most one batch in favour of the others.
"""

from __future__ import annotations

import time

from ..jobs import STARTS
from ..tally import Tally

_tallies: list[Tally | None] = [None]


def count_in(tally: Tally | None) -> None:
    """Where this process counts the jobs that it runs from now on."""
    _tallies[0] = tally


def done(number: int | None) -> None:
    """A job has run; a stamped one has a number."""
    if number is not None:
        STARTS[number] = time.monotonic()
    if _tallies[0] is not None:
        _tallies[0].add()
