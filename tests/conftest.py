"""One thread per test process: the suite runs in parallel, and OpenMP threads that wait for a busy core spin."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

torch.set_num_threads(1)

# Benchmarks are scripts, not a package: tests import them as `python benchmarks/NAME.py` does.
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path += [str(folder) for folder in (BENCHMARKS, BENCHMARKS / "compression", BENCHMARKS / "peers")]

if TYPE_CHECKING:
    from policykd.agents.student import Student
    from policykd.compression.fine_tuning import FineTuning


@dataclass(frozen=True)
class Small:
    """The bundled teacher of Pong with few of its states and a small budget, for the tests of compression."""

    tuning: "FineTuning"
    """one gradient step per round; the last fifth of the states is held out"""
    teacher: "Student"
    """the teacher's network as a student"""
    obs: torch.Tensor
    """64 of the states"""


@pytest.fixture(scope="session")
def small() -> Small:
    from policykd.agents.policy import sample
    from policykd.agents.teacher import load_teacher
    from policykd.compression.fine_tuning import ROUNDS, ComparisonSettings, FineTuning
    from policykd.compression.networks import teacher_as_student
    from policykd.envs.atari import make_atari
    from policykd.replay import Replay

    num_states, num_envs = 640, 8
    envs = make_atari("Pong", num_envs, 0)
    obs = envs.reset()
    generator = torch.Generator().manual_seed(0)
    teacher = load_teacher(game="Pong")
    replay = Replay(num_states, num_envs, 6, (4, 84, 84), stack=4, dtype=torch.uint8)
    starts_B = torch.ones(num_envs, dtype=torch.bool)
    for _ in range(num_states // num_envs):
        outputs_BA = teacher(obs)
        replay.add(obs, starts_B, outputs_BA)
        step = envs.step(sample(outputs_BA, generator))
        obs, starts_B = step.obs, step.starts_B
    replay.num_held_out = num_states // 5
    settings = ComparisonSettings("Pong", teacher.sha256, "states", updates=ROUNDS, batch_size=8)
    tuning = FineTuning(settings, teacher, make_atari("Pong", 1, 0), replay)
    return Small(tuning, teacher_as_student(teacher), replay.gather(torch.arange(100, 164)))


@pytest.fixture
def tuning(small: Small) -> "FineTuning":
    """The teacher, its states and a small budget."""
    return small.tuning


@pytest.fixture
def obs(small: Small) -> torch.Tensor:
    """Some states of Pong, uint8 (64, 4, 84, 84)."""
    return small.obs


@pytest.fixture
def teacher_student(small: Small) -> "Student":
    """The teacher's network as a student."""
    return small.teacher


@pytest.fixture(scope="session")
def dataset(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset of the same states, with the teacher's outputs."""
    from policykd.storage.dataset import save_dataset
    from policykd.storage.generations import Origin, TeacherRef

    teacher = small.tuning.teacher
    folder = tmp_path_factory.mktemp("states")
    origin = Origin("the teacher", game="Pong", teacher=TeacherRef(teacher.algorithm, teacher.sha256))
    save_dataset(small.tuning.replay, folder, origin)
    return folder
