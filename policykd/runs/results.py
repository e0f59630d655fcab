"""Result of a run: what `distill_run` returns, `results.json` holds and the report reads."""

from dataclasses import dataclass, field
from pathlib import Path

from policykd.evaluation.results import FinalEvaluation, results_table
from policykd.io.typed import read_json

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class RunResult(FinalEvaluation):
    """Costs and returns of student, teacher and random play, and what the run took."""

    num_states_labelled: int | None = None
    """states that the teacher has labelled; None in results that do not record it"""
    num_updates: int | None = None
    """gradient updates"""
    wall_seconds: dict[str, float] = field(default_factory=dict)
    """by phase: collect, label, train (which overlap), rounds (all of them), evaluate"""
    versions: dict[str, str] = field(default_factory=dict)
    """package -> version"""
    command: str = ""
    """command line that wrote the results"""

    def summary(self) -> str:
        """Returns the table of `results.md`, and below it what the run took."""
        spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.wall_seconds.items())
        counts = f"{self.num_states_labelled or 0:,} states, {self.num_updates or 0:,} updates"
        return f"{results_table(self)}\n\n{counts}; {spent}\n"


def load_results(run: Path) -> RunResult | None:
    """Returns the results of a run's folder, None if the run is not finished; raises BadFile if they are damaged."""
    path = run / RESULTS
    if not path.exists():
        return None
    return read_json(RunResult, path, next_step=f"remove it and resume with: policykd resume {run}")
