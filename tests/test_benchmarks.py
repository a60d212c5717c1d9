"""The benchmark's own arithmetic, its tables and page, and its proxy, on made-up figures."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import page, report
from benchmarks.bars import BARS
from benchmarks.proxy import Proxy
from benchmarks.results import Measurement, Results
from benchmarks.statistics import percentile, ratios, summarize

TEMPLATE = Path(__file__).parents[1] / "benchmarks" / "page.md"


def made_up(*measurements: Measurement) -> Results:
    return Results(started="2000-01-01", sizes={"drain": 10}, measurements=list(measurements))


def drained(system: str, *rates: float) -> list[Measurement]:
    return [Measurement("drain-1", system, run, {"rate": rate}) for run, rate in enumerate(rates)]


class TestStatistics:
    def test_summary_tells_the_median_and_where_the_runs_went(self) -> None:
        summary = summarize([4, 1, 2])
        assert (summary.median, summary.least, summary.most, summary.runs) == (2, 1, 4, 3)
        assert summary.spread == 1.5
        assert summary.is_noisy

    def test_single_run_has_no_spread(self) -> None:
        assert summarize([7]).spread == 0

    def test_percentiles_are_values_that_were_measured(self) -> None:
        values = [float(value) for value in range(1, 101)]
        assert [percentile(values, each) for each in (50, 99, 100)] == [50, 99, 100]
        assert percentile([3.0], 99) == 3

    def test_nothing_measured_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="No run"):
            summarize([])
        with pytest.raises(ValueError, match="No values"):
            percentile([], 50)

    def test_ratio_is_taken_within_each_run_and_not_of_the_medians(self) -> None:
        # The machine was ten times slower in the second run, for both.
        found = ratios({0: 200.0, 1: 20.0, 2: 200.0}, {0: 100.0, 1: 10.0, 2: 100.0})
        assert found is not None
        assert (found.least, found.median, found.most) == (2, 2, 2)

    def test_runs_that_only_one_has_done_count_for_no_ratio(self) -> None:
        found = ratios({0: 2.0, 1: 50.0}, {0: 1.0})
        assert found is not None
        assert (found.median, found.runs) == (2, 1)
        assert ratios({0: 1.0}, {1: 1.0}) is None


class TestReport:
    def test_bar_is_met_or_missed_by_the_ratio_to_redis(self) -> None:
        bar = BARS[0]
        fast = made_up(*drained("sql-postgresql", 300, 310), *drained("redis", 100, 100))
        slow = made_up(*drained("sql-postgresql", 100, 100), *drained("redis", 100, 100))
        assert bar.verdict(bar.value(fast)) == "met"
        assert bar.verdict(bar.value(slow)) == "missed"
        assert bar.verdict(bar.value(made_up())) == "not measured"

    def test_table_holds_medians_spreads_and_what_failed(self) -> None:
        failed = Measurement("drain-1", "redis", 1, error="TimeoutError: 3 of 10 done")
        results = made_up(*drained("sql-postgresql", 1_000, 2_000, 3_000), failed)
        text = report.markdown(results)
        assert "| Drain, one process | 2,000/s (1,000 to 3,000) | - failed |" in text
        assert "drain-1, redis, run 2: TimeoutError: 3 of 10 done" in text

    def test_queue_that_is_ahead_is_named(self) -> None:
        results = made_up(*drained("sql-postgresql", 100), *drained("pgqueuer", 250))
        assert "Drain, one process: pgqueuer is 2.5 times as good" in report.losses(results)
        results = made_up(*drained("sql-postgresql", 100), *drained("pgqueuer", 50))
        assert report.losses(results) == "In none of the workloads measured."

    def test_less_is_better_for_times(self) -> None:
        results = made_up(
            Measurement("start", "sql-postgresql", 0, {"p50": 1.0, "p99": 8.0}),
            Measurement("start", "redis", 0, {"p50": 2.0, "p99": 4.0}),
        )
        assert "idle worker: p50 | 2 |" in report.comparison(results)
        assert "p99: RedisBackend is 2 times as good" in report.losses(results)

    def test_results_come_back_from_their_file(self, tmp_path: Path) -> None:
        results = made_up(*drained("redis", 1, 2))
        results.write(tmp_path / "results.json")
        assert Results.read(tmp_path / "results.json") == results


class TestPage:
    def test_template_is_filled_and_what_people_wrote_stays(self, tmp_path: Path) -> None:
        target = tmp_path / "benchmarks.md"
        page.write(made_up(*drained("redis", 100)), TEMPLATE, target, [])
        assert "100/s" in target.read_text()
        target.write_text(target.read_text().replace("# Benchmarks", "# Our benchmarks"))
        page.write(made_up(*drained("redis", 200)), TEMPLATE, target, [])
        text = target.read_text()
        assert "# Our benchmarks" in text
        assert "200/s" in text
        assert "100/s" not in text

    def test_page_without_the_marks_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="differ: figures"):
            page.fill("# Nothing here", {"figures": ""})


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that answers what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(65_536):
                    connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


class TestProxy:
    def test_each_round_trip_takes_the_delay_and_no_byte_is_lost(self, echo_port: int) -> None:
        delay, times = 0.02, 5
        with Proxy("127.0.0.1", echo_port, delay) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                begun = time.monotonic()
                for number in range(times):
                    client.sendall(bytes([number]))
                    assert client.recv(1) == bytes([number])
                assert time.monotonic() - begun >= delay * times
                assert proxy.count() == times
                large = bytes(range(256)) * 20_000
                threading.Thread(target=client.sendall, args=(large,)).start()
                received = bytearray()
                while len(received) < len(large):
                    received += client.recv(65_536)
                assert received == large
