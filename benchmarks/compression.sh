#!/bin/sh
# The table and the picture of docs/compression.md: 39 rows from one teacher, one set of states and one budget, 100 games
# of each under two protocols; two hours or more on two cores. Stopped, it goes on where it was.
# The latencies are of one go; on a quiet machine: benchmarks/compression.sh --latency-only
set -eu
cd "$(dirname "$0")/.."
.venv/bin/python scripts/distill_atari.py --game Pong --name pong --resume
exec .venv/bin/python scripts/compare_compression.py --game Pong --states dataset:runs/Pong/pong --episodes 100 "$@"
