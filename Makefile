# `make pong` distils, `make test` proves it; each makes .venv first if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: pong test slow faults check install clean benchmark

pong: .venv/installed
	$(BIN)/python scripts/distill_atari.py --game Pong --name pong --resume

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

slow: .venv/installed
	$(BIN)/pytest -n 2 -m slow

faults: .venv/installed
	$(BIN)/pytest -m faults

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmark: .venv/installed
	$(BIN)/python benchmarks/stages.py

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
