"""Students as they stood while they learned, with what each had cost; the judging comes afterwards, off the clock."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Scaling = tuple[float, float]
"""grey level that becomes 0, grey levels that become 1"""


class Snapshots:
    """Writes a student's tensors beside the CPU seconds, wall seconds, environment steps and updates that they took.

    CPU seconds are the process's, all threads; both clocks start here, after the imports, and stand still while it
    writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        growth: float = 1.15,
        first_seconds: float = 20.0,
        spent: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.growth, self.next_seconds = growth, first_seconds
        self.cpu_began, self.wall_began = time.process_time() - spent[0], time.perf_counter() - spent[1]
        self.num_saved = 0
        (folder / "curve.jsonl").write_text("")

    def cpu_seconds(self) -> float:
        """Returns what the learning has cost so far."""
        return time.process_time() - self.cpu_began

    def wall_seconds(self) -> float:
        """Returns how long that took, with whatever else the machine did."""
        return time.perf_counter() - self.wall_began

    def is_due(self) -> bool:
        """Returns whether the next one should be written: each 15 % later than the one before."""
        return self.cpu_seconds() >= self.next_seconds

    def save(self, tensors: Sequence[Tensor], *, steps: int, updates: int, scaling: Scaling = (0.0, 255.0)) -> None:
        """Writes weights and biases in the order of the forward pass: three convolutions, a dense layer, the scores."""
        cpu, wall = self.cpu_seconds(), self.wall_seconds()
        cpu_before, wall_before = time.process_time(), time.perf_counter()
        name = f"{self.num_saved:03}.pt"
        weights = [t.detach().clone().contiguous() for t in tensors]
        torch.save({"tensors": weights, "scaling": scaling}, self.folder / name)
        row = {"file": name, "cpu_seconds": cpu, "wall_seconds": wall, "steps": steps, "updates": updates}
        with (self.folder / "curve.jsonl").open("a") as curve:
            curve.write(json.dumps(row) + "\n")
        print(f"{cpu:7.0f} s CPU {wall:7.0f} s wall {steps:9,} steps {updates:8,} updates", flush=True)
        self.num_saved += 1
        self.next_seconds = max(self.next_seconds, cpu) * self.growth
        self.cpu_began += time.process_time() - cpu_before
        self.wall_began += time.perf_counter() - wall_before


def load_tensors_of(path: Path) -> tuple[list[Tensor], Scaling]:
    """Returns weights and biases, and the input's scaling, of a snapshot."""
    stored = torch.load(path, weights_only=True)
    return stored["tensors"], stored["scaling"]
