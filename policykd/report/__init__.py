"""Writes report.html: one file that says what a run lost and gained, and shows both at play."""

import copy
import io
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from policykd.agents.policy import Policy, greedy, log_policy
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.compression.comparison import Row
from policykd.compression.pareto import draw_pareto
from policykd.envs.actions import action_names
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.results import ProtocolResult
from policykd.evaluation.statistics import summarise
from policykd.io.files import BadFile, write_atomically
from policykd.legacy.divergences import kl_divergence_B
from policykd.report.data import COMPRESSION, Actions, Comparison, Film, read_comparison, read_run
from policykd.report.page import comparison_page, page
from policykd.report.sections import compressors
from policykd.viewer import colours
from policykd.viewer.animation import (
    STEPS_PER_SECOND,
    Player,
    VideoSettings,
    encode_animation,
    render_video,
    truncate_webp,
)

REPORT = "report.html"
NOT_OURS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""what the content of a file brings about that is not what we write"""
MOST_BYTES = 1_500_000
"""of a film; one that is larger ends earlier"""


def write_report(
    run: Path,
    results: Mapping[str, Any],
    student: Student,
    teacher: Teacher,
    game: str,
    *,
    seed: int = 0,
    seconds: float = 16.0,
    num_states: int = 1024,
) -> Path:
    """Writes the page of a run whose results are known, and returns its path.

    It plays: some states for the shares of actions, and a film of both on the same seed.

    Args:
        run: its folder, with metrics.jsonl and the like; results.json need not be there yet.
        results: as `results.json`.
        student: on any device.
        teacher: on any device.
        game: what they play.
        seed: of the states and the film.
        seconds: of the film.
        num_states: that the student visits, for the shares of actions.

    Raises:
        BadFile: a file of the run is damaged, or the results are not those of a run.
        KeyboardInterrupt: a signal came, see `check_interrupted`; nothing is written.
    """
    student, teacher = copy.deepcopy(student).to("cpu").eval(), teacher.to("cpu")
    report = replace(read_run(run, results), game=game)
    try:
        page(report)  # before a film is played for it
        report = replace(report, comparison=newest_comparison(run, results, teacher.sha256))
    except NOT_OURS as error:
        raise BadFile(f"{run}: its results are not those of a run ({error!r}); make the run again") from error
    report = replace(
        report,
        actions=compared_actions(student, teacher, game, num_states, seed=seed),
        film=filmed(student, teacher, game, seconds, seed=seed),
    )
    write_atomically(run / REPORT, page(report).encode())
    return run / REPORT


def write_comparison_report(folder: Path) -> Path:
    """Writes the page of a comparison by `policykd compress`, and returns its path.

    Raises:
        BadFile: compression.json is damaged.
    """
    comparison = read_comparison(folder)
    try:
        content = comparison_page(folder.resolve().parent.name, comparison)
    except NOT_OURS as error:
        reason = f"not what a comparison writes ({error!r}); make it again with policykd compress"
        raise BadFile(f"{folder / COMPRESSION}: {reason}") from error
    write_atomically(folder / REPORT, content.encode())
    return folder / REPORT


def newest_comparison(run: Path, results: Mapping[str, Any], teacher_sha256: str) -> Comparison | None:
    """Returns the last comparison of compressors beside a run that began with its teacher, the run in its picture.

    One that is damaged or cannot be read is no reason for a run to fail: a warning says so, and it is passed over.
    """
    for path in sorted(run.resolve().parent.glob(f"*/{COMPRESSION}"), key=_changed, reverse=True):
        try:
            found = read_comparison(path.parent)
            if found.content.settings.teacher_sha256 == teacher_sha256:
                comparison = with_this_run(found, results["student"], run)
                compressors(comparison)
                return comparison
        except (OSError, *NOT_OURS) as error:
            print(f"warning: {path}: left out of the report ({error!r})", file=sys.stderr)
    return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # what cannot be looked at comes last
        return 0.0


def with_this_run(comparison: Comparison, student: Mapping[str, Any], run: Path) -> Comparison:
    """Returns a comparison whose picture has a run's student in it.

    Its bytes are those of its file, as the comparison's are; its latency stays out: it was taken in torch, those of the
    comparison in ONNX Runtime.
    """
    row = Row(
        recipe=f"this run: {run.resolve().name}",
        family="this run",
        settings=comparison.content.settings,
        num_parameters=student["num_parameters"],
        num_macs=student["num_macs"],
        num_bytes=(run / "student.safetensors").stat().st_size,
        protocols={
            protocol: ProtocolResult(**asdict(summarise(played["returns"])), returns=tuple(played["returns"]))
            for protocol, played in student["protocols"].items()
        },
    )
    picture = io.BytesIO()
    draw_pareto(comparison.content, picture, this_run=row)
    return replace(comparison, pareto=picture.getvalue(), has_this_run=True)


@torch.inference_mode()
def compared_actions(student: Policy, teacher: Teacher, game: str, num_states: int, *, seed: int) -> Actions:
    """Returns what both do in states that the student visits; both are on the CPU."""
    obs = on_policy_states(student, game, num_states, seed=seed)
    scores = [torch.cat([policy(part) for part in obs.split(256)]) for policy in (teacher, student)]
    log_teacher, log_student = log_policy(scores[0], teacher.temperature), log_policy(scores[1])
    num_actions = log_teacher.shape[1]
    pairs = greedy(scores[0]) * num_actions + greedy(scores[1])
    return Actions(
        names=action_names(game),
        teacher_A=log_teacher.exp().mean(dim=0).tolist(),
        student_A=log_student.exp().mean(dim=0).tolist(),
        best_AA=pairs.bincount(minlength=num_actions**2).reshape(num_actions, num_actions).tolist(),
        kl=float(kl_divergence_B(log_teacher, log_student).mean()),
    )


def filmed(student: Policy, teacher: Teacher, game: str, seconds: float, *, seed: int) -> Film:
    """Returns both at play, side by side on the same seed."""
    players = [
        Player("teacher", teacher, teacher.temperature, colours.TEACHER),
        Player("student", student, colour=colours.STUDENT),
    ]
    settings = VideoSettings(game, seed=seed, num_steps=round(seconds * STEPS_PER_SECOND))
    pictures = list(render_video(players, settings))
    moving, seconds = truncate_webp(encode_animation(pictures, settings.steps_per_picture), MOST_BYTES)
    poster = io.BytesIO()
    pictures[round(seconds * STEPS_PER_SECOND / 2) // 2].save(poster, "PNG", optimize=True)
    return Film(moving, poster.getvalue(), seconds)
