"""Crons: every time runs once, however many workers look after them."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from sheppy import Queue

from tests.host.support import MakeBackend, finished, running, until
from tests.host.tasks import add, echo, journal, record
from tests.support import make_worker

if TYPE_CHECKING:
    from sheppy.models import TaskCron

EVERY_SECOND = "* * * * * *"  # the sixth field
EVERY_MORNING = "0 6 * * *"


async def test_cron_is_added_once_listed_and_deleted(queue: Queue) -> None:
    # What is hashed into a cron's id must come back in its order.
    task = echo({"b": 1, "a": {"d": 2, "c": 3}})
    assert await queue.add_cron(task, EVERY_MORNING) is True
    assert await queue.add_cron(echo(task.spec.args[0]), EVERY_MORNING) is False
    assert await queue.add_cron(task, "0 7 * * *") is True
    crons = await queue.get_crons()
    assert [cron.expression for cron in crons] == [EVERY_MORNING, "0 7 * * *"]
    assert {cron.spec.model_dump_json() for cron in crons} == {task.spec.model_dump_json()}
    assert await queue.delete_cron(task, EVERY_MORNING) is True
    assert await queue.delete_cron(task, EVERY_MORNING) is False
    assert [cron.expression for cron in await queue.get_crons()] == ["0 7 * * *"]


async def test_every_second_runs_once_though_many_workers_watch(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    for value in (1, 2):
        await queue.add_cron(record(value), EVERY_SECOND)
    started = datetime.now(timezone.utc)

    async def both_ran_twice() -> bool:
        return all(count >= 2 for count in runs().values()) and len(runs()) == 2

    def runs() -> Counter[int]:
        return Counter(run.value for run in journal)

    async with running(*[make_worker(await make_backend()) for _ in range(3)]):
        await until(both_ran_twice)
    times = [(run.value, run.due_at) for run in journal]
    assert len(set(times)) == len(times)
    for run in journal:
        assert run.due_at is not None
        assert run.due_at.microsecond == 0
        assert started < run.due_at <= run.started_at
    for value in (1, 2):
        seconds = sorted(due for number, due in times if number == value and due is not None)
        assert seconds == [seconds[0] + timedelta(seconds=n) for n in range(len(seconds))]


async def test_workers_schedule_the_next_runs_and_none_twice(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    await queue.add_cron(add(1, 2), EVERY_MORNING)
    [cron] = await queue.get_crons()
    workers = [
        make_worker(await make_backend(), enable_job_processing=False, enable_scheduler=False)
        for _ in range(4)
    ]

    async def three_are_scheduled() -> bool:
        return len(await queue.get_scheduled()) >= 3

    before = datetime.now(timezone.utc)
    async with running(*workers):
        await until(three_are_scheduled)
    expected = next_runs(cron, before, 3)
    scheduled = await queue.get_scheduled()
    assert [task.scheduled_at for task in scheduled] == expected
    assert [task.id for task in scheduled] == [cron.create_task(at).id for at in expected]


def next_runs(cron: TaskCron, start: datetime, count: int) -> list[datetime]:
    runs: list[datetime] = []
    for _ in range(count):
        runs.append(cron.next_run(runs[-1] if runs else start))
    return runs


async def test_worker_whose_clock_is_late_does_not_repeat_a_run(make_backend: MakeBackend) -> None:
    queue = Queue(await make_backend(), "test")
    await queue.add_cron(add(1, 2), EVERY_MORNING)
    [cron] = await queue.get_crons()
    this_morning = cron.next_run(datetime.now(timezone.utc) - timedelta(days=1))
    task = cron.create_task(this_morning)
    assert await queue.schedule(task, this_morning) is True
    async with running(make_worker(queue.backend, enable_cron_manager=False)):
        assert (await finished(queue, task)).result == 3
    # To such a worker the time is still to come.
    assert await queue.schedule(cron.create_task(this_morning), this_morning) is False
    assert await queue.get_scheduled() == []


async def test_deleted_and_cleared_crons_run_no_more(queue: Queue) -> None:
    await queue.add_cron(add(1, 2), EVERY_MORNING)
    await queue.add_cron(add(3, 4), EVERY_MORNING)
    await queue.delete_cron(add(1, 2), EVERY_MORNING)

    async def some_are_scheduled() -> bool:
        return len(await queue.get_scheduled()) == 3

    async with running(make_worker(queue.backend)):
        await until(some_are_scheduled)
    assert {task.spec.args for task in await queue.get_scheduled()} == {(3, 4)}
    assert await queue.clear() == 4
    assert await queue.get_crons() == []
    assert await queue.get_scheduled() == []
