"""Validated artifacts: each is made in a temporary folder, run on real states, and only then moved to its name."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policykd.agents.card import TeacherRecord
from policykd.agents.policy import log_policy
from policykd.agents.student import Shape, packed_weights
from policykd.agents.teacher import Teacher
from policykd.export.compiled import TOLERANCE
from policykd.export.formats import Artifact, ExportSource, FormatName, make_artifact, outputs_of
from policykd.io.files import write_atomically
from policykd.io.machine import versions
from policykd.io.signals import deferred_signals
from policykd.io.typed import to_json

INT8_AGREEMENT = 0.99
"""minimum share of states in which an int8 policy takes the float32 policy's action"""
_BATCH = 256


@dataclass(frozen=True)
class Validation:
    """How an artifact compares with the torch policy on real states."""

    num_states: int
    max_difference: float
    """largest difference of an output from torch's"""
    agreement: float
    """share of states with the same best action, ties left out"""
    num_ties: int
    """states whose two best actions are closer than `tie`: a difference within the tolerance can swap them"""
    largest_output: float
    """largest absolute output of the torch policy"""
    tie: float
    allowed_difference: float | None
    """None for int8"""
    required_agreement: float
    states: str = "half no-op starts and sampled actions, half sticky actions and greedy play"


@dataclass(frozen=True)
class TensorSpec:
    """Input or output of an artifact."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class ExportOrigin:
    """The policy that an artifact was made from."""

    student: str = ""
    """sha256 of student.safetensors"""
    shape: Shape | None = None
    """network of the student"""
    teacher: TeacherRecord | None = None


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """Content of NAME.json next to an artifact.

    It is written last: an artifact whose sha256 is not its manifest's is incomplete.
    """

    format: FormatName
    file: str
    sha256: str
    num_bytes: int
    extra_files: dict[str, str]
    """name -> sha256 of the files that are needed in addition"""
    details: dict[str, str | int]
    """runtime, compiler, stack size and the like"""
    source: ExportOrigin
    game: str
    actions: dict[int, str]
    input: TensorSpec
    output: TensorSpec
    validation: Validation
    command: str
    versions: dict[str, str]


def export(
    source: ExportSource,
    format_name: FormatName,
    folder: str | Path,
    states: Tensor,
    calibration: Tensor,
    command: str = "",
) -> ExportManifest:
    """Writes a policy in one format, after validating the file on real states in its own runtime.

    The file is `folder / manifest.file`; its manifest is next to it.

    Args:
        source: the policy.
        format_name: the format.
        folder: folder to write to, created if missing.
        states: observations of the policy's own games to validate on, `(n, *obs_shape)`.
        calibration: observations of other games, for int8.
        command: recorded in the manifest.

    Raises:
        FloatingPointError: outputs or actions differ from torch's; nothing is written, and earlier files stay.
        ValueError: the policy cannot be exported in this format, or a package or compiler is missing.
        OSError: no space left or no permission.
    """
    folder = Path(folder)
    # Nothing appears under its final name before the validation; what fails leaves no trace.
    with tempfile.TemporaryDirectory() as temporary:
        artifact = make_artifact(source, format_name, Path(temporary), calibration)
        validation = validate(artifact, format_name, source, states)
        content = artifact.path.read_bytes()
        extra_files = {path.name: path.read_bytes() for path in artifact.extra_files}
    manifest = ExportManifest(
        format=format_name,
        file=artifact.path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        extra_files={name: hashlib.sha256(extra).hexdigest() for name, extra in extra_files.items()},
        details=dict(artifact.manifest),
        source=_origin(source),
        game=source.game,
        actions=dict(enumerate(source.action_names)),
        input=_input_spec(source.net.obs_shape),
        output=TensorSpec("scores", ("batch", source.net.num_actions), "float32", "logits or Q-values"),
        validation=validation,
        command=command,
        versions=versions(),
    )
    path = folder / artifact.path.name
    manifest_path = folder / f"{path.name}.json"
    # No moment has a manifest that does not belong to the file: the old one goes first, the new one comes last.
    with deferred_signals():
        manifest_path.unlink(missing_ok=True)
        for name, extra in extra_files.items():
            write_atomically(folder / name, extra)
        write_atomically(path, content)
        write_atomically(manifest_path, to_json(manifest))
    return manifest


def validate(artifact: Artifact, format_name: FormatName, source: ExportSource, states: Tensor) -> Validation:
    """Returns how an artifact compares with the torch policy.

    Raises:
        FloatingPointError: its outputs differ by more than the tolerance, or its actions by more than the format may.
    """
    expected = np.concatenate([outputs_of(source.net, batch) for batch in states.split(_BATCH)])
    if artifact.gives_log_probabilities:
        expected = log_policy(torch.from_numpy(expected)).numpy()
    found = np.concatenate([artifact.run(batch) for batch in states.split(_BATCH)])
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise FloatingPointError(
            f"{format_name}: outputs {found.shape}, not all finite, expected {expected.shape}; not written"
        )
    # A runtime may choose another kernel for a single observation, which is what most users run.
    single = np.concatenate([artifact.run(state[None]) for state in states[:8]])
    difference = max(float(np.abs(found - expected).max()), float(np.abs(single - expected[:8]).max()))

    # A tie is left out of the agreement: each of its two outputs may move by the tolerance, in opposite directions.
    largest = float(np.abs(expected).max())
    # Relative to the largest output only where that is above 1.
    tolerance = TOLERANCE * max(1.0, largest)
    best_two = np.sort(expected, axis=1)[:, -2:]
    is_tied = best_two[:, 1] - best_two[:, 0] <= 2 * tolerance
    is_same = found.argmax(axis=1) == expected.argmax(axis=1)
    agreement = 1.0 if is_tied.all() else float(is_same[~is_tied].mean())

    is_int8 = format_name == "int8"
    validation = Validation(
        num_states=len(states),
        max_difference=difference,
        agreement=agreement,
        num_ties=int(is_tied.sum()),
        largest_output=largest,
        tie=2 * tolerance,
        allowed_difference=None if is_int8 else tolerance,
        required_agreement=INT8_AGREEMENT if is_int8 else 1.0,
    )
    # The outputs of int8 differ visibly by design, so only its actions are compared.
    where = f"{format_name}: on {len(states):,} real states"
    if agreement < validation.required_agreement:
        raise FloatingPointError(
            f"{where} it takes torch's action in {agreement:.2%}, {validation.required_agreement:.0%} are needed; not"
            " written, use another format"
        )
    if not is_int8 and difference > tolerance:
        raise FloatingPointError(
            f"{where} its outputs differ by up to {difference:.2g} from torch's ({tolerance:.2g} is allowed); not"
            " written"
        )
    return validation


def _origin(source: ExportSource) -> ExportOrigin:
    policy = source.policy
    if isinstance(policy, Teacher):
        return ExportOrigin(teacher=policy.record)
    sha256 = hashlib.sha256(packed_weights(policy)).hexdigest()
    return ExportOrigin(student=sha256, shape=policy.shape, teacher=source.teacher)


def _input_spec(obs_shape: tuple[int, ...]) -> TensorSpec:
    if len(obs_shape) == 3:
        meaning = "grey frames of 84 by 84 pixels from 0 to 255, channels first, newest last"
        return TensorSpec("obs", ("batch", *obs_shape), "uint8", meaning)
    return TensorSpec("obs", ("batch", *obs_shape), "float32", "finite numbers")
