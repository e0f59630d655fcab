#!/usr/bin/env bash
# The README's table: Pong from the bundled teacher to the 7 % and the 1 % student, three seeds each, 100 games a protocol.
# About 7 minutes a run on two cores; a run that was cut goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
for student in 7% 1%; do
  for seed in 0 1 2; do
    $python scripts/distill_atari.py --game Pong --student "$student" --seed "$seed" --name "pong-${student%\%}pct-seed$seed" --eval-episodes 100 --resume "$@"
  done
done
$python benchmarks/summary.py runs/Pong/pong-*pct-seed* --svg docs/pong.svg
