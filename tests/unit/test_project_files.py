from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tools import matrix

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "sheppy_sql"
HOST = SOURCE / "_host.py"  # the one file that may use what sheppy keeps private

# Directories of somebody's machine, and where packages come from there.
FOREIGN = re.compile(
    r"(?<![\w.$~>])/(?:home/(?!(?:ann|me)\b)|Users/|root/|work/|mnt/)"  # examples have ann and me
    r"|[A-Z]:\\Users"
    r"|pypi\.org|python[h]osted"
    r"|--(?:extra-)?index-url|--find[-]links"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(name: str) -> Any:
    return YAML(typ="safe").load(read(name))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.MULTILINE))


def project_files() -> Iterator[Path]:
    """What is or would be committed; in an unpacked archive, which has no .git, all there is."""
    git = shutil.which("git") if (ROOT / ".git").exists() else None
    if git is None:
        made = [line.rstrip("/") for line in read(".gitignore").split()]
        for path in filter(Path.is_file, ROOT.rglob("*")):
            parts = path.relative_to(ROOT).parts
            if not any(fnmatch(part, each) for part in parts for each in made):
                yield path
        return
    command = [git, "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    listing = subprocess.run(
        [*command, "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listing.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            yield ROOT / name


def private_imports(path: Path) -> Iterator[str]:
    """The imports of anything in sheppy that it does not offer at its top."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *below = name.split(".")
            if package == "sheppy" and (len(below) > 1 or any(n.startswith("_") for n in below)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {name}"


def test_make_targets_are_those_in_the_contributing_guide() -> None:
    documented = set(re.findall(r"^\| `make ([a-z-]+)`", read("CONTRIBUTING.md"), re.MULTILINE))

    assert documented == make_targets()
    assert set(re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[0].split()) == (
        make_targets()
    )


def test_changelog_begins_with_the_version_of_the_package() -> None:
    versions = re.findall(r"^## \[(\d[^]]*)\]", read("CHANGELOG.md"), re.MULTILINE)

    assert versions[0] == importlib.metadata.version("sheppy-sql")


def test_files_name_no_machine_and_no_package_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in project_files()
        for line in path.read_text(encoding="utf-8").splitlines()
        if FOREIGN.search(line)
    ]

    assert found == []


def test_only_the_host_module_imports_what_sheppy_keeps_private() -> None:
    found = [
        name for path in SOURCE.rglob("*.py") if path != HOST for name in private_imports(path)
    ]

    assert found == []


def test_workflow_runs_every_python_of_the_classifiers() -> None:
    workflow = load(".github/workflows/ci.yml")
    classifiers = importlib.metadata.metadata("sheppy-sql").get_all("Classifier") or []
    prefix = "Programming Language :: Python :: 3."
    versions = [line.rpartition(" ")[2] for line in classifiers if line.startswith(prefix)]

    assert workflow["jobs"]["postgresql"]["strategy"]["matrix"]["python"] == versions


def test_workflow_calls_targets_that_exist() -> None:
    called = set(re.findall(r"\bmake ([a-z-]+)", read(".github/workflows/ci.yml")))

    assert {"check", "test", "torture", "build", "matrix"} <= called & make_targets()


def test_workflow_reads_only_and_every_job_has_an_end() -> None:
    workflow = load(".github/workflows/ci.yml")

    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_compose_worker_waits_for_the_tables_and_for_its_tasks() -> None:
    services = load("docker-compose.yml")["services"]
    worker = services["worker"]

    assert worker["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert "healthcheck" in services["postgres"]
    grace = float(worker["stop_grace_period"].removesuffix("s"))
    assert grace > float(worker["environment"]["SHEPPY_SHUTDOWN_TIMEOUT"])


def test_image_gets_every_file_that_it_is_built_from() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", read("Dockerfile"), re.MULTILINE)
    sent = {line[1:] for line in read(".dockerignore").split() if line.startswith("!")}

    assert {name for line in copied for name in line.split()} == sent
    assert all((ROOT / name).exists() for name in sent)


def test_lowest_constraints_are_the_lower_bounds_of_direct_dependencies() -> None:
    requirements = [
        "sheppy<0.1,>=0.0.7",
        "sqlalchemy[asyncio]>=2.0.30",
        "tomli>=2.0; python_version < '3.11'",
        "testcontainers[postgres]>=4.8; extra == 'test'",
        "ruff>=0.9; extra == 'dev'",
        "sheppy-sql[test]; extra == 'dev'",
    ]

    assert matrix.lowest_constraints(requirements) == [
        "sheppy==0.0.7",
        "sqlalchemy==2.0.30",
        "tomli==2.0",
        "testcontainers==4.8",
    ]


def test_every_direct_dependency_has_a_lower_bound() -> None:
    constraints = matrix.lowest_constraints(importlib.metadata.requires("sheppy-sql") or [])

    assert "sqlalchemy==2.0.30" in constraints


def test_dependency_without_lower_bound_is_named() -> None:
    with pytest.raises(ValueError, match="Give rich a lower bound"):
        matrix.lowest_constraints(["rich<15"])


def test_newest_python_of_each_minor_version_is_chosen() -> None:
    old = matrix.Interpreter((3, 10, 2), "a")
    new = matrix.Interpreter((3, 10, 13), "b")
    other = matrix.Interpreter((3, 12, 1), "c")

    assert matrix.newest_of_each_minor([other, new, None, old]) == [new, other]


def test_windows_launcher_names_its_pythons() -> None:
    listing = (
        " -V:3.13 *        C:\\Program Files\\Python313\\python.exe\n"
        " -V:3.10          C:\\Python310\\python.exe\n"
        "No other installed Pythons\n"
    )

    assert matrix.launcher_paths(listing) == [
        "C:\\Program Files\\Python313\\python.exe",
        "C:\\Python310\\python.exe",
    ]


def test_matrix_gives_pytest_what_follows_the_dashes() -> None:
    options, pytest_args = matrix.parse_arguments(["--only", "3.10", "--", "-k", "cron"])

    assert (options.only, pytest_args) == ("3.10", ["-k", "cron"])
    assert matrix.parse_arguments([])[1] == []


@pytest.mark.posix
@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 1", "does not run as Python 3.10 or newer"),
        (
            'case "$2" in *ensurepip*) exit 1;; *print*) echo 3.12;; esac',
            "sudo apt-get install python3.12-venv",
        ),
    ],
)
def test_missing_python_is_explained(tmp_path: Path, python: str, message: str) -> None:
    checkout = tmp_path / "with a space"
    shutil.copytree(ROOT / "tools", checkout / "tools")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    program = checkout / "my python"
    program.write_text(f"#!/bin/sh\n{python}\n")
    program.chmod(0o755)

    result = subprocess.run(
        ["sh", "tools/venv.sh"],
        cwd=checkout,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(program)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
