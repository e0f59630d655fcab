"""Batch-1 latency of all rows of a comparison in one go, so that a ratio of two is of the same minutes."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from policykd.agents.onnx_policy import backend, open_session
from policykd.evaluation.costs import TimingOptions, measure_latencies
from policykd.io.files import BadFile, read_verified, write_atomically

LATENCIES = "latencies.json"


def measured_latencies(run: Path, rows: Mapping[str, Mapping[str, Any]], *, rounds: int = 9) -> dict[str, Any]:
    """Measures one observation in ONNX Runtime with one thread, of every row in turns, and writes `latencies.json`.

    Args:
        run: the comparison's folder.
        rows: by name, each with its `file` and that file's `sha256`.
        rounds: turns of each row.

    Raises:
        BadFile: a row's file is not the one that was measured and played.
    """
    generator = np.random.default_rng(0)
    obs = generator.integers(0, 256, (64, 1, 4, 84, 84), np.uint8)
    calls = {}
    for k, (name, row) in enumerate(rows.items()):
        content = read_verified(run / name / row["file"], row["sha256"], "; remove the row's folder, it is made anew")
        session = open_session(content, 1)
        calls[name] = lambda session=session, k=k: session.run(None, {"obs": obs[k % len(obs)]})
    measured = measure_latencies(calls, TimingOptions(rounds=rounds))
    kept: dict[str, Any] = {
        "runtime": backend(),
        "threads": 1,
        "processor": platform.processor() or platform.machine(),
        "rounds": rounds,
        "rows": {
            name: {
                "latency_microseconds": found.median_us,
                "latency_p99_microseconds": found.p99_us,
                "latency_least_microseconds": found.min_us,
                "sha256": rows[name]["sha256"],
            }
            for name, found in measured.items()
        },
    }
    write_atomically(run / LATENCIES, (json.dumps(kept, indent=1) + "\n").encode())
    return kept


def latencies_known(run: Path, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns whether the latencies of exactly these rows' files were measured in one go.

    Raises:
        BadFile: what was written is damaged.
    """
    try:
        kept = json.loads((run / LATENCIES).read_text())["rows"]
        return {name: row["sha256"] for name, row in kept.items()} == {n: row["sha256"] for n, row in rows.items()}
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFile(f"{run / LATENCIES}: damaged ({error!r}); remove it, they are measured anew") from error
