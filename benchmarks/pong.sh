#!/usr/bin/env bash
# The README's table: Pong from the bundled teachers to the 7 % and the 1 % student, 100 games per protocol: three seeds from PPO (temperature 1),
# one from DQN (temperature 0.01), with the settings that were the default before budgets and Muon. About 7 minutes per run on two idle cores; an interrupted run is resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
for run in "ppo 7% 0" "dqn 7% 0" "ppo 7% 1" "ppo 7% 2" "ppo 1% 0" "ppo 1% 1" "ppo 1% 2"; do
  read -r teacher student seed <<<"$run"
  $python -m policykd distill --game Pong --teacher "bundled:$teacher" --student "$student" --seed "$seed" \
    --rounds 10 --states-per-round 8000 --updates-per-round 700 --batch-size 256 --optimizer adam --learning-rate warmup-cosine:2e-3 \
    --name "pong-$teacher-${student%\%}pct-seed$seed" --eval-episodes 100 --loss forward-kl --resume "$@"
done
$python benchmarks/summary.py runs/Pong/pong-*pct-seed* --svg docs/pong.svg
