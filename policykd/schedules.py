"""Quantities that change over a run, as functions of its progress from 0 to 1."""

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A number for every moment of a run."""

    def __call__(self, progress: float, /) -> float:
        """Returns the value at `progress`, from 0 (start) to 1 (end)."""
        ...


@dataclass(frozen=True)
class WarmupCosine:
    """Rises linearly to `peak`, then falls to zero along half a cosine (Loshchilov & Hutter, 2017)."""

    peak: float
    """the highest value"""
    warmup: float = 0.02
    """share of the run that it rises for"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must lie in [0, 1), not {self.warmup}")

    def __call__(self, progress: float, /) -> float:
        """Returns the value at `progress`."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup)))
