"""What the machines share: how long they run, two backends, cancellations at a chosen moment."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test

from sheppy_sql import SqlBackend

if TYPE_CHECKING:
    from tests.support.databases import TestDatabase

T = TypeVar("T")

FUZZ = os.environ.get("SHEPPY_SQL_FUZZ") == "1"
FUZZ_FACTOR = 30
RULES_PER_EXAMPLE = 100
RULES_BETWEEN_FULL_LOOKS = 20

# Of `make test` too: finding the shortest counterexample takes some minutes.
needs_time = pytest.mark.timeout(3600)


class Backends:
    """Two backends on one database, called from code that is not async."""

    def __init__(self, database: TestDatabase) -> None:
        self._loop = asyncio.new_event_loop()
        self.both = [SqlBackend(database.worker_url), SqlBackend(database.worker_url)]
        self.rules = 0

    def run(self, call: Awaitable[T]) -> T:
        return self._loop.run_until_complete(call)

    def open(self) -> None:
        for backend in self.both:
            self.run(backend.connect())

    def close(self) -> None:
        for backend in self.both:
            self.run(backend.disconnect())
        self._loop.close()


class Machine(RuleBasedStateMachine):
    """Each rule is a call to one of two backends, whose answer must be the model's."""

    backends: Backends  # of the test

    def __init__(self) -> None:
        super().__init__()
        self.queue = f"queue-{next(numbers)}"
        self.ran = -1  # rules; there is one look before the first

    @invariant()
    def backends_show_what_the_model_does(self) -> None:
        self.ran += 1
        if self.ran % RULES_BETWEEN_FULL_LOOKS:
            self.look_at_one_thing()
        else:
            self.look_at_everything()
        if self.ran:
            self.backends.rules += 1

    def look_at_one_thing(self) -> None:
        """Compare something that is cheap to get, and shows most mistakes."""
        raise NotImplementedError

    def look_at_everything(self) -> None:
        raise NotImplementedError

    def backend(self, who: int) -> SqlBackend:
        return self.backends.both[who]

    def run(self, call: Awaitable[T]) -> T:
        return self.backends.run(call)

    def all(self, *calls: Awaitable[Any]) -> list[Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*calls)

        return self.run(gather())


def run_machine(machine: type[Machine], database: TestDatabase, rules: int) -> None:
    """Run at least so many rules, the same ones every time unless FUZZ."""
    backends = Backends(database)
    # More, as an example ends early once it has drawn all it may.
    examples = rules * 14 // 10 // RULES_PER_EXAMPLE * (FUZZ_FACTOR if FUZZ else 1)
    bound = type(machine.__name__, (machine,), {"backends": backends})
    try:
        backends.open()
        run_state_machine_as_test(
            bound,
            settings=settings(
                max_examples=examples,
                stateful_step_count=RULES_PER_EXAMPLE,
                derandomize=not FUZZ,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        backends.close()
    assert backends.rules >= rules, f"only {backends.rules} rules ran"


class CancelledAt(Generic[T]):
    """An awaitable that is cancelled each time it comes to wait for one of the given times.

    Unlike a cancellation after a while, this always meets the same line of code.
    """

    def __init__(self, call: Coroutine[Any, Any, T], times: set[int]) -> None:
        self._call = call
        self._times = times

    def __await__(self) -> Generator[Any, None, T]:
        steps = self._call.__await__()
        error: BaseException | None = None
        for time in itertools.count():
            try:
                waits_for = next(steps) if error is None else steps.throw(error)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]  # StopIteration is not generic
            if time in self._times:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            error = None
            try:
                yield waits_for
            except BaseException as thrown:  # noqa: BLE001  # it goes on into the call
                error = thrown
        raise AssertionError("unreachable")


numbers = itertools.count()
