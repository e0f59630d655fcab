"""Fixtures of the loop's tests."""

import pytest
import torch
from torch import Tensor

from tests.core.problems import Problem


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.fixture
def eye() -> Tensor:
    """Every observation of the problem."""
    return torch.eye(4)
