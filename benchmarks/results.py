"""What a benchmark has found, as one JSON file from which tables and plots are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One system, measured once by one workload; `error` where it failed."""

    workload: str
    system: str
    run: int
    figures: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    series: list[dict[str, float]] = field(default_factory=list)
    error: str = ""


@dataclass(slots=True)
class Results:
    """A whole benchmark."""

    started: str
    sizes: dict[str, Any]
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    proxy: dict[str, float] = field(default_factory=dict)
    """Milliseconds of the least round trip, by the way it took."""
    minutes: float = 0.0
    notes: list[str] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def values(self, workload: str, system: str, figure: str) -> dict[int, float]:
        """A figure by run; empty where it was not measured or always failed."""
        return {
            each.run: each.figures[figure]
            for each in self.measurements
            if each.workload == workload and each.system == system and figure in each.figures
        }

    def failures(self) -> list[Measurement]:
        return [each for each in self.measurements if each.error]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """ValueError where the file is of another format."""
        content = json.loads(path.read_text("utf-8"))
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path.name} is not of format {FORMAT}: run the benchmark again")
        content["measurements"] = [Measurement(**each) for each in content["measurements"]]
        return cls(**content)
