# `just check` is what CI runs, in the environment you are in; .ci/run does it in a fresh one.

# List the recipes.
default:
    @just --list

# Everything that must pass before a change goes in.
check: lint types layers test

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

# The tests.
test *arguments:
    pytest {{arguments}}

# Mend what can be mended by itself: style, format, and what the README takes from the program.
fix:
    ruff check --fix
    ruff format
    python tests/support/readme.py
