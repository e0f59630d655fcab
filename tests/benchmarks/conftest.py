"""Benchmarks are scripts, not a package: they are imported as `python benchmarks/NAME.py` imports them."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
for folder in (BENCHMARKS, BENCHMARKS / "compression", BENCHMARKS / "peers"):
    sys.path.append(str(folder))
