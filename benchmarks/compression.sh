#!/usr/bin/env bash
# The table, the picture and the findings of docs/compression.md: 39 networks from one teacher, one set of states and one budget, 100 games
# per network and protocol; half a day on two cores. An interrupted run continues where it was. Latencies are measured again by every
# run, all in one go: when everything is finished, run it once more on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
$python -m policykd distill --game Pong --name pong --resume \
  --rounds 10 --states-per-round 8000 --updates-per-round 700 --batch-size 256 --optimizer adam --learning-rate warmup-cosine:2e-3
grep -v '^#' benchmarks/compression/rows.txt | xargs $python -m policykd compress runs/Pong/pong --episodes 100 "$@" --compare
$python benchmarks/compression/findings.py runs/Pong/compression
cp runs/Pong/compression/pareto.svg docs/compression.svg
