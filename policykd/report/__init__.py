"""Reports: one HTML file that shows what a run lost and gained, with a film of teacher and student."""

import copy
import io
from dataclasses import dataclass
from pathlib import Path

import torch

from policykd.agents.policy import Policy, greedy, log_policy
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.envs.emulators import action_names
from policykd.evaluation.real_states import on_policy_states
from policykd.io.files import write_atomically
from policykd.losses import kl_divergence_B
from policykd.report.page import REPORT_FILE, ActionComparison, Film, read_run, run_page
from policykd.runs.folder import RunResult
from policykd.viewer import colours
from policykd.viewer.animation import STEPS_PER_SECOND, Player, VideoSettings, encode_animation, render_video

MAX_FILM_BYTES = 1_500_000
"""a larger film is made shorter, which keeps the page below 3 MB"""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Length and seed of what teacher and student play for a report."""

    seed: int = 0
    """seed of the states and the film"""
    seconds: float = 16.0
    """length of the film"""
    num_states: int = 1024
    """states of the student's own episodes on which actions are compared"""


def write_report(
    run: Path, results: RunResult, student: Student, teacher: Teacher, options: ReportOptions = ReportOptions()
) -> Path:
    """Writes `report.html` into a run's folder and returns its path.

    Args:
        run: folder of the run; results.json need not be written yet.
        results: content of results.json.
        student: the run's student, on any device.
        teacher: its teacher, on any device.
        options: what the two play for it.

    Raises:
        BadFile: a file of the run is damaged.
        OSError: no space left or no permission; a previous report stays.
    """
    # Imported here, because the compression methods are many modules that a run itself does not need.
    from policykd.report.compressors import newest_comparison

    # Before anything is played: a damaged file should cost no time.
    files = read_run(run, results)
    # Both play on the CPU; the caller keeps its student where it is.
    student = copy.deepcopy(student).to("cpu").eval()
    teacher = teacher.to("cpu")
    page = run_page(
        files,
        actions=compare_actions(student, teacher, files.game, options),
        film=render_film(student, teacher, files.game, options),
        compared=newest_comparison(run, results.student, teacher.sha256),
    )
    write_atomically(run / REPORT_FILE, page.encode())
    return run / REPORT_FILE


@torch.inference_mode()
def compare_actions(student: Policy, teacher: Teacher, game: str, options: ReportOptions) -> ActionComparison:
    """Returns the actions of both policies, on the CPU, in states of the student's own episodes."""
    obs_BCHW = on_policy_states(student, game, options.num_states, seed=options.seed)
    teacher_BA = torch.cat([teacher(part) for part in obs_BCHW.split(256)])
    student_BA = torch.cat([student(part) for part in obs_BCHW.split(256)])
    log_teacher_BA = log_policy(teacher_BA, teacher.temperature)
    log_student_BA = log_policy(student_BA)
    num_actions = teacher_BA.shape[1]
    # Each pair of greedy actions is one number, so that counting them gives the matrix.
    pairs_B = greedy(teacher_BA) * num_actions + greedy(student_BA)
    return ActionComparison(
        names=action_names(game),
        teacher_A=log_teacher_BA.exp().mean(dim=0).tolist(),
        student_A=log_student_BA.exp().mean(dim=0).tolist(),
        greedy_AA=pairs_B.bincount(minlength=num_actions**2).reshape(num_actions, num_actions).tolist(),
        kl=float(kl_divergence_B(log_teacher_BA, log_student_BA).mean()),
    )


def render_film(student: Policy, teacher: Teacher, game: str, options: ReportOptions) -> Film:
    """Returns teacher and student side by side on the same seed, at most `MAX_FILM_BYTES`."""
    players = [
        Player("teacher", teacher, teacher.temperature, colours.TEACHER),
        Player("student", student, colour=colours.STUDENT),
    ]
    video = VideoSettings(game, seed=options.seed, num_steps=round(options.seconds * STEPS_PER_SECOND))
    pictures = list(render_video(players, video))
    webp = encode_animation(pictures, video.steps_per_picture)
    # Games whose whole screen moves take several times the bytes of Pong.
    while len(webp) > MAX_FILM_BYTES and len(pictures) > 1:
        fraction = 0.9 * MAX_FILM_BYTES / len(webp)
        pictures = pictures[: max(1, int(fraction * len(pictures)))]
        webp = encode_animation(pictures, video.steps_per_picture)
    poster = io.BytesIO()
    pictures[len(pictures) // 2].save(poster, "PNG", optimize=True)
    return Film(webp, poster.getvalue(), len(pictures) * video.steps_per_picture / STEPS_PER_SECOND)
