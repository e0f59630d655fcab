"""States and students that the exporters' tests share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from policykd.agents.student import Size, Student, make_student
from policykd.agents.teacher import load_teacher
from policykd.evaluation.real_states import on_policy_states


@pytest.fixture(scope="session")
def frames() -> Tensor:
    """128 states that the bundled PPO visits in Pong."""
    return on_policy_states(load_teacher("bundled:ppo", game="Pong"), "Pong", 128, seed=7)


@pytest.fixture(scope="session")
def random_student(frames: Tensor) -> Callable[[Size], Student]:
    """Makes students whose every weight, the input scaling included, differs from its initial value."""

    def make(size: Size) -> Student:
        student = make_student(size, 6)
        student.fit_input_normalization(frames[:, -1])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return student.eval()

    return make


@pytest.fixture(scope="session")
def decided_student(frames: Tensor) -> Callable[[Size], Student]:
    """Makes students whose best actions are not nearly tied, as those of an untrained one are."""

    def make(size: Size) -> Student:
        student = make_student(size, 6, seed=1)
        student.fit_input_normalization(frames[:, -1])
        last = [module for module in student.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            outputs_BA = student(frames)
            spread_A = outputs_BA.std(0)
            last.weight.div_(spread_A[:, None])
            last.bias.sub_(outputs_BA.mean(0)).div_(spread_A)
        return student.eval()

    return make
