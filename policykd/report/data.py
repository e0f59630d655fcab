"""What a report shows, and how it is read from the folder of a run."""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policykd.compression import comparison as compression
from policykd.io.files import BadFile

RESULTS, COMPRESSION = "results.json", "compression.json"


@dataclass(frozen=True)
class Actions:
    """What teacher and student do in the same real states."""

    names: Sequence[str]
    teacher_A: Sequence[float]
    """mean chance of each action, at the teacher's temperature"""
    student_A: Sequence[float]
    best_AA: Sequence[Sequence[int]]
    """how many states have this best action of the teacher (row) and that of the student (column)"""
    kl: float
    """KL(teacher, student), mean over the states, nats"""


@dataclass(frozen=True)
class Film:
    """Teacher and student at play, side by side."""

    moving: bytes
    """animated WebP"""
    poster: bytes
    """PNG of one picture, for paper and for who wants no motion"""
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Other compression methods, as `policykd compress` compared them."""

    content: compression.Comparison
    pareto: bytes = b""
    """SVG"""
    source: str = ""
    """the folder's name"""
    has_this_run: bool = False
    """whether the run of the report is in the picture"""


@dataclass(frozen=True)
class Report:
    """All that a page shows; what is empty is left out of it."""

    game: str
    name: str
    results: Mapping[str, Any]
    """as results.json"""
    config: Mapping[str, Any] = field(default_factory=dict)
    """as config.json"""
    student: Mapping[str, Any] = field(default_factory=dict)
    """as student.json"""
    rounds: Sequence[Mapping[str, Any]] = ()
    """as the lines of metrics.jsonl"""
    evaluations: Sequence[tuple[int, float]] = ()
    """gradient updates, and the mean return of the games played then"""
    scalars: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """of a run inside reinforcement learning, which has no rounds: TensorBoard's curves, (agent steps, number)"""
    actions: Actions | None = None
    film: Film | None = None
    comparison: Comparison | None = None


def read_run(run: Path, results: Mapping[str, Any] | None = None) -> Report:
    """Returns what the folder of a run holds; where `results` are given results.json need not be there yet.

    Raises:
        BadFile: a file is damaged.
        ValueError: no such folder, or a run that is not finished.
    """
    if results is None:
        if not (run / RESULTS).is_file():
            raise ValueError(
                f"{run}: holds no {RESULTS}; give the folder of a finished run, or finish it with --resume"
            )
        results = _object(run / RESULTS)
    if found := _not_finite(results):
        raise BadFile(f"{run / RESULTS}: {found}, which is no return; make the run again")
    config = _object(run / "config.json") if (run / "config.json").is_file() else {}
    settings = config.get("settings", {})
    if not _is_configuration(config):
        raise BadFile(f"{run / 'config.json'}: not what a run writes; make the run again")
    return Report(
        game=str(settings.get("game") or run.resolve().parent.name),
        name=run.resolve().name,
        results=results,
        config=config,
        student=_object(run / "student.json") if (run / "student.json").is_file() else {},
        rounds=_rounds(run / "metrics.jsonl"),
        evaluations=_evaluations(run / "evaluations.npz"),
        scalars={} if (run / "metrics.jsonl").is_file() else _scalars(run),
    )


def _is_configuration(config: Mapping[str, Any]) -> bool:
    """Returns whether what a page takes from config.json is of the kind that a run writes."""
    settings = config.get("settings", {})
    teacher = settings.get("teacher", {}) if isinstance(settings, dict) else None
    if not isinstance(teacher, dict):
        return False
    texts = [config.get("teacher_argument", ""), *(teacher.get(key, "") for key in ("ref", "revision", "sha256"))]
    return all(isinstance(text, str) for text in texts)


def _not_finite(content: object, name: str = "") -> str:
    """Returns the name of the first number in results that is NaN or infinite, with the number, or nothing."""
    if isinstance(content, float):
        return "" if math.isfinite(content) else f"{name} is {content}"
    parts = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    found = (_not_finite(part, f"{name}.{key}".strip(".")) for key, part in parts)
    return next(filter(None, found), "")


def read_comparison(folder: Path) -> Comparison:
    """Returns what `policykd compress` wrote into a folder.

    Raises:
        BadFile: damaged.
    """
    content = compression.read_comparison(folder)
    picture = folder / "pareto.svg"
    return Comparison(content, picture.read_bytes() if picture.is_file() else b"", folder.resolve().name)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: damaged ({error}); it is written by a run, make the run again") from error
    if not isinstance(content, dict):
        raise BadFile(f"{path}: not what a run writes; make the run again")
    return content


def _rounds(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: damaged ({error}); remove it, the report leaves its curves out") from error
    return [row for row in rows if isinstance(row, dict)]


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    if not any(run.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run)).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def _evaluations(path: Path) -> list[tuple[int, float]]:
    if not path.is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            key = "num_updates" if "num_updates" in arrays.files else "timesteps"
            return [(int(n), float(np.mean(r))) for n, r in zip(arrays[key], arrays["results"], strict=True)]
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise BadFile(f"{path}: damaged ({error}); remove it, the report leaves its games out") from error
