"""All tests of the contract run under a role that may work with the tables, and nothing more."""

from __future__ import annotations

import pytest
from sheppy import BackendError
from sqlalchemy.engine import make_url

from sheppy_sql import SqlBackend
from sheppy_sql.schema import build_tables
from tests.support.databases import TestDatabase

TABLES = sorted(build_tables().metadata.tables)
WRITTEN = {"SELECT", "INSERT", "UPDATE", "DELETE"}


@pytest.fixture
def database(postgres_database: TestDatabase) -> TestDatabase:
    return postgres_database


async def test_backend_connects_as_a_role_with_these_rights_only(
    database: TestDatabase, backend: SqlBackend
) -> None:
    role = make_url(database.worker_url).username
    assert backend._connected.database.engine.url.username == role
    rows = await database.fetch(
        """
        SELECT relname, right_
        FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE',
                                    'REFERENCES', 'TRIGGER']) AS right_
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v')
        AND has_table_privilege(:role, oid, right_)
        """,
        role=role,
    )
    rights = {name: {right for found, right in rows if found == name} for name, _ in rows}
    read = {name: {"SELECT"} for name in ("sheppy_schema", "sheppy_alembic_version")}
    assert rights == {**dict.fromkeys(TABLES, WRITTEN), **read}
    assert await database.fetch(
        """
        SELECT has_schema_privilege(:role, 'public', 'CREATE'),
               has_database_privilege(:role, current_database(), 'CREATE'),
               has_database_privilege(:role, current_database(), 'TEMPORARY'),
               has_sequence_privilege(:role, 'sheppy_positions', 'UPDATE'),
               (SELECT rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls
                FROM pg_roles WHERE rolname = :role)
        """,
        role=role,
    ) == [(False,) * 5]


async def test_missing_right_is_named(database: TestDatabase, backend: SqlBackend) -> None:
    role = make_url(database.worker_url).username
    await database.execute(f"REVOKE INSERT ON sheppy_tasks FROM {role}")
    with pytest.raises(BackendError, match=r"sheppy-sql db grant") as caught:
        await backend.append("q", [{"id": "a"}])
    assert "permission denied for table sheppy_tasks (SQLSTATE 42501)" in str(caught.value)
