"""Files that each runtime opens, made from a policy by `policykd.export` and SB3."""

import importlib
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from policykd.agents.archive import read_archive
from policykd.agents.student import Student, save_student
from policykd.agents.teacher import Teacher
from policykd.envs.actions import action_names
from policykd.evaluation.policies import NamedPolicy
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.runtimes import RuntimeName
from policykd.export import ExportSource, check_format, export
from policykd.export.c99 import to_c
from policykd.export.formats import compile_c
from policykd.export.numpy_file import numpy_runtime, to_npz
from policykd.export.onnx import to_onnx

NUM_INT8_STATES = 2000
"""states that int8 is calibrated on, as in `policykd export`, and other ones that it is validated on"""
C_FLAGS = ("-std=c99", "-O3", "-march=native", "-shared", "-fPIC")
_C_LIBRARY = b"""#include "policy.h"
int act(const unsigned char *obs);
int act(const unsigned char *obs) { return policykd_act((const void *)obs); }
"""
_FAILURES = (ValueError, ImportError, OSError, RuntimeError, ArithmeticError, subprocess.TimeoutExpired)


@dataclass(frozen=True)
class RuntimeFile:
    """One policy's file for one runtime, or the reason why there is none."""

    path: Path | None = None
    num_bytes: int | None = None
    """bytes that a user would ship; None where that is not a file of its own"""
    reason: str = ""
    """why there is no file"""
    int8: str = ""
    """what is int8 in the file"""


@dataclass(frozen=True)
class ArtifactBuilder:
    """Makes the files of one policy in a folder of its own."""

    named: NamedPolicy
    folder: Path
    game: str
    seed: int = 0

    def build(self, runtime: RuntimeName) -> RuntimeFile:
        """Returns the file of a runtime; a failure, such as a missing package, becomes its reason."""
        try:
            self.folder.mkdir(exist_ok=True)
            return _BUILDERS[runtime](self)
        except _FAILURES as error:
            return RuntimeFile(reason=(str(error).splitlines() or [type(error).__name__])[0][:200])

    @cached_property
    def source(self) -> ExportSource:
        """The policy as the exporters take it."""
        return ExportSource(self.named.policy, self.game, action_names(self.game))

    def _write(self, name: str, content: bytes) -> RuntimeFile:
        path = self.folder / name
        path.write_bytes(content)
        return RuntimeFile(path, len(content))

    def _sb3(self) -> RuntimeFile:
        if find_spec("stable_baselines3") is None:
            raise ValueError("stable_baselines3 is not installed; pip install 'policykd[sb3]'")
        policy = self.named.policy
        model = policy.to_sb3() if isinstance(policy, Student) else _as_sb3(policy)
        # The name tells the runtime which class opens it.
        path = self.folder / f"{type(model).__name__}.zip"
        model.save(path)
        return RuntimeFile(path, path.stat().st_size)

    def _torch(self) -> RuntimeFile:
        policy = self.named.policy
        if isinstance(policy, Student):
            folder = self.folder / "student"
            save_student(policy, folder)
            return RuntimeFile(folder, (folder / "student.safetensors").stat().st_size)
        if policy.algorithm == "ONNX":
            raise ValueError("an ONNX file needs ONNX Runtime")
        return RuntimeFile(policy.path, policy.path.stat().st_size if policy.path.is_file() else None)

    def _onnx(self) -> RuntimeFile:
        check_format(self.source, "onnx")
        policy = self.named.policy
        if isinstance(policy, Teacher) and policy.algorithm == "ONNX":
            return self._write("policy.onnx", policy.path.read_bytes())
        return self._write("policy.onnx", to_onnx(self.source.net))

    def _int8(self) -> RuntimeFile:
        """Makes the file that `policykd export` writes, which is validated on states of the policy's own games."""
        check_format(self.source, "int8")
        # Other games for the validation than for the calibration.
        calibration, states = (
            on_policy_states(self.named.policy, self.game, NUM_INT8_STATES, seed=seed)
            for seed in (2 * self.seed + 1, 2 * self.seed)
        )
        manifest = export(self.source, "int8", self.folder, states, calibration)
        return RuntimeFile(self.folder / manifest.file, manifest.num_bytes, int8=str(manifest.details.get("int8", "")))

    def _numpy(self) -> RuntimeFile:
        (self.folder / "numpy_policy.py").write_bytes(numpy_runtime())
        return self._write("policy.npz", to_npz(self.source.net))

    def _c(self) -> RuntimeFile:
        self._write("policy.h", to_c(self.source.net).encode())
        self._write("policy.c", _C_LIBRARY)
        path = self.folder / "policy.so"
        compile_c(*C_FLAGS, "policy.c", "-o", path.name, "-lm", folder=self.folder)
        return RuntimeFile(path, path.stat().st_size)


_BUILDERS: Mapping[RuntimeName, Callable[[ArtifactBuilder], RuntimeFile]] = {
    "sb3": ArtifactBuilder._sb3,
    "torch": ArtifactBuilder._torch,
    "onnx": ArtifactBuilder._onnx,
    "int8": ArtifactBuilder._int8,
    "numpy": ArtifactBuilder._numpy,
    "c": ArtifactBuilder._c,
}


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
