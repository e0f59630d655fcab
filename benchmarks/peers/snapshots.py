"""Students as they were during training, with the cost of each; they are evaluated afterwards, off the clock.

Only torch is needed: the peers run in environments without policykd.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

GROWTH = 1.15
"""cost of a snapshot relative to that of the previous one"""
FIRST_SECONDS = 20.0


@dataclass(frozen=True)
class CurvePoint:
    """Cost of one snapshot: a line of `curve.jsonl`."""

    file: str
    cpu_seconds: float
    """of the process, all threads"""
    wall_seconds: float
    steps: int
    """agent steps (4 frames)"""
    updates: int


@dataclass(frozen=True)
class Snapshot:
    """Weights of one snapshot."""

    tensors: list[Tensor]
    """weights and biases in the order of the forward pass: three convolutions, a dense layer, the outputs"""
    scaling: tuple[float, float]
    """grey level that becomes 0, and number of grey levels that become 1"""


class SnapshotWriter:
    """Writes a student's tensors with the CPU seconds, wall seconds, environment steps and updates that they took.

    Both clocks start here, after the imports, and are stopped while it writes.
    """

    def __init__(self, folder: Path, *, spent_cpu: float = 0.0, spent_wall: float = 0.0) -> None:
        """Creates the folder with an empty curve.

        Args:
            folder: of the snapshots.
            spent_cpu: CPU seconds that were spent before.
            spent_wall: wall seconds that were spent before.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.next_seconds = FIRST_SECONDS
        self.num_saved = 0
        self._cpu_began = time.process_time() - spent_cpu
        self._wall_began = time.perf_counter() - spent_wall
        (folder / "curve.jsonl").write_text("")

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the training so far."""
        return time.process_time() - self._cpu_began

    def wall_seconds(self) -> float:
        """Returns the wall-clock time of the training so far."""
        return time.perf_counter() - self._wall_began

    def is_due(self) -> bool:
        """Returns whether the next snapshot should be written: each 15 % later than the previous one."""
        return self.cpu_seconds() >= self.next_seconds

    def save(
        self, tensors: Sequence[Tensor], *, steps: int, updates: int, scaling: tuple[float, float] = (0.0, 255.0)
    ) -> None:
        """Writes a snapshot; see `Snapshot` for the order of the tensors."""
        point = CurvePoint(f"{self.num_saved:03}.pt", self.cpu_seconds(), self.wall_seconds(), steps, updates)
        cpu_before = time.process_time()
        wall_before = time.perf_counter()
        weights = [tensor.detach().clone().contiguous() for tensor in tensors]
        torch.save({"tensors": weights, "scaling": scaling}, self.folder / point.file)
        with (self.folder / "curve.jsonl").open("a") as curve:
            curve.write(json.dumps(asdict(point)) + "\n")
        print(
            f"{point.cpu_seconds:7.0f} s CPU {point.wall_seconds:7.0f} s wall {steps:9,} steps {updates:8,} updates",
            flush=True,
        )
        self.num_saved += 1
        self.next_seconds = max(self.next_seconds, point.cpu_seconds) * GROWTH
        self._cpu_began += time.process_time() - cpu_before
        self._wall_began += time.perf_counter() - wall_before


def read_curve(folder: Path) -> list[CurvePoint]:
    """Returns the costs of all snapshots of a folder, the oldest first."""
    return [CurvePoint(**json.loads(line)) for line in (folder / "curve.jsonl").read_text().splitlines()]


def load_snapshot(path: Path) -> Snapshot:
    """Returns a snapshot that `SnapshotWriter` wrote."""
    return Snapshot(**torch.load(path, weights_only=True))
