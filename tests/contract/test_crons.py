"""Crons: stored once, shown, deleted."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.tasks import QUEUE, MakeBackend, everything

if TYPE_CHECKING:
    from sheppy_sql import SqlBackend


def make_cron(minute: int = 0, **changes: Any) -> dict[str, Any]:
    return {"expression": f"{minute} * * * *", "spec": {"func": "app:job"}, **changes}


async def test_cron_is_added_once_and_stays_as_it_was(backend: SqlBackend) -> None:
    assert await backend.add_cron(QUEUE, "cron", make_cron()) is True
    assert await backend.add_cron(QUEUE, "cron", make_cron(30)) is False
    assert await backend.get_crons(QUEUE) == [make_cron()]


async def test_deleted_cron_is_gone_and_may_be_added_again(backend: SqlBackend) -> None:
    await backend.add_cron(QUEUE, "cron", make_cron())
    assert await backend.delete_cron(QUEUE, "cron") is True
    assert await backend.delete_cron(QUEUE, "cron") is False
    assert await backend.get_crons(QUEUE) == []
    assert await backend.add_cron(QUEUE, "cron", make_cron(30)) is True
    assert await backend.get_crons(QUEUE) == [make_cron(30)]


async def test_crons_belong_to_their_queue(backend: SqlBackend) -> None:
    await backend.add_cron(QUEUE, "cron", make_cron(1))
    assert await backend.add_cron("other", "cron", make_cron(2)) is True
    assert await backend.get_crons("other") == [make_cron(2)]
    assert await backend.get_crons("unknown") == []
    assert await backend.delete_cron("unknown", "cron") is False
    assert await backend.get_crons(QUEUE) == [make_cron(1)]


async def test_crons_are_shown_the_oldest_first(backend: SqlBackend) -> None:
    for minute in (5, 3, 8, 1):
        await backend.add_cron(QUEUE, f"cron-{minute}", make_cron(minute, managed_by="app"))
    expected = [make_cron(minute, managed_by="app") for minute in (5, 3, 8, 1)]
    assert await backend.get_crons(QUEUE) == expected


async def test_crons_are_no_tasks(backend: SqlBackend) -> None:
    await backend.add_cron(QUEUE, "cron", make_cron())
    assert await backend.get_all_tasks(QUEUE) == []
    assert await backend.get_tasks(QUEUE, ["cron"]) == {}
    assert await backend.get_stats(QUEUE) == {"pending": 0, "completed": 0, "scheduled": 0}


async def test_one_of_many_concurrent_adders_of_a_cron_wins(make_backend: MakeBackend) -> None:
    backends = [await make_backend(), await make_backend()]
    added = await asyncio.gather(
        *(backend.add_cron(QUEUE, "cron", make_cron()) for _ in range(5) for backend in backends)
    )
    assert added.count(True) == 1
    deleted = await asyncio.gather(
        *(backend.delete_cron(QUEUE, "cron") for _ in range(5) for backend in backends)
    )
    assert deleted.count(True) == 1


@pytest.mark.parametrize("expression", ["", "never", "61 * * * *", "0 0 31 2 *", "* * *", 5])
async def test_expression_without_a_next_run_is_refused(
    backend: SqlBackend, expression: object
) -> None:
    before = await everything(backend)
    with pytest.raises(ValueError, match="cron expression"):
        await backend.add_cron(QUEUE, "cron", make_cron(expression=expression))
    assert await everything(backend) == before
