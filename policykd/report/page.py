"""Report pages: data in, one HTML file out.

The templates load nothing from elsewhere and run no script. Jinja2 escapes every text that is not `Markup`.
"""

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from policykd.agents.student import StudentCard, read_student_card
from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName
from policykd.evaluation.results import PolicyResult, PolicyRole, ProtocolResult
from policykd.evaluation.statistics import difference_interval, teacher_normalised_score
from policykd.io.files import BadFile
from policykd.report.charts import MINUS, Chart, Look, Series, cost_chart, histogram, line_chart
from policykd.runs.folder import RESULTS, RunRecord, RunResult, load_results, load_run_config

if TYPE_CHECKING:
    from policykd.report.compressors import ComparedMethods

MAX_EVENT_BYTES = 256 * 2**20

Curve = list[tuple[float, float]]
"""(gradient updates or agent steps, value) of a TensorBoard tag"""


@dataclass(frozen=True)
class RunFiles:
    """Everything in a run's folder that a report shows."""

    game: str
    name: str
    results: RunResult
    config: RunRecord
    student: StudentCard
    curves: dict[str, Curve]
    """by TensorBoard tag"""

    @property
    def x_label(self) -> str:
        """X axis of the curves, which is another one inside reinforcement learning."""
        return "gradient updates" if "data/n_states" in self.curves else "agent steps"


def read_run(run: Path, results: RunResult | None = None) -> RunFiles:
    """Returns the content of a run's folder; with `results` given, results.json is not read.

    Raises:
        BadFile: a file is not found or damaged.
        ValueError: the run is not finished.
    """
    results = results or load_results(run)
    if results is None:
        raise ValueError(f"{run}: {RESULTS} not found; give the folder of a finished run, or resume it")
    config = load_run_config(run)
    return RunFiles(
        game=str(config.settings.get("game") or run.resolve().parent.name),
        name=run.resolve().name,
        results=results,
        config=config,
        student=read_student_card(run / "student.json"),
        curves=_read_curves(run),
    )


def _read_curves(run: Path) -> dict[str, Curve]:
    """Returns the scalars of TensorBoard's event files; what is damaged in them is left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second to import

    paths = list(run.glob("*tfevents*"))
    for path in paths:
        # TensorBoard itself would wait forever on a FIFO.
        if not path.is_file() or path.stat().st_size > MAX_EVENT_BYTES:
            raise BadFile(f"{path}: not a regular file of at most {MAX_EVENT_BYTES:,} bytes; remove it")
    if not paths:
        return {}
    events = EventAccumulator(str(run)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


REPORT_FILE = "report.html"

MIN_GAMES = 20
"""games per side below which nothing is claimed: the bootstrap interval of a few games is too narrow"""
CLOSE = 0.05
"""fraction of the teacher's advantage over random play; an interval inside it is called within"""

PROTOCOL_NAMES: dict[ProtocolName, str] = {
    "noop_sampled": "No-op starts, sampled actions",
    "sticky_greedy": "Sticky actions, greedy play",
}
# Attributes of `PolicyResult`, and the titles of their charts.
COSTS = {
    "num_parameters": "Parameters",
    "num_macs": "Multiply-accumulates",
    "num_bytes": "Bytes, float32",
    "latency_microseconds": "Latency in µs, one observation",
}

# Charts of the section Learning: title, unit, scale of the y axis, and the (tag, label, look, style) of each curve.
# Distillation and distillation inside reinforcement learning have different tags for the same quantity.
CURVES: tuple[tuple[str, str, str, tuple[tuple[str, str, Look, str], ...]], ...] = (
    ("KL divergence from the teacher", "nats", "log", (
        ("train/kl", "states trained on", "second", "o--"),
        ("data/new_kl", "new states, before training on them", "student", "o-"),
        ("offline/teacher_kl", "the teacher's games, before step 0", "second", "o--"),
        ("train/teacher_kl", "minibatches, before their update", "student", "-"))),
    ("Same greedy action as the teacher", "share of states", "%", (
        ("train/action_agreement", "states trained on", "second", "o--"),
        ("data/new_action_agreement", "new states, before training on them", "student", "o-"))),
    ("Return during the run", "mean episodic return", "linear", (
        ("rollout/ep_rew_mean", "while collecting, whoever acts", "second", "o--"),
        ("eval/mean_reward", "student alone, 16 episodes", "student", "o"))),
    ("Distillation weight", "relative to the reward", "linear", (
        ("train/distillation_weight", "weight", "student", "-"),)),
    ("Learning rate", "of the optimizer", "linear", (
        ("train/learning_rate", "learning rate", "student", "-"),)),
)  # fmt: skip


@dataclass(frozen=True)
class ActionComparison:
    """Actions of teacher and student in the same states."""

    names: Sequence[str]
    teacher_A: Sequence[float]
    """mean probability of each action, at the teacher's temperature"""
    student_A: Sequence[float]
    greedy_AA: Sequence[Sequence[int]]
    """number of states by greedy action of the teacher (row) and of the student (column)"""
    kl: float
    """KL(teacher || student), mean over the states, nats"""


@dataclass(frozen=True)
class Film:
    """Teacher and student playing side by side."""

    webp: bytes
    poster: bytes
    """PNG of one picture, for paper and for readers who want no motion"""
    seconds: float


def run_page(
    files: RunFiles,
    *,
    actions: ActionComparison | None = None,
    film: Film | None = None,
    compared: "ComparedMethods | None" = None,
) -> str:
    """Returns the page of a run; parts that are missing have no section."""
    return render(
        "run.html",
        run=files,
        results=files.results,
        verdicts=[verdict(files.results, protocol) for protocol in files.results.comparison],
        histograms=[
            histogram(PROTOCOL_NAMES[protocol], _played(files.results, protocol))
            for protocol in files.results.comparison
        ],
        cost_charts=_cost_charts(files.results),
        curve_charts=_curve_charts(files),
        actions=actions,
        film=film,
        compared=compared,
    )


def verdict(results: RunResult, protocol: ProtocolName) -> str:
    """Returns the sentence that the interval of the difference to the teacher supports under a protocol."""
    student = results.student.protocols[protocol]
    teacher = results.teacher.protocols[protocol]
    advantage = teacher.mean - results.random.protocols[protocol].mean
    compared = results.comparison[protocol]
    low, high = compared.difference_interval
    farthest = max(-low, high)
    num_games = min(student.num_episodes, teacher.num_episodes)
    is_zero_inside = low <= 0.0 <= high
    # Few games, or an interval that includes 0 without being narrow, support no claim.
    if num_games < MIN_GAMES or (is_zero_inside and farthest > CLOSE * advantage):
        claim = f"{num_games} games cannot tell the student from the teacher"
    elif is_zero_inside:
        # Rounded up, so that the claim never exceeds the interval.
        points = math.ceil(round(100.0 * farthest, 6)) / 100.0
        claim = f"the student plays within {points:.2f} points of the teacher"
    else:
        claim = f"the student plays {'above' if low > 0.0 else 'below'} the teacher"
    numbers = f"{compared.difference_to_teacher:+,.2f}, 95% interval [{low:+,.2f}, {high:+,.2f}]".replace("-", MINUS)
    games = f"{student.num_episodes} games against {teacher.num_episodes}"
    return f"{PROTOCOL_NAMES[protocol]}: {claim} ({numbers}, {games})."


def _played(results: RunResult, protocol: ProtocolName) -> dict[PolicyRole, ProtocolResult]:
    policies: dict[PolicyRole, PolicyResult] = {
        "teacher": results.teacher,
        "student": results.student,
        "random": results.random,
    }
    return {role: policy.protocols[protocol] for role, policy in policies.items()}


def _cost_charts(results: RunResult) -> list[Chart]:
    """Returns charts of the return against each cost that is known of both networks."""
    played = _played(results, next(iter(results.comparison)))
    charts = []
    for attribute, title in COSTS.items():
        teacher = getattr(results.teacher, attribute)
        student = getattr(results.student, attribute)
        if teacher and student:
            charts.append(cost_chart(title, {"teacher": teacher, "student": student}, played))
    return charts


def _curve_charts(files: RunFiles) -> list[Chart]:
    """Returns a chart of each quantity that the run has logged."""
    teacher = next(iter(files.results.teacher.protocols.values())).mean
    charts = []
    for title, unit, scale, curves in CURVES:
        series = []
        for tag, label, look, style in curves:
            if points := files.curves.get(tag):
                series.append(Series(label, look, [x for x, _ in points], [y for _, y in points], style))
        # The teacher as a horizontal line, to compare the other returns with.
        if series and title.startswith("Return"):
            ends = [min(min(line.x) for line in series), max(max(line.x) for line in series)]
            series.insert(0, Series("teacher, final evaluation", "teacher", ends, [teacher, teacher], "-"))
        if series:
            charts.append(line_chart(title, unit, series, x_label=files.x_label, scale=scale))
    return charts


def render(template: str, **context: object) -> str:
    """Returns a template of this package, filled in."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    loader = PackageLoader("policykd.report")
    # Strict: a template that asks for a field that does not exist is an error, not an empty cell.
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "base64": lambda content: b64encode(content).decode(), "asdict": asdict}
    constants = {"PROTOCOLS": PROTOCOLS, "PROTOCOL_NAMES": PROTOCOL_NAMES, "MIN_GAMES": MIN_GAMES, "CLOSE": CLOSE}
    statistics = (difference_interval, teacher_normalised_score)
    environment.globals |= constants | {function.__name__: function for function in statistics}
    return environment


def _number(value: float, form: str = ",.2f") -> str:
    """Returns a number with a typographic minus sign."""
    return f"{value:{form}}".replace("-", MINUS)
