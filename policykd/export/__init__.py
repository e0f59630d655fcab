"""A policy as files that run without policykd: each is made, tried on real states, and only then put under its name."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from policykd.agents.files import write_atomically
from policykd.agents.interrupts import check_interrupted
from policykd.agents.networks import MLP, FrameNet
from policykd.agents.onnx_export import to_onnx
from policykd.agents.policy import Policy
from policykd.agents.shapes import Net
from policykd.agents.student import Student
from policykd.export.c99 import stack_bytes, to_c
from policykd.export.numpy_file import runtime, to_npz

__all__ = ["FORMATS", "Export", "Format", "Subject", "export", "to_npz"]

Format = Literal["onnx", "int8", "numpy", "c", "sb3"]

TOLERANCE = 1e-4
"""the largest difference of a score that is still the same policy in float32"""
TIE = 2 * TOLERANCE
"""two best actions this close may change places by the tolerance"""
INT8_AGREEMENT = 0.99
"""share of states in which an int8 policy's best action must be the float32 one's"""
_INT8_SURELY = 0.993
"""of fewer states, so that those of the validation will not fall below the former"""
_BATCH = 256


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


@dataclass(frozen=True)
class Validation:
    """How a file was tried."""

    num_states: int
    max_difference: float
    """of a score, from torch's"""
    agreement: float
    """share of states with the same best action, ties left out"""
    num_ties: int
    """states whose two best actions are closer than twice the tolerance of float32"""


@dataclass(frozen=True)
class Export:
    """One finished format."""

    path: Path
    num_bytes: int
    validation: Validation


def export(
    subject: Subject,
    kind: Format,
    folder: Path,
    states: Tensor,
    calibration: Tensor,
    *,
    written: Mapping[str, Any],
) -> Export:
    """Writes one format of a policy into `folder`, with a manifest beside it, once it scores real states as torch does.

    The manifest, `NAME.json`, is written last: a file whose sha256 it does not have was not finished.

    Args:
        subject: what is exported.
        kind: the format.
        folder: made if it is missing.
        states: real ones to try it on, `(n, *obs_shape)`.
        calibration: others, for int8.
        written: what the manifest also says: the command and versions.

    Raises:
        FloatingPointError: it does not score as torch does; nothing is written.
        ValueError: this policy cannot be had in this format, or a package or a compiler is missing.
        OSError: no room or no permission.
        KeyboardInterrupt: a signal has come; nothing is half-written.
    """
    with tempfile.TemporaryDirectory() as name:
        made = _MAKERS[kind](subject, Path(name), calibration)
        validation = validate(subject, kind, made, states)
        contents = {file: (Path(name) / file).read_bytes() for file in (made.name, *made.beside)}
    obs_kind = "uint8" if len(subject.net.obs_shape) == 3 else "float32"
    manifest = {
        "format": kind,
        "file": made.name,
        "sha256": hashlib.sha256(contents[made.name]).hexdigest(),
        "num_bytes": len(contents[made.name]),
        "beside": {file: hashlib.sha256(contents[file]).hexdigest() for file in made.beside},
        "source": subject.about,
        "game": subject.game,
        "actions": dict(enumerate(subject.actions)),
        "input": _input(subject.net.obs_shape, obs_kind),
        "output": {"name": "scores", "shape": ["batch", subject.net.num_actions], "dtype": "float32"},
        "validation": {**asdict(validation), **_limits(kind), "states": "half no-op sampled, half sticky greedy"},
        **made.said,
        **written,
    }
    check_interrupted()
    (folder / f"{made.name}.json").unlink(missing_ok=True)
    for file in (*made.beside, made.name):
        write_atomically(folder / file, contents[file])
    write_atomically(folder / f"{made.name}.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return Export(folder / made.name, len(contents[made.name]), validation)


def validate(subject: Subject, kind: Format, made: Made, states: Tensor) -> Validation:
    """Returns how a file's scores differ from torch's.

    Raises:
        FloatingPointError: by more than the format may.
    """
    expected = np.concatenate([_scores(subject.net, part, made.is_normalised) for part in states.split(_BATCH)])
    found = np.concatenate([made.score(part) for part in states.split(_BATCH)])
    one_by_one = np.concatenate([made.score(state[None]) for state in states[:8]])
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise FloatingPointError(
            f"{kind}: scores {found.shape}, not all finite, expected {expected.shape}; not written"
        )
    best_two = np.sort(expected, axis=1)[:, -2:]
    tied = best_two[:, 1] - best_two[:, 0] <= TIE
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    difference = float(np.abs(found - expected).max())
    agreement = float(same[~tied].mean()) if not tied.all() else 1.0
    where = f"{kind}: on {len(states):,} real states"
    if kind == "int8" and agreement < INT8_AGREEMENT:
        raise FloatingPointError(
            f"{where} it takes the float32 policy's action in {agreement:.2%}, {INT8_AGREEMENT:.0%} are needed; not"
            " written, take another format"
        )
    alone = float(np.abs(one_by_one - found[:8]).max())
    if kind != "int8" and (max(difference, alone) > TOLERANCE or agreement < 1.0):
        raise FloatingPointError(
            f"{where} its scores differ by up to {max(difference, alone):.2g} from torch's ({TOLERANCE:g} is allowed),"
            f" its actions in {1.0 - agreement:.2%}; not written"
        )
    return Validation(len(states), difference, agreement, int(tied.sum()))


@torch.inference_mode()
def _scores(policy: Policy, obs: Tensor, is_normalised: bool) -> np.ndarray:
    check_interrupted()
    scores_BA = policy(obs).float()
    return (scores_BA.log_softmax(dim=-1) if is_normalised else scores_BA).numpy()


def _limits(kind: Format) -> dict[str, float]:
    return {"needed_agreement": INT8_AGREEMENT} if kind == "int8" else {"allowed_difference": TOLERANCE, "tie": TIE}


def _input(shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    said = {"name": "obs", "shape": ["batch", *shape], "dtype": kind}
    if len(shape) == 3:
        said |= {"range": [0, 255], "order": "channels first: grey frames of 84 by 84 pixels, newest last"}
    return said


def _onnx(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    return _of_onnx(folder / f"{subject.stem}.onnx", to_onnx(subject.net))


def _int8(subject: Subject, folder: Path, calibration: Tensor) -> Made:
    """Makes int8 arithmetic if that keeps the policy, else int8 weights: decided on every fourth calibration state."""
    from policykd.export.int8 import quantise, quantise_weights

    plain, held_out = to_onnx(subject.net), calibration[::4]
    fitted_to = np.delete(calibration.numpy(), slice(None, None, 4), axis=0)
    best = _scores(subject.net, held_out, False).argmax(axis=1)
    made = _of_onnx(folder / f"{subject.stem}.int8.onnx", quantise(plain, fitted_to))
    kept = float((made.score(held_out).argmax(axis=1) == best).mean())
    said = {"int8": "weights and activations", "num_calibration_states": len(fitted_to)}
    if kept < _INT8_SURELY:
        made = _of_onnx(folder / f"{subject.stem}.int8.onnx", quantise_weights(plain, fitted_to))
        said |= {"int8": "weights", "why": f"with activations too, {kept:.2%} of {len(held_out)} actions are the same"}
    return replace(made, said={**said, **made.said})


def _of_onnx(path: Path, content: bytes) -> Made:
    from policykd.agents.onnx_policy import OnnxPolicy

    path.write_bytes(content)
    policy = OnnxPolicy(path)
    return Made(path.name, lambda obs: _scores(policy, obs, False), said={"runtime": policy.backend})


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
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    text = to_c(_known(subject.net), prefix=subject.prefix, actions=subject.actions)
    if compiler is None:
        raise ValueError("c: no compiler (cc, gcc or clang) to try the header with; install one")
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
    if subject.student is None:
        raise ValueError("sb3: only a student becomes an SB3 archive; a teacher is one already")
    from stable_baselines3 import PPO

    from policykd.agents.trusted import Sb3Scores
    from policykd.sb3_archive import write_teacher

    path = folder / f"{subject.stem}.zip"
    write_teacher(subject.student.to_sb3(), path)
    policy = PPO.load(path, device="cpu").policy.eval()
    scores = Sb3Scores(policy, "PPO", subject.student.shape.obs_shape, subject.net.num_actions)
    said = {"needs": "stable_baselines3 and policykd; opens with PPO.load"}
    return Made(path.name, lambda obs: _scores(scores, obs, True), said=said, is_normalised=True)


def _known(net: Net) -> FrameNet | MLP:
    if not isinstance(net, FrameNet | MLP):
        raise ValueError(f"{type(net).__name__}: a module of your own has no layers that are known; export it as onnx")
    return net


_MAKERS: dict[Format, Callable[[Subject, Path, Tensor], Made]] = {
    "onnx": _onnx,
    "int8": _int8,
    "numpy": _numpy,
    "c": _c,
    "sb3": _sb3,
}
FORMATS = tuple(_MAKERS)
