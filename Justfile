# `just check` is what CI runs, in the environment you are in; .ci/run does it in a fresh one.

# List the recipes.
default:
    @just --list

# Everything that must pass before a change goes in.
check: lint types layers test-all

# Style and format.
lint:
    ruff check
    ruff format --check

# Types, strictly.
types:
    mypy

# No import goes up a floor.
layers:
    lint-imports

# The quick tests; `just test -m ""` runs all.
test *arguments:
    pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow" {{arguments}}

# All tests, as CI runs them.
test-all *arguments:
    pytest -n auto --maxprocesses 4 --dist worksteal --durations=20 {{arguments}}

# The documentation as a site, in site/.
docs:
    mkdocs build --strict

# Fix style, format, and what README and docs take from the program.
fix:
    ruff check --fix
    ruff format
    python tests/support/generated.py
