"""Argument groups that several commands share: each flag is defined once, here.

A command's arguments are a frozen, keyword-only dataclass that inherits the groups it needs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from policykd.agents.ensemble import WEIGHTS_HELP
from policykd.agents.teacher import TEACHER_HELP

DeviceName = Literal["auto", "cuda", "mps", "cpu"]


@dataclass(frozen=True, kw_only=True)
class TeacherArgs:
    """The teacher to learn from."""

    teacher: Annotated[str, tyro.conf.arg(help=TEACHER_HELP)] = "auto"
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    trust_pickle: bool = False
    """let SB3 itself load the teacher, which executes code in the file: only for your own archives"""
    allow_weak_teacher: bool = False
    """accept a teacher that may play no better than a random policy"""


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """The folder of a run."""

    name: str = ""
    """name of the run's folder; by default made of the student's size, the seed and the time"""
    folder: Path = Path("runs")
    """folder that holds all runs"""
    resume: bool = False
    """resume the run of this --name from its last checkpoint, or start it if there is none"""
    debug: bool = False
    """print the traceback of an error"""


@dataclass(frozen=True, kw_only=True)
class MachineArgs:
    """The hardware to compute on."""

    device: DeviceName = "auto"
    """device to compute on; auto takes cuda if available, else mps, else cpu"""
    threads: int = 0
    """CPU threads per batch and number of emulator processes; 0 takes as many as torch finds"""


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """Evaluations during and after a run."""

    eval_every: int = 5
    """rounds between periodic evaluations (16 episodes, no-op starts, sampled actions); 0 for none"""
    eval_episodes: int = 50
    """full episodes per protocol in the final evaluation, for the student and for a teacher whose card has none"""


@dataclass(frozen=True, kw_only=True)
class SeedArgs:
    """The source of randomness."""

    seed: int = 0
    """random seed (weights, batches, environments, actions)"""
