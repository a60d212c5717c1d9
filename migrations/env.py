"""Alembic's entry; what it does is in sheppy_sql.migrate, which also runs without it."""

from sheppy_sql.migrate import run_environment

run_environment()
