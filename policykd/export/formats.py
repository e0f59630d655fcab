"""The five formats: how each makes its file, and how that file is run in its own runtime."""

import importlib.util
import io
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from policykd.agents.card import TeacherRecord
from policykd.agents.networks import Net, UserNet
from policykd.agents.policy import Policy
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.export import numpy_policy
from policykd.export.c99 import check_prefix, stack_bytes, to_c
from policykd.export.layers import Layer, layers_of
from policykd.export.onnx import to_onnx

FormatName = Literal["onnx", "int8", "numpy", "c", "sb3"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)

_PACKAGES: Mapping[FormatName, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "int8": ("onnx", "onnxruntime"),
    "sb3": ("stable_baselines3",),
}


@dataclass(frozen=True)
class ExportSource:
    """A policy to export, with what its manifests record about it."""

    policy: Student | Teacher
    game: str
    action_names: tuple[str, ...] = ()
    """meaning of each action, such as `policykd.envs.emulators.action_names(game)`"""
    teacher: TeacherRecord | None = None
    """teacher of a student"""
    c_prefix: str = "policykd"
    """prefix of the names in the C header"""

    @cached_property
    def net(self) -> Net:
        """Network whose outputs are the policy's logits or Q-values.

        Raises:
            ValueError: a teacher that was not rebuilt from an SB3 archive.
        """
        if isinstance(self.policy, Student):
            return self.policy.folded_net()
        if not isinstance(self.policy.net, Net):
            raise ValueError(f"{self.policy.path}: only teachers read from an SB3 archive are exported; give one")
        return self.policy.net

    @property
    def file_stem(self) -> str:
        """Name of the files without their suffixes."""
        return "student" if isinstance(self.policy, Student) else "teacher"


@dataclass(frozen=True)
class Artifact:
    """One format's files, not validated yet."""

    path: Path
    """the file that holds the policy"""
    run: Callable[[Tensor], np.ndarray]
    """runs that file in its own runtime: outputs `(batch, num_actions)` of observations `(batch, *obs_shape)`"""
    extra_files: tuple[Path, ...] = ()
    """files that are needed in addition"""
    manifest: Mapping[str, str | int] = field(default_factory=dict)
    """details of this format for the manifest"""
    gives_log_probabilities: bool = False
    """outputs are normalised log-probabilities instead of the network's own outputs"""


def check_format(source: ExportSource, format_name: FormatName) -> None:
    """Raises ValueError if a policy cannot be exported in a format on this machine, before any work is done."""
    # Packages first: without them the other checks fail for the wrong reason.
    for package in _PACKAGES.get(format_name, ()):
        if not importlib.util.find_spec(package):
            extra = "sb3" if format_name == "sb3" else "onnx"
            raise ValueError(f"{format_name}: {package} is not installed; pip install 'policykd[{extra}]'")
    if format_name == "sb3" and not isinstance(source.policy, Student):
        raise ValueError("sb3: a teacher is an SB3 archive already; export students")
    if format_name in ("numpy", "c", "sb3") and isinstance(source.net, UserNet):
        raise ValueError("a module of your own has no known layers; export it as onnx")
    if format_name == "c":
        check_prefix(source.c_prefix)
        _ = find_c_compiler()


def make_artifact(source: ExportSource, format_name: FormatName, folder: Path, calibration: Tensor) -> Artifact:
    """Writes one format's files into an existing folder, without validation; `export` validates them.

    Only int8 uses the calibration states, `(n, *obs_shape)`.

    Raises:
        ValueError: the policy cannot be exported in this format, or a package or compiler is missing.
    """
    check_format(source, format_name)
    # The packages behind a format are imported inside its function: none is needed for the others.
    stem = folder / source.file_stem
    if format_name == "onnx":
        return _onnx_artifact(stem.with_suffix(".onnx"), to_onnx(source.net))
    if format_name == "int8":
        return _int8_artifact(source, stem.with_suffix(".int8.onnx"), calibration)
    if format_name == "numpy":
        return _numpy_artifact(source, stem.with_suffix(".npz"))
    if format_name == "c":
        return _c_artifact(source, stem.with_suffix(".h"))
    return _sb3_artifact(source, stem.with_suffix(".zip"))


@torch.inference_mode()
def outputs_of(policy: Policy, obs: Tensor) -> np.ndarray:
    """Returns a policy's outputs, float32 `(batch, num_actions)`."""
    outputs: np.ndarray = policy(obs).float().numpy()
    return outputs


def _onnx_artifact(path: Path, content: bytes) -> Artifact:
    from policykd.agents.onnx_policy import OnnxPolicy

    # Read back from the file, through the checks that every foreign ONNX file has to pass.
    path.write_bytes(content)
    policy = OnnxPolicy(path)
    return Artifact(path, lambda obs: outputs_of(policy, obs), manifest={"runtime": policy.backend})


def _int8_artifact(source: ExportSource, path: Path, calibration: Tensor) -> Artifact:
    from policykd.export.int8 import quantize_weights

    artifact = _onnx_artifact(path, quantize_weights(to_onnx(source.net), calibration.numpy()))
    details = {**artifact.manifest, "int8": "weights", "num_calibration_states": len(calibration)}
    return replace(artifact, manifest=details)


def _numpy_artifact(source: ExportSource, path: Path) -> Artifact:
    path.write_bytes(to_npz(source.net, actions=source.action_names))
    module_path = path.with_name("numpy_policy.py")
    shutil.copyfile(numpy_policy.__file__, module_path)
    # Run the copy that is shipped, not the module that is installed here.
    spec = importlib.util.spec_from_file_location("numpy_policy", module_path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    policy = module.load(path)
    return Artifact(path, lambda obs: policy(obs.numpy()), extra_files=(module_path,))


def to_npz(net: Net, *, actions: Sequence[str] = ()) -> bytes:
    """Returns the content of an `.npz` for `numpy_policy.load`; the same bytes for the same weights.

    Args:
        net: the network, such as a student's `folded_net()`.
        actions: meaning of each action, for the reader.

    Raises:
        ValueError: a module of the user's, whose layers are unknown.
    """
    layers = layers_of(net)
    described = [f.name for f in fields(Layer) if f.name not in ("weight", "bias")]
    about = {
        "format": numpy_policy.FORMAT,
        "obs_shape": list(net.obs_shape),
        "num_actions": net.num_actions,
        "actions": list(actions),
        "layers": [{name: getattr(layer, name) for name in described} for layer in layers],
    }
    arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for layer in layers:
        arrays |= layer.arrays
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _c_artifact(source: ExportSource, path: Path) -> Artifact:
    header = to_c(source.net, prefix=source.c_prefix, actions=source.action_names)
    path.write_text(header)
    # With this macro the header is a program that maps observations on standard input to outputs.
    program = path.with_name("program")
    flags = ("-std=c99", "-O2", f"-D{source.c_prefix.upper()}_MAIN", "-x", "c")
    compiler = Path(compile_c(*flags, str(path), "-o", str(program), "-lm")).name

    def run(obs: Tensor) -> np.ndarray:
        done = subprocess.run([str(program)], input=obs.numpy().tobytes(), capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.float32).reshape(-1, source.net.num_actions)

    details: dict[str, str | int] = {
        "stack_bytes": stack_bytes(header),
        "prefix": source.c_prefix,
        "compiler": compiler,
    }
    return Artifact(path, run, manifest=details)


def _sb3_artifact(source: ExportSource, path: Path) -> Artifact:
    from stable_baselines3 import PPO

    from policykd.agents.trusted import policy_of_model

    assert isinstance(source.policy, Student)
    # PPO.load executes the pickles in an archive: this one was written a moment ago.
    source.policy.to_sb3().save(path)
    model = PPO.load(path, device="cpu")
    policy = policy_of_model(model)
    details = {"needs": "stable_baselines3 and policykd; opens with PPO.load"}
    return Artifact(path, lambda obs: outputs_of(policy, obs), manifest=details, gives_log_probabilities=True)


def find_c_compiler() -> str:
    """Returns the path of a C compiler.

    Raises:
        ValueError: none is installed.
    """
    for name in ("cc", "gcc", "clang"):
        if compiler := shutil.which(name):
            return compiler
    raise ValueError("c: no compiler found (cc, gcc, clang); install one, or leave c out")


def compile_c(*arguments: str, folder: Path | None = None) -> str:
    """Runs the C compiler in a folder and returns its path.

    Raises:
        ValueError: no compiler is installed, or it reports an error.
    """
    compiler = find_c_compiler()
    done = subprocess.run([compiler, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        reason = " ".join(done.stderr.split())[:200]
        raise ValueError(f"c: {compiler} fails ({reason}); try another compiler")
    return compiler
