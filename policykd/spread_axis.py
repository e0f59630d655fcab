"""An axis of returns that spreads the top, where good policies differ, and still holds random play."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SpreadTop:
    """Maps returns to where they stand: logarithmic in the points below the top."""

    top: float
    """a round number at or above every return"""
    unit: float
    """points below it that are still spread evenly; a power of ten"""

    @classmethod
    def over(cls, returns: Sequence[float]) -> "SpreadTop":
        """Returns the axis for returns that are all finite, the ends of their intervals among them."""
        unit = 10.0 ** math.floor(math.log10(max(max(returns) - min(returns), 1e-6) / 20.0))
        return cls(math.ceil(max(returns) / unit) * unit, unit)

    def forward(self, returns: np.ndarray) -> np.ndarray:
        """Returns places, 0 at the top and less below it."""
        return np.asarray(-np.log1p(np.maximum(self.top - returns, -0.4 * self.unit) / self.unit))

    def inverse(self, places: np.ndarray) -> np.ndarray:
        """Returns the returns at places."""
        return np.asarray(self.top - self.unit * np.expm1(-places))

    @property
    def ticks(self) -> list[float]:
        """Returns round numbers, denser at the top."""
        return [self.top - self.unit * below for below in (0, 1, 2, 5, 10, 20, 40, 100, 200)]

    def ends(self, lowest: float) -> tuple[float, float]:
        """Returns where the axis begins and ends, for a lowest return."""
        return lowest - 0.15 * (self.top - lowest), self.top + 0.25 * self.unit
