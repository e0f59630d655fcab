"""A process that starts, stops and resumes runs for half an hour holds at its end what it held at its beginning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SECONDS = float(os.environ.get("POLICYKD_SOAK_SECONDS", 1800))
"""duration of the long form"""
MAX_KB_PER_CYCLE = 250.0
"""growth of memory in a linear fit to the second half; the allocator takes and returns 50 MB now and then"""


@pytest.mark.parametrize("seconds", [8.0, pytest.param(SECONDS, marks=pytest.mark.faults)])
def test_a_soak_leaks_nothing(seconds: float, tmp_path: Path) -> None:
    """X03: no memory, file, thread, process or temporary file is left behind by runs that are stopped and resumed."""
    script = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "runs", "--seconds", str(seconds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 3000,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    cycles = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cycles) >= (100 if seconds >= 600 else 2)
    for what, most in (("files", 1), ("threads", 1), ("children", 0), ("temporary", 0)):  # one may be ending just then
        counts = [cycle[what] for cycle in cycles]
        assert max(counts) - min(counts) <= most, (what, counts)
    if seconds >= 600:
        half = [cycle["rss"] for cycle in cycles[len(cycles) // 2 :]]
        slope = np.polyfit(range(len(half)), half, 1)[0]
        assert slope < MAX_KB_PER_CYCLE, (slope, half)
    else:
        growth = cycles[-1]["rss"] - cycles[0]["rss"]
        assert growth < 100_000, growth  # kB; still warming up
