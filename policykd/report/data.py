"""The files of a run that a report shows, each read with its type and a size limit."""

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from policykd.agents.student import StudentCard, read_student_card
from policykd.io.files import BadFile
from policykd.io.typed import read_json
from policykd.runs.results import RESULTS, RunResult, load_results

MAX_EVENT_BYTES = 256 * 2**20

Curve = list[tuple[float, float]]
"""(gradient updates or agent steps, value) of a TensorBoard tag"""


@dataclass(frozen=True)
class RunConfig:
    """What a report shows of `config.json`; the settings depend on the command and are shown as they are."""

    settings: dict[str, JsonValue] = field(default_factory=dict)
    machine: dict[str, JsonValue] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class RunFiles:
    """Everything in a run's folder that a report shows."""

    game: str
    name: str
    results: RunResult
    config: RunConfig
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
        BadFile: a file is damaged.
        ValueError: the run is not finished.
    """
    results = results or load_results(run)
    if results is None:
        raise ValueError(f"{run}: {RESULTS} not found; give the folder of a finished run, or resume it")
    config = RunConfig()
    if (run / "config.json").exists():
        config = read_json(RunConfig, run / "config.json", next_step="start a new run under another --name")
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
