"""docs/benchmarks.md: what people wrote stays, what was measured is filled in."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .report import PARTS
from .results import Results

BEGIN = "<!-- measured: {} -->"
END = "<!-- end -->"
NO_PLOT = "(not measured)"


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with every part between its marks replaced.

    ValueError where the marks of a part are missing, or a mark names no part.
    """
    wanted = set(re.findall(r"<!-- measured: ([\w-]+) -->", page))
    if wanted != set(parts):
        odd = ", ".join(sorted(wanted ^ set(parts)))
        raise ValueError(f"The page's marks and what is measured differ: {odd}")
    for name, text in parts.items():
        begin = BEGIN.format(name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
        page = pattern.sub(lambda _, b=begin, t=text: f"{b}\n\n{t}\n\n{END}", page)  # type: ignore[misc]  # defaults bind
    return page


def write(results: Results, template: Path, page: Path, plots: list[Path]) -> None:
    """Fill the page, or, where it is not there yet, the template; plots go beside it."""
    pictures = page.with_suffix("")
    pictures.mkdir(exist_ok=True)
    names = {plot.stem for plot in plots}
    for plot in plots:
        shutil.copyfile(plot, pictures / plot.name)
    parts = {name: part(results) for name, part in PARTS.items()}
    for name in ("throughput", "dead-rows", "backlog", "latency"):
        link = f"![{name.replace('-', ' ')}]({pictures.name}/{name}.svg)"
        parts[f"plot-{name}"] = link if name in names else NO_PLOT
    text = (page if page.exists() else template).read_text("utf-8")
    page.write_text(fill(text, parts), "utf-8")
