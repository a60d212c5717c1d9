"""When statements are prepared, where a real pooler need not be asked."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from sheppy_sql._dialects import poolers
from sheppy_sql._urls import parse
from tests.support import pgbouncer
from tests.support.databases import NoServerError
from tests.support.urls import no_defaults as no_defaults

pytestmark = pytest.mark.usefixtures("no_defaults")


def chosen(query: str, option: bool | None) -> dict[str, Any]:
    target = parse(f"postgresql://h/db?connect_timeout=10{query}")
    return poolers.Statements(option, dict(target.connect_args), ours_alone=True).connect_args


def test_by_the_option_statements_are_prepared_as_the_driver_does() -> None:
    assert chosen("", True) == {"timeout": 10.0}


def test_by_the_option_statements_have_no_name_and_are_not_kept() -> None:
    arguments = chosen("", False)
    assert arguments.keys() == {
        "timeout",
        *["statement_cache_size", "prepared_statement_name_func"],
    }
    assert arguments["statement_cache_size"] == 0
    assert arguments["prepared_statement_name_func"]() == ""


def test_without_the_option_it_is_found_out_at_the_first_connection() -> None:
    arguments = chosen("&prepared_statement_cache_size=7", None)
    assert arguments["async_creator_fn"]
    assert arguments["prepared_statement_cache_size"] == 7
    assert arguments["statement_cache_size"] == 0


@pytest.mark.parametrize("option", [True, False, None])
def test_the_url_decides_over_the_option(option: bool | None) -> None:
    for query in ("&statement_cache_size=0", "&pgbouncer=true"):
        assert chosen(query, option).keys() == chosen("", False).keys()
    prepared = chosen("&statement_cache_size=50", option)
    assert prepared == {"timeout": 10.0, "statement_cache_size": 50}


@pytest.mark.parametrize(
    ("once", "again", "fit"),
    [
        ([], [], True),
        (["__asyncpg_2f1c__"], ["__asyncpg_77aa__"], True),
        (["__asyncpg_2f1c__"], ["__asyncpg_2f1c__", "__asyncpg_77aa__"], True),
        (["__asyncpg_2f1c__"], ["__asyncpg_2f1c__"], False),
        (["__asyncpg_stmt_3__"], ["__asyncpg_stmt_4__"], False),
        (["__asyncpg_stmt_3__"], ["__asyncpg_stmt_3__"], False),
        # Since 1.21, with max_prepared_statements, the pooler has names of its own.
        (["PGBOUNCER_12"], ["PGBOUNCER_12"], True),
    ],
)
def test_names_tell_whether_statements_work_behind_a_pooler(
    once: list[str], again: list[str], fit: bool
) -> None:
    assert poolers.are_fit(once, again) is fit


def test_missing_pgbouncer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(NoServerError, match="apt-get install pgbouncer"):
        pgbouncer.program()
