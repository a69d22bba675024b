# Needs only Python >= 3.11, make and a package index. Everything is installed into .venv.
.DEFAULT_GOAL := help
TESTS := .venv/bin/pytest -n logical --maxprocesses=4 --dist loadfile
.PHONY: help setup hooks demo test check unit elsewhere coverage soak bench gate format clean

help:           ## Show what can be made
	@grep -hE '^[a-z]+: .*##|^[a-z]+:  +##' $(MAKEFILE_LIST) | sed -E 's/: *.*##/\t/' | expand -t 12

demo:           ## Set everything up and run the main job on real records
	@tools/setup
	@.venv/bin/kdb-fast demo

test:           ## Set everything up and run all checks and tests
	@tools/setup dev
	@tools/check
	@$(TESTS) --durations=25 --durations-min=1
	@.venv/bin/python tools/elsewhere.py

setup:          ## Only set up .venv for development
	@tools/setup dev

hooks:          ## Run tools/check before each commit
	@git config core.hooksPath tools/hooks

check:          ## Lint, format and types
	@tools/setup dev
	@tools/check

unit:           ## Only the tests without processes and servers
	@tools/setup dev
	@.venv/bin/pytest tests/unit

elsewhere:      ## Only the tests on another PostgreSQL, as another user, of the wheel on other Pythons, with other packages
	@tools/setup dev
	@.venv/bin/python tools/elsewhere.py

coverage:       ## The same tests, and how much of each module they run: takes up to twice as long
	@tools/setup dev
	@$(TESTS) --cov --cov-report=term

soak:           ## Ten minutes of reindexing an index, a column and a table while processes and the database are killed
	@tools/setup dev
	@.venv/bin/python tests/faults/soak.py --seconds 600

bench:          ## Measure and write bench/results
	@tools/setup dev
	@.venv/bin/python -m bench

gate:           ## The performance gate: ratios measured now, against bench/thresholds.json
	@tools/setup dev
	@.venv/bin/python -m bench.gate

format:         ## Format the code
	@tools/setup dev
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

clean:          ## Remove what was set up here
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
