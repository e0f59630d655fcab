"""Folder of a run: what it was started with (`config.json`), and whether a process may resume it."""

import errno
import shlex
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from policykd.agents.card import TeacherRecord
from policykd.agents.teacher import Teacher, load_teachers
from policykd.evaluation.results import FinalEvaluation, results_table
from policykd.evaluation.teacher_check import TeacherCheck, measured_return
from policykd.io.files import BadFile, write_atomically
from policykd.io.machine import versions
from policykd.io.typed import read_json, write_json
from policykd.runs.budget import BudgetName, Stop, stage_ends
from policykd.runs.config import Settings, TeacherArgs, changed_settings

CONFIG = "config.json"
NOTES = "notes.log"
CHECKPOINTS = "checkpoints"
FINAL_EVALUATION = "final_eval.json"
NOT_REMEMBERED = ("name", "folder", "resume", "debug", "trust_pickle")
"""settings that a resumed run leaves in `config.json` as they were; every command line decides them for itself"""
Subcommand = Literal["distill", "distill-rl", "train-teacher"]
"""commands that start runs"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and backends that the last bits of a result depend on."""

    device: str
    """device that torch computes on"""
    threads: int
    """CPU threads per batch"""
    teacher_backend: str = ""
    """runtime of the teacher's network"""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Content of `config.json`: everything that identifies a run, written when it starts."""

    subcommand: Subcommand
    """command that resumes it"""
    settings: Settings
    """every flag of that command, given or not"""
    machine: Machine
    teacher: TeacherRecord | None = None
    """identity of the teacher"""
    teacher_check: TeacherCheck | None = None
    """how the teacher played when the run was started"""
    inputs: dict[str, str] = field(default_factory=dict)
    """name -> sha256 of other files that the run reads, such as a dataset"""
    versions: dict[str, str] = field(default_factory=versions)
    """package -> version"""
    command: str = field(default_factory=lambda: shlex.join(sys.argv))
    """command line"""


def load_started_run(run: Path, *, resume: bool) -> RunRecord | None:
    """Returns what the run in a folder was started with if it is to be resumed; None if the folder holds no run.

    Raises:
        ValueError: the folder holds a run, and `resume` is not set.
        BadFile: its config is missing or damaged.
    """
    # A run writes its config before its first checkpoint, so one without the other is not a run to resume.
    if not (run / CONFIG).is_file():
        if (run / CHECKPOINTS).exists():
            raise BadFile(f"{run}: holds checkpoints but no {CONFIG}; give another --name")
        return None
    if not resume:
        raise ValueError(f"{run}: holds a run already; resume it with --resume, or give another --name")
    return load_run_config(run)


def load_run_config(run: Path) -> RunRecord:
    """Returns what a run was started with."""
    step = "written by another version of policykd, or damaged; start a new run under another --name"
    return read_json(RunRecord, run / CONFIG, next_step=step)


def write_run_config(run: Path, record: RunRecord) -> None:
    """Creates a run's folder with its config."""
    write_json(run / CONFIG, record)


def check_resumable(run: Path, started: RunRecord, now: RunRecord, *, may_change: Collection[str]) -> None:
    """Compares what a run was started with and what it is to be resumed with, except for settings in `may_change`.

    On another machine or with other versions it is resumed with a warning, which is also written to `notes.log`: its
    results are then not bit for bit the same.

    Raises:
        ValueError: other settings, teacher or dataset; the line names each of them.
    """
    # Every difference is named at once, so that one attempt is enough to fix the command line.
    changed = [
        f"{name} was {before!r}, is {value!r}"
        for name, before, value in changed_settings(started.settings, now.settings)
        if name.partition(".")[0] not in may_change
    ]
    if started.teacher and now.teacher and started.teacher.sha256 != now.teacher.sha256:
        changed.append(f"teacher was {_describe(started.teacher)}, is {_describe(now.teacher)}")
    changed += _changes(started.inputs, now.inputs)
    if changed:
        raise ValueError(f"{run}: cannot resume with other settings ({'; '.join(changed)}); give another --name")
    # Other hardware and versions change last bits only: worth a warning, not a refusal.
    elsewhere = _changes(started.versions, now.versions) + _changes(asdict(started.machine), asdict(now.machine))
    if elsewhere:
        warning = (
            f"resumed on another machine or with other versions, not bit for bit the same ({'; '.join(elsewhere)})"
        )
        print(f"warning: {run}: {warning}", file=sys.stderr)
        add_note(run, warning)


def lengthen_run(run: Path, started: RunRecord, now: RunRecord) -> RunRecord:
    """Returns the record of a run that may have been given more rounds; if so, its files record that too.

    Raises:
        ValueError: fewer rounds, or a budget whose first stages are not those of the run.
    """
    before, after = _max_rounds(started.settings), _max_rounds(now.settings)
    # Schedules stretch over the whole run, so rounds that are done cannot be taken back.
    if after < before:
        raise ValueError(f"{run}: cannot resume with fewer rounds ({before} before, {after} now); give another --name")
    # The stages that are done must be those of the new budget too.
    budgets = {_budget(started.settings), _budget(now.settings)}
    if "none" in budgets and len(budgets) > 1:
        raise ValueError(f"{run}: was started with --budget {_budget(started.settings)}; give another --name")
    if "none" not in budgets and started.settings["rounds"] != now.settings["rounds"]:
        raise ValueError(f"{run}: --rounds is the length of its first stage; leave it out, and raise --budget instead")
    started = record_changes(run, started, now)
    if after > before:
        at_most = "" if _budget(now.settings) == "none" else "at most "
        add_note(run, f"lengthened from {at_most}{before} to {at_most}{after} rounds")
    return started


def _max_rounds(settings: Settings) -> int:
    """Returns the number of rounds that a run may take."""
    rounds = settings["rounds"]
    assert isinstance(rounds, int)
    return stage_ends(_budget(settings), rounds)[-1]


def _budget(settings: Settings) -> BudgetName:
    """Returns a run's budget; the config of a run from before there were budgets has none."""
    return cast(BudgetName, settings.get("budget", "none"))


def record_changes(run: Path, started: RunRecord, now: RunRecord) -> RunRecord:
    """Writes the settings and the teacher of a resumed run into its config, and returns the new record."""
    # Every changed setting: an interrupted resume must not forget what it was asked for. Where the run is, and how it
    # was started, is not remembered. A teacher that was moved is looked for at its new place.
    changed = {name: value for name, value in now.settings.items() if name not in NOT_REMEMBERED}
    record = replace(started, settings=started.settings | changed, teacher=now.teacher)
    if record != started:
        write_run_config(run, record)
    return record


def add_note(run: Path, line: str) -> None:
    """Appends a line with the time to the run's `notes.log`."""
    # Written as a whole: an append that is killed halfway would leave half a line.
    path = run / NOTES
    content = path.read_bytes() if path.is_file() else b""
    write_atomically(path, content + f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())


def ensure_run_dir_exists(run: Path) -> None:
    """Raises FileNotFoundError if a run's folder was moved away while the run is in progress."""
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(errno.ENOENT, "moved or removed; resume it where it is now", str(run / CONFIG))


def resume_command(run: Path) -> str:
    """Returns the command that resumes an interrupted run; the one that was given if it has not started yet."""
    if (run / CONFIG).is_file():
        return f"policykd resume {shlex.quote(str(run))}"
    return shlex.join(sys.argv)


def load_run_teacher(args: TeacherArgs, started: RunRecord | None, game: str, seed: int) -> Teacher:
    """Returns the teacher of a run, or the ensemble; from the Hub, at the commit that a resumed run started with.

    `started` is the config of a resumed run; `seed` is that of the episodes that weigh an ensemble's members.
    """
    return load_teachers(
        pin_teacher_revision(args.teacher, started),
        args.teacher_weights,
        game=game,
        trust_pickle=args.trust_pickle,
        measure=lambda member: measured_return(member, game, seed=seed),
    )


def pin_teacher_revision(reference: str, started: RunRecord | None) -> str:
    """Returns a `--teacher` reference with the commit that a run was started with, if it means a teacher on the Hub."""
    if started is None or started.teacher is None or started.settings.get("teacher") != reference:
        return reference
    # The author of a repository may have pushed another agent since the run was started.
    teacher = started.teacher
    if teacher.algorithm == "ENSEMBLE":  # its reference contains each member's commit
        return teacher.ref
    return f"{teacher.ref}@{teacher.revision}" if teacher.revision else reference


def _changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value]


def _describe(teacher: TeacherRecord) -> str:
    return f"{teacher.algorithm} {teacher.ref} (sha256 {teacher.sha256[:12]})"


RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class RunResult(FinalEvaluation):
    """Costs and returns of student, teacher and random play, and what the run took."""

    num_states_labelled: int | None = None
    """states that the teacher has labelled; None in results that do not record it"""
    num_updates: int | None = None
    """gradient updates"""
    stop: Stop | None = None
    """why a run with a budget ended"""
    wall_seconds: dict[str, float] = field(default_factory=dict)
    """by phase: collect, label, train (which overlap), rounds (all of them), evaluate"""
    versions: dict[str, str] = field(default_factory=dict)
    """package -> version"""
    command: str = ""
    """command line that wrote the results"""

    @property
    def num_episodes(self) -> int:
        """Episodes of the student under every protocol."""
        return min(protocol.num_episodes for protocol in self.student.protocols.values())

    def summary(self) -> str:
        """Returns the table of `results.md`, and below it what the run took."""
        spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self.wall_seconds.items())
        counts = f"{self.num_states_labelled or 0:,} states, {self.num_updates or 0:,} updates"
        reason = f"{self.stop}\n\n" if self.stop else ""
        return f"{results_table(self)}\n\n{reason}{counts}; {spent}\n"


def load_results(run: Path) -> RunResult | None:
    """Returns the results of a run's folder, None if the run is not finished; raises BadFile if they are damaged."""
    path = run / RESULTS
    if not path.exists():
        return None
    return read_json(RunResult, path, next_step=f"remove it and resume with: policykd resume {run}")
