"""The files the demo works on, and what is in them by a count of its own."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Other people's packages, wherever a distribution puts them inside the library.
SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """A file as the demo, not a worker, has read it."""

    name: str
    sha256: str
    lines: int


@dataclass(frozen=True)
class Source:
    """A directory of Python files."""

    root: Path
    title: str
    files: list[SourceFile]


def read(directory: Path | None = None) -> Source:
    """The .py files below a directory, by default Python's standard library, in order.

    Raises ValueError where there are none.
    """
    if directory is None:
        root = Path(sysconfig.get_path("stdlib"))
        version = ".".join(platform.python_version_tuple()[:2])
        title = f"Python {version}'s standard library"
    else:
        root, title = directory.resolve(), str(directory)
    # Links inside the library may lead nowhere, and not every file is everybody's to read.
    names = sorted(
        relative.as_posix()
        for path in root.rglob("*.py")
        if not SKIPPED.intersection((relative := path.relative_to(root)).parts)
        and path.is_file()
        and os.access(path, os.R_OK)
    )
    if not names:
        raise ValueError(
            f"{root} holds no .py files: this Python keeps its library in an archive, or without "
            "its source; run the demo with another Python"
            if directory is None
            else f"{root} holds no .py files: name a directory that does"
        )
    return Source(root, title, [_read(root, name) for name in names])


def _read(root: Path, name: str) -> SourceFile:
    content = (root / name).read_bytes()
    return SourceFile(name, hashlib.sha256(content).hexdigest(), len(content.splitlines()))
