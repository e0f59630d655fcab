#!/usr/bin/env bash
# The tables of docs/methods.md: every method of benchmarks/methods.py on Pong, three seeds each at one budget, ten games per seed and protocol.
# Finished cells are skipped and interrupted ones resumed: run it again. `benchmarks/methods.sh --jobs 2 --only forward-kl --seeds 1`
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
$python benchmarks/methods.py held-out "$@"
$python benchmarks/methods.py run "$@"
$python benchmarks/methods.py table "$@"
