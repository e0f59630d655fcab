"""A policy as files that run without policykd: each is made, tried on real states, and only then put under its name."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from policykd.export.formats import FORMATS, MAKERS, Format, Made, Subject, check_format, scores_of
from policykd.export.numpy_file import to_npz
from policykd.io.files import write_atomically
from policykd.io.signals import check_interrupted

__all__ = ["FORMATS", "Export", "Format", "Made", "Subject", "check_format", "export", "to_npz", "validate"]

TOLERANCE = 1e-4
"""the largest difference of a score that is still the same policy in float32; of the largest score where that is above
1, as float32 has seven digits. Two best actions within twice of it may change places"""
INT8_AGREEMENT = 0.99
"""share of states in which an int8 policy's best action must be the float32 one's"""
_BATCH = 256


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
    largest_score: float
    """of torch's, positive or negative"""

    @property
    def tolerance(self) -> float:
        """The largest difference of a score that is still the same policy in float32."""
        return _tolerance(self.largest_score)


def _tolerance(largest_score: float) -> float:
    return TOLERANCE * max(1.0, largest_score)


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
        made = MAKERS[kind](subject, Path(name), calibration)
        try:
            validation = validate(subject, kind, made, states)
        except FloatingPointError as error:
            if made.otherwise is None:
                raise
            made = made.otherwise(str(error).partition(";")[0])
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
        "validation": {
            **asdict(validation),
            **_limits(kind, validation),
            "states": "half no-op sampled, half sticky greedy",
        },
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
    expected = np.concatenate([scores_of(subject.net, part, made.is_normalised) for part in states.split(_BATCH)])
    found = np.concatenate([made.score(part) for part in states.split(_BATCH)])
    one_by_one = np.concatenate([made.score(state[None]) for state in states[:8]])
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise FloatingPointError(
            f"{kind}: scores {found.shape}, not all finite, expected {expected.shape}; not written"
        )
    best_two = np.sort(expected, axis=1)[:, -2:]
    largest = float(np.abs(expected).max())
    tolerance = _tolerance(largest)
    tied = best_two[:, 1] - best_two[:, 0] <= 2 * tolerance
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
    if kind != "int8" and (max(difference, alone) > tolerance or agreement < 1.0):
        raise FloatingPointError(
            f"{where} its scores differ by up to {max(difference, alone):.2g} from torch's ({tolerance:.2g} is"
            f" allowed), its actions in {1.0 - agreement:.2%}; not written"
        )
    return Validation(len(states), difference, agreement, int(tied.sum()), largest)


def _limits(kind: Format, validation: Validation) -> dict[str, float]:
    allowed = validation.tolerance
    return (
        {"needed_agreement": INT8_AGREEMENT} if kind == "int8" else {"allowed_difference": allowed, "tie": 2 * allowed}
    )


def _input(shape: tuple[int, ...], kind: str) -> dict[str, Any]:
    said = {"name": "obs", "shape": ["batch", *shape], "dtype": kind}
    if len(shape) == 3:
        said |= {"range": [0, 255], "order": "channels first: grey frames of 84 by 84 pixels, newest last"}
    return said
