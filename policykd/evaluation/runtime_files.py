"""Files that each runtime opens, made from a policy by `policykd.export` and SB3."""

import importlib
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policykd.agents.archive import read_archive
from policykd.agents.student import Student, save_student
from policykd.agents.teacher import Teacher
from policykd.envs.emulators import action_names
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.runtimes import RuntimeName
from policykd.export import ExportSource, check_format, export
from policykd.export.c99 import to_c
from policykd.export.formats import compile_c, make_artifact

NUM_INT8_STATES = 2000
"""states that int8 is calibrated on, as in `policykd export`, and other ones that it is validated on"""
C_FLAGS = ("-std=c99", "-O3", "-march=native", "-shared", "-fPIC")
_C_LIBRARY = """#include "policy.h"
int act(const unsigned char *obs);
int act(const unsigned char *obs) { return policykd_act((const void *)obs); }
"""
_FAILURES = (ValueError, ImportError, OSError, RuntimeError, ArithmeticError, subprocess.TimeoutExpired)


@dataclass(frozen=True)
class RuntimeFile:
    """One policy's file for one runtime."""

    path: Path
    num_bytes: int | None
    """bytes that a user would ship; None where that is not a file of its own"""
    int8: str = ""
    """what is int8 in the file"""


@dataclass(frozen=True)
class NotMeasured:
    """The reason why a policy is not measured in a runtime."""

    reason: str


def make_file(
    policy: Student | Teacher, runtime: RuntimeName, folder: Path, game: str, seed: int = 0
) -> RuntimeFile | NotMeasured:
    """Returns a policy's file for a runtime; a failure, such as a missing package, becomes the reason for none."""
    folder.mkdir(exist_ok=True)
    source = ExportSource(policy, game, action_names(game))
    try:
        if runtime == "sb3":
            return _sb3_file(policy, folder)
        if runtime == "torch":
            return _torch_file(policy, folder)
        if runtime == "int8":
            return _int8_file(source, folder, seed)
        if runtime == "c":
            return _c_library(source, folder)
        if runtime == "onnx" and isinstance(policy, Teacher) and policy.algorithm == "ONNX":
            return _whole(policy.path)
        return _whole(make_artifact(source, runtime, folder, calibration=torch.empty(0)).path)
    except _FAILURES as error:
        return NotMeasured((str(error).splitlines() or [type(error).__name__])[0][:200])


def _whole(path: Path) -> RuntimeFile:
    return RuntimeFile(path, path.stat().st_size if path.is_file() else None)


def _sb3_file(policy: Student | Teacher, folder: Path) -> RuntimeFile:
    if find_spec("stable_baselines3") is None:
        raise ValueError("stable_baselines3 is not installed; pip install 'policykd[sb3]'")
    model = policy.to_sb3() if isinstance(policy, Student) else _as_sb3(policy)
    # The name is how the runtime knows which class opens it.
    path = folder / f"{type(model).__name__}.zip"
    model.save(path)
    return _whole(path)


def _torch_file(policy: Student | Teacher, folder: Path) -> RuntimeFile:
    if isinstance(policy, Student):
        save_student(policy, folder / "student")
        return RuntimeFile(folder / "student", (folder / "student" / "student.safetensors").stat().st_size)
    if policy.algorithm == "ONNX":
        raise ValueError("an ONNX file needs ONNX Runtime")
    return _whole(policy.path)


def _int8_file(source: ExportSource, folder: Path, seed: int) -> RuntimeFile:
    """Makes the file that `policykd export` writes, which is validated on states of the policy's own games."""
    check_format(source, "int8")
    # Other games for the validation than for the calibration.
    calibration = on_policy_states(source.policy, source.game, NUM_INT8_STATES, seed=2 * seed + 1)
    states = on_policy_states(source.policy, source.game, NUM_INT8_STATES, seed=2 * seed)
    manifest = export(source, "int8", folder, states, calibration)
    return RuntimeFile(folder / manifest.file, manifest.num_bytes, int8=str(manifest.details["int8"]))


def _c_library(source: ExportSource, folder: Path) -> RuntimeFile:
    check_format(source, "c")
    (folder / "policy.h").write_text(to_c(source.net))
    (folder / "policy.c").write_text(_C_LIBRARY)
    compile_c(*C_FLAGS, "policy.c", "-o", "policy.so", "-lm", folder=folder)
    return _whole(folder / "policy.so")


def _as_sb3(teacher: Teacher) -> Any:
    """Returns an SB3 agent with the tensors of an archive in the network of SB3's CnnPolicy: no pickle is read."""
    from gymnasium import spaces

    if teacher.algorithm == "ONNX":
        raise ValueError("an ONNX file is not an SB3 agent")
    library = importlib.import_module("sb3_contrib" if teacher.algorithm == "QRDQN" else "stable_baselines3")
    # The default replay buffer would allocate gigabytes.
    settings = {"buffer_size": 1} if "DQN" in teacher.algorithm else {}
    algorithm = getattr(library, teacher.algorithm)
    model = algorithm("CnnPolicy", None, device="cpu", seed=0, _init_setup_model=False, **settings)
    model.observation_space = spaces.Box(0, 255, teacher.obs_shape, np.uint8)
    model.action_space = spaces.Discrete(teacher.num_actions)
    model.n_envs = 1
    model._setup_model()
    # Not strict, as SB3 loads PPO and A2C itself; tensors that do not fit would show in `same_actions`.
    try:
        model.policy.load_state_dict(read_archive(teacher.path).tensors, strict=False)
    except RuntimeError as error:
        raise ValueError("not the network that SB3's CnnPolicy builds") from error
    return model
