"""A policy as the file that each runtime opens, or the reason why there is none."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from policykd.agents.archive import read_archive
from policykd.agents.student import Student, save_student
from policykd.agents.teacher import Teacher
from policykd.envs.actions import action_names
from policykd.evaluation.runtimes import RuntimeName
from policykd.io.signals import check_interrupted

if TYPE_CHECKING:
    from policykd.export import ExportSource

NOT_MADE = (ValueError, ImportError, OSError, RuntimeError, ArithmeticError, subprocess.TimeoutExpired)
COMPILED_WITH = ("-std=c99", "-O3", "-march=native")
_LIBRARY = b"""#include "policy.h"
int act(const unsigned char *obs);
int act(const unsigned char *obs) { return policykd_act((const void *)obs); }
"""


@dataclass(frozen=True)
class Deployment:
    """One policy for one runtime."""

    file: Path | None
    """None where it cannot be"""
    num_bytes: int | None = None
    """of what a user would ship; None where that is not a file of its own"""
    why_not: str = ""
    int8: str = ""
    """which part of the file is int8: weights"""


@dataclass(frozen=True)
class RealStates:
    """What int8 is fitted to and tried on, uint8 `(num_states, 4, 84, 84)`: frames that the policy visits."""

    calibration: Tensor
    tried: Tensor


@dataclass
class Workshop:
    """A folder in which a policy's files are made."""

    policy: Student | Teacher
    folder: Path
    game: str
    states: RealStates | None
    """for int8"""

    @cached_property
    def source(self) -> "ExportSource":
        """The policy as the exporters take it."""
        from policykd.export import ExportSource

        return ExportSource(self.policy, self.game, action_names(self.game))

    def write(self, name: str, content: bytes) -> Deployment:
        """Puts a file into the folder."""
        path = self.folder / name
        path.write_bytes(content)
        return Deployment(path, len(content))


def deploy(
    policy: Student | Teacher,
    folder: Path,
    runtimes: Sequence[RuntimeName],
    *,
    game: str,
    states: RealStates | None,
) -> dict[RuntimeName, Deployment]:
    """Makes a policy's files for `runtimes` in an empty folder, or says why there is none.

    Without `states` there is no int8.
    """
    workshop, made = Workshop(policy, folder, game, states), dict[RuntimeName, Deployment]()
    for runtime in runtimes:
        check_interrupted()
        try:
            made[runtime] = _MAKERS[runtime](workshop)
        except NOT_MADE as error:
            made[runtime] = Deployment(None, why_not=(str(error).splitlines() or [type(error).__name__])[0][:200])
    return made


def _torch(workshop: Workshop) -> Deployment:
    policy = workshop.policy
    if isinstance(policy, Teacher):
        if policy.algorithm == "ONNX":
            raise ValueError("an ONNX file is for ONNX Runtime")
        return Deployment(policy.path, policy.path.stat().st_size if policy.path.is_file() else None)
    save_student(policy, workshop.folder / "student")
    return Deployment(workshop.folder / "student", _size(workshop.folder / "student" / "student.safetensors"))


def _sb3(workshop: Workshop) -> Deployment:
    if find_spec("stable_baselines3") is None:
        raise ValueError("needs another package: pip install 'policykd[sb3]'")
    policy = workshop.policy
    model: Any = policy.to_sb3() if isinstance(policy, Student) else _sb3_of(policy)
    path = workshop.folder / f"{type(model).__name__}.zip"
    model.save(path)
    return Deployment(path, _size(path))


def _sb3_of(teacher: Teacher) -> Any:
    """Returns SB3's own agent of an archive with SB3's own CnnPolicy, whose pickles nobody read."""
    import importlib

    from gymnasium import spaces

    if teacher.algorithm == "ONNX":
        raise ValueError("an ONNX file is no SB3 agent")
    library = importlib.import_module("sb3_contrib" if teacher.algorithm == "QRDQN" else "stable_baselines3")
    little = {"buffer_size": 1} if "DQN" in teacher.algorithm else {}
    kind = getattr(library, teacher.algorithm)
    model = kind("CnnPolicy", None, device="cpu", seed=0, _init_setup_model=False, **little)
    model.observation_space = spaces.Box(0, 255, teacher.obs_shape, np.uint8)
    model.action_space, model.n_envs = spaces.Discrete(teacher.num_actions), 1
    model._setup_model()
    try:
        model.policy.load_state_dict(read_archive(teacher.path).tensors, strict=False)
    except RuntimeError as error:
        raise ValueError("another network than SB3's CnnPolicy builds") from error
    return model


def _onnx(workshop: Workshop) -> Deployment:
    from policykd.export import check_format
    from policykd.export.onnx import to_onnx

    check_format(workshop.source, "onnx")
    policy = workshop.policy
    if isinstance(policy, Teacher) and policy.algorithm == "ONNX":
        return workshop.write("policy.onnx", policy.path.read_bytes())
    return workshop.write("policy.onnx", to_onnx(workshop.source.net))


def _int8(workshop: Workshop) -> Deployment:
    """Makes the very file that `policykd export` writes, validated on real states."""
    from policykd.export import check_format, export

    check_format(workshop.source, "int8")
    if workshop.states is None:
        raise ValueError("no real states to calibrate int8 on")
    done = export(workshop.source, "int8", workshop.folder, workshop.states.tried, workshop.states.calibration)
    return Deployment(done.path, done.manifest.num_bytes, int8="weights")


def _numpy(workshop: Workshop) -> Deployment:
    from policykd.export.numpy_file import to_npz

    return workshop.write("policy.npz", to_npz(workshop.source.layered_net))


def _c(workshop: Workshop) -> Deployment:
    from policykd.export.c99 import to_c
    from policykd.export.formats import compile_c

    workshop.write("policy.h", to_c(workshop.source.layered_net).encode())
    workshop.write("policy.c", _LIBRARY)
    library = workshop.folder / "policy.so"
    compile_c(*COMPILED_WITH, "-shared", "-fPIC", "policy.c", "-o", library.name, "-lm", folder=workshop.folder)
    return Deployment(library, _size(library))


def _size(path: Path) -> int:
    return path.stat().st_size


_MAKERS: Mapping[RuntimeName, Callable[[Workshop], Deployment]] = {
    "sb3": _sb3,
    "torch": _torch,
    "onnx": _onnx,
    "int8": _int8,
    "numpy": _numpy,
    "c": _c,
}
