# Needs make and a Python >= 3.10, nothing else; `make` alone lists the targets.
# Works with GNU make 3.81 (macOS) and any POSIX sh. Windows: see README.md.
.SUFFIXES:
# The targets share one .venv, so `make -j` must not install into it twice at once.
.NOTPARALLEL:
.PHONY: help demo test test-system check torture fuzz matrix bench bench-peers bench-docs build clean format
.DEFAULT_GOAL := help

# These may be set on the command line, for example: make test PYTEST_ARGS="-k cron -x"
PYTHON ?=
PYTEST_ARGS ?=
MATRIX_ARGS ?=
PYTEST_WORKERS ?= 4
ARGS ?=
# Only from the command line: an unrelated URL in the environment must not choose the database.
ifneq ($(origin URL),command line)
URL =
endif
export PYTHON URL

BIN = .venv/bin
VENV = @sh tools/venv.sh

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo:  ## run the demo on SQLite, or on a server: make demo URL=postgresql+asyncpg://...
	$(VENV) runtime
	@$(BIN)/sheppy-sql demo $${URL:+--url "$$URL"}

test:  ## run the tests, against SQLite and PostgreSQL
	$(VENV) test
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "not torture and not system" $(PYTEST_ARGS)

torture:  ## run the long tests: killed and stalled processes, outages, many tasks, the wheel in a fresh environment
	$(VENV) test
	$(BIN)/python -m pytest -n 3 --dist worksteal -m torture $(PYTEST_ARGS)

# A test whose program is missing fails and says how to install it.
test-system:  ## run the tests that need PostgreSQL's own programs (pg_config in PATH) and PgBouncer
	@echo "These tests need:"
	@echo "  pg_config in PATH, which names PostgreSQL's programs, built with TLS"
	@echo "  pgbouncer in PATH or /usr/sbin; its service need not run"
	@echo "On Debian and Ubuntu: apt-get install postgresql libpq-dev pgbouncer"
	$(VENV) test
	$(BIN)/python -m pytest -m system $(PYTEST_ARGS)

fuzz:  ## search for counterexamples longer than `make test` does
	$(VENV) test
	SHEPPY_SQL_FUZZ=1 $(BIN)/python -m pytest tests/property --timeout=3600 $(PYTEST_ARGS)

matrix:  ## run the tests on every Python found, and with the lowest dependencies
	$(VENV) runtime
	$(BIN)/python tools/matrix.py $(MATRIX_ARGS) -- $(PYTEST_ARGS)

bench:  ## measure this and other backends of sheppy, in about ten minutes; ARGS=--quick, --full, ..
	$(VENV) bench
	$(BIN)/python -m benchmarks run $(ARGS)

bench-peers:  ## the same, with other queues on PostgreSQL too
	$(VENV) bench-peers
	$(BIN)/python -m benchmarks run --peers $(ARGS)

bench-docs:  ## write docs/benchmarks.md from the last run, or ARGS=path/to/results.json
	$(VENV) bench
	$(BIN)/python -m benchmarks docs $(ARGS)

check:  ## lint, formatting, types, import contracts, schemas of the YAML files
	$(VENV) dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/ci.yml

format:  ## format the code and apply the safe fixes
	$(VENV) dev
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

build:  ## build the wheel and the source distribution into dist/
	$(VENV) dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

clean:  ## remove all that these targets made, .venv too
	rm -rf .venv .venvs build dist benchmarks/results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests migrations tools benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
