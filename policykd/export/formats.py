"""The formats: how each makes a policy's file, and how that file is run as a user would run it."""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from policykd.agents.networks import MLP, FrameNet, Net
from policykd.agents.policy import Policy
from policykd.agents.student import Student
from policykd.export.c99 import check_prefix, stack_bytes, to_c
from policykd.export.numpy_file import runtime, to_npz
from policykd.export.onnx import to_onnx
from policykd.io.signals import check_interrupted

Format = Literal["onnx", "int8", "numpy", "c", "sb3"]

_INT8_SURELY = 0.993
"""of every fourth calibration state, so that those of the validation will seldom fall below what is needed"""


@dataclass(frozen=True)
class Subject:
    """What is exported."""

    net: Net
    """gives logits (or Q-values)"""
    game: str
    about: Mapping[str, Any]
    """where it comes from, for the manifest"""
    actions: Sequence[str] = ()
    """what they are called"""
    student: Student | None = None
    """where it is one: for an SB3 archive"""
    stem: str = "student"
    """of the files' names"""
    prefix: str = "policykd"
    """of the names in the C header"""


@dataclass(frozen=True)
class Made:
    """One format's files in a folder, not yet tried."""

    name: str
    """of the file that is the policy"""
    score: Callable[[Tensor], np.ndarray]
    """runs that file as a user would: scores of `(batch, *obs_shape)`"""
    beside: Sequence[str] = ()
    """other files that belong to it"""
    said: Mapping[str, Any] = field(default_factory=dict)
    """for the manifest"""
    is_normalised: bool = False
    """whether its scores are log-probabilities"""
    otherwise: Callable[[str], "Made"] | None = None
    """makes the file in a safer way if this one fails its trial, told why; it replaces this one"""


@torch.inference_mode()
def scores_of(policy: Policy, obs: Tensor, is_normalised: bool) -> np.ndarray:
    """Returns a policy's scores as numbers, or its log-probabilities."""
    check_interrupted()
    scores_BA = policy(obs).float()
    return (scores_BA.log_softmax(dim=-1) if is_normalised else scores_BA).numpy()


def _onnx(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    return _of_onnx(folder / f"{subject.stem}.onnx", to_onnx(subject.net))


def _int8(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    """Makes int8 arithmetic if that keeps the policy on every fourth calibration state, else int8 weights alone."""
    from policykd.export.int8 import quantise, quantise_weights

    plain, held_out = to_onnx(subject.net), calibration[::4]
    fitted_to = np.delete(calibration.numpy(), slice(None, None, 4), axis=0)
    best = scores_of(subject.net, held_out, False).argmax(axis=1)
    path, num = folder / f"{subject.stem}.int8.onnx", {"num_calibration_states": len(fitted_to)}

    def weights_alone(why: str) -> Made:
        made = _of_onnx(path, quantise_weights(plain, fitted_to))
        return replace(made, said={"int8": "weights", **num, "why": why, **made.said})

    made = _of_onnx(path, quantise(plain, fitted_to))
    kept = float((made.score(held_out).argmax(axis=1) == best).mean())
    if kept < _INT8_SURELY:
        return weights_alone(f"with activations too, {kept:.2%} of {len(held_out)} actions are the same")
    said = {"int8": "weights and activations", **num, **made.said}
    return replace(made, said=said, otherwise=lambda why: weights_alone(f"with activations too: {why}"))


def _of_onnx(path: Path, content: bytes) -> Made:
    from policykd.agents.onnx_policy import OnnxPolicy

    path.write_bytes(content)
    policy = OnnxPolicy(path)
    return Made(path.name, lambda obs: scores_of(policy, obs, False), said={"runtime": policy.backend})


def _numpy(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    path, module = folder / f"{subject.stem}.npz", folder / "numpy_policy.py"
    path.write_bytes(to_npz(_known(subject.net), actions=subject.actions))
    module.write_bytes(runtime())
    spec = importlib.util.spec_from_file_location("numpy_policy", module)
    assert spec
    assert spec.loader
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    policy = copied.load(path)
    return Made(path.name, lambda obs: policy(obs.numpy()), beside=(module.name,))


def _c(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    compiler = _compiler()
    text = to_c(_known(subject.net), prefix=subject.prefix, actions=subject.actions)
    path, program = folder / f"{subject.stem}.h", folder / "program"
    path.write_text(text)
    command = [compiler, "-std=c99", "-O2", f"-D{subject.prefix.upper()}_MAIN", "-x", "c", str(path)]
    done = subprocess.run([*command, "-o", str(program), "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split())[:200]
        raise ValueError(f"c: {compiler} does not compile the header ({reason}); take another compiler")

    def score(obs: Tensor) -> np.ndarray:
        check_interrupted()
        ran = subprocess.run([str(program)], input=obs.numpy().tobytes(), capture_output=True, check=True)
        return np.frombuffer(ran.stdout, np.float32).reshape(-1, subject.net.num_actions)

    said = {"stack_bytes": stack_bytes(text), "prefix": subject.prefix, "compiler": Path(compiler).name}
    return Made(path.name, score, said=said)


def _sb3(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    student = _student(subject)
    from stable_baselines3 import PPO

    from policykd.agents.trusted import Sb3Scores
    from policykd.rl.sb3_archive import write_teacher

    path = folder / f"{subject.stem}.zip"
    write_teacher(student.to_sb3(), path)
    policy = PPO.load(path, device="cpu").policy.eval()
    scores = Sb3Scores(policy, "PPO", student.shape.obs_shape, subject.net.num_actions)
    said = {"needs": "stable_baselines3 and policykd; opens with PPO.load"}
    return Made(path.name, lambda obs: scores_of(scores, obs, True), said=said, is_normalised=True)


def check_format(subject: Subject, kind: Format) -> None:
    """Finds out before any work whether a policy can be had in a format here.

    Raises:
        ValueError: it cannot, or a package or a compiler is missing.
    """
    for package in _NEEDS.get(kind, ()):
        if not importlib.util.find_spec(package):
            extra = "sb3" if kind == "sb3" else "onnx"
            raise ValueError(f"{kind}: {package} is not installed; pip install 'policykd[{extra}]'")
    if kind == "sb3":
        _student(subject)
    if kind in ("numpy", "c"):
        _known(subject.net)
    if kind == "c":
        check_prefix(subject.prefix)
        _compiler()


def _compiler() -> str:
    if compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return compiler
    raise ValueError("c: no compiler (cc, gcc or clang) to try the header with; install one, or leave c out")


def _student(subject: Subject) -> Student:
    if subject.student is None:
        raise ValueError("sb3: only a student becomes an SB3 archive; a teacher is one already")
    return subject.student


def _known(net: Net) -> FrameNet | MLP:
    if not isinstance(net, FrameNet | MLP):
        raise ValueError(f"{type(net).__name__}: a module of your own has no layers that are known; export it as onnx")
    return net


_NEEDS: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "int8": ("onnx", "onnxruntime"),
    "sb3": ("stable_baselines3",),
}
MAKERS: dict[Format, Callable[[Subject, Path, Tensor], Made]] = {
    "onnx": _onnx,
    "int8": _int8,
    "numpy": _numpy,
    "c": _c,
    "sb3": _sb3,
}
FORMATS = tuple(MAKERS)
