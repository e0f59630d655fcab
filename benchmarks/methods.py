"""Compares distillation methods on Pong with one budget and several seeds, for the tables of docs/methods.md.

`python benchmarks/methods.py run --jobs 2`, `... held-out`, then `... table`; benchmarks/methods.sh does all three. A
cell is a method with a seed: one run under runs/Pong/. Finished cells are skipped and interrupted ones resumed. Seed 0
of every method comes first, so that a table can be printed early.

Held-out states: a student of another size, distilled with another seed and in no row of the table, plays, and KL and
agreement of every cell are measured on its states.
"""

import io
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from policykd.agents.policy import log_policy
from policykd.agents.student import Student, load_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.evaluation.evaluate import PROTOCOLS
from policykd.evaluation.real_states import on_policy_states
from policykd.evaluation.results import PolicyResult
from policykd.evaluation.statistics import RESAMPLES
from policykd.io.files import write_atomically
from policykd.io.machine import prepare_device
from policykd.losses import kl_divergence_B
from policykd.runs.folder import RunResult, load_results

GAME = "Pong"
Command = Literal["distill", "distill-rl"]

SHARED = f"--game {GAME} --student 1% --eval-episodes 10 --threads 1"
# 12,800 labelled states and 1,200 updates of 256. The learning rate is twice the default, because the budget is small.
DISTILL = (
    "--rounds 8 --states-per-round 1600 --updates-per-round 150 --batch-size 256 --optimizer adam"
    " --learning-rate warmup-cosine:4e-3 --eval-every 0"
)
BUDGETS: dict[Command, str] = {"distill": DISTILL, "distill-rl": "--steps 12800 --eval-every 0"}

LOSSES = {
    "forward-kl": "",
    "reverse-kl": "--loss reverse-kl",
    "jensen-shannon": "--loss jensen-shannon",
    "two-sided-kl, T 2": "--loss two-sided-kl --loss.temperature 2",
    "two-sided-kl, T 10": "--loss two-sided-kl --loss.temperature 10",
    "soft-and-hard": "--loss soft-and-hard",
    "decoupled-kl": "--loss decoupled-kl",
    "standardized-kl": "--loss standardized-kl",
    "logit-mse": "--loss logit-mse",
    "logit-huber": "--loss logit-huber",
    "action-nll": "--loss action-nll",
}
SCHEDULES = {
    "two-sided-kl, T 4 to 1": "--loss two-sided-kl --loss.temperature linear:4:1",
    "two-sided-kl, T 10 to 1": "--loss two-sided-kl --loss.temperature exponential:10:1",
    "hard to soft": "--loss soft-and-hard --loss.hard cosine:1:0",
}
WEIGHTS = {f"by {name}": f"--state-weighting {name}" for name in ("entropy", "gap", "disagreement")}
STATES = {
    "teacher's states": "--states teacher",
    "teacher's, epsilon 0.05": "--states teacher --states.epsilon 0.05",
    "student's states": "--states student",
    "student's, newest round": "--states student --replay-window-rounds 1",
    "slow handover": "--states mixed --states.student linear:0:1",
    # Half of each batch is live, half are the states of the reference run.
    "blended": "--states blended:{reference} --states-per-round 800",
}
AUXILIARY = {
    "value 0.5": "--auxiliary.value 0.5",
    "hint 0.5": "--auxiliary.hint 0.5",
    "attention 1": "--auxiliary.attention 1",
    "similarity 0.1": "--auxiliary.similarity 0.1",
    "relational 0.5": "--auxiliary.relational 0.5",
    "shift 0.5": "--auxiliary.shift 0.5",
}
ENSEMBLE = {"with the DQN teacher": "--teacher bundled:ppo+bundled:dqn"}
RL = {
    "on-policy": "--method on-policy",
    "on-policy, reward": "--method on-policy --reward-weight 1",
    "n-distill": "--method n-distill",
    "n-distill, reward": "--method n-distill --reward-weight 1",
    "expected-entropy": "--method expected-entropy",
    "expected-entropy, reward": "--method expected-entropy --reward-weight 1",
    "proximal": "--method ppd",
    "kickstarting": "--method kickstarting",
}
DQN_LOSSES = {f"forward-kl, T {t}": f"--loss forward-kl --loss.temperature {t}" for t in ("1", "0.1", "0.01", "0.001")}
for _name in ("logit-mse", "action-nll", "reverse-kl", "jensen-shannon", "two-sided-kl, T 10"):
    DQN_LOSSES[_name] = LOSSES[_name]
QDAGGER = {"qdagger": "--method qdagger --steps 3200 --offline-steps 12800 --offline-updates 9600"}

TABLES: dict[str, dict[Command, dict[str, str]]] = {
    "ppo": {"distill": LOSSES | SCHEDULES | WEIGHTS | STATES | AUXILIARY | ENSEMBLE, "distill-rl": RL},
    "dqn": {"distill": DQN_LOSSES, "distill-rl": QDAGGER},
}
"""teacher -> command -> method -> its own flags"""

REFERENCE_SEED = 1000
NUM_HELD_OUT = 4_000


@dataclass(frozen=True)
class Cell:
    """One run of a method."""

    teacher: str
    command: Command
    method: str
    flags: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        words = "".join(c if c.isalnum() or c in "-." else " " for c in self.method).split()
        return f"methods-{self.teacher}-{'-'.join(words)}-seed{self.seed}"

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.folder / GAME / self.name

    @property
    def arguments(self) -> list[str]:
        """Command line after `policykd`; a later flag overrides an earlier one."""
        where = ["--seed", str(self.seed), "--name", self.name, "--folder", str(self.folder), "--resume"]
        shared = f"{SHARED} --teacher bundled:{self.teacher} {BUDGETS[self.command]}".split()
        own = self.flags.format(reference=reference(self.folder, "ppo").run).split()
        return [self.command, *where, *shared, *own]

    def results(self) -> RunResult | None:
        """Returns the results of a finished cell, or None.

        Raises:
            ValueError: the run was made with other flags.
        """
        results = load_results(self.run)
        if results is None:
            return None
        made = shlex.split(results.command)
        if made[-len(self.arguments) + 1 :] != self.arguments[1:]:
            raise ValueError(f"{self.run}: made with other flags ({results.command}); remove it or restore them")
        return results

    def execute(self) -> int:
        """Runs or resumes the cell in a process of its own; returns its exit code and adds up its CPU time."""
        log = self.folder / GAME / "methods-logs" / f"{self.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with log.open("a") as file:
            command = [sys.executable, "-m", "policykd", *self.arguments]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)  # counts the emulators' processes too
            process.returncode = os.waitstatus_to_exitcode(status)
        if self.run.is_dir():
            seconds = self.cpu_seconds() + used.ru_utime + used.ru_stime
            write_atomically(self.run / "cpu.json", f"{seconds:.1f}\n".encode())
        outcome = f"failed, see {log}" if process.returncode else f"{time.perf_counter() - began:.0f} s"
        print(f"{self.name}: {outcome}", flush=True)
        return process.returncode

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the cell so far, its evaluation and repeated rounds included."""
        file = self.run / "cpu.json"
        return float(file.read_text()) if file.is_file() else 0.0


def reference(folder: Path, teacher: str) -> Cell:
    """Returns the run whose student plays a teacher's held-out states."""
    return Cell(teacher, "distill", "reference", "--student 4% --eval-episodes 1", REFERENCE_SEED, folder)


def cells(folder: Path, num_seeds: int, only: str = "") -> list[Cell]:
    """Returns the cells whose TEACHER-METHOD contains the text `only`, in the order in which they are run."""
    found = []
    for seed in range(num_seeds):
        for teacher, commands in TABLES.items():
            for command, methods in commands.items():
                found += [Cell(teacher, command, method, flags, seed, folder) for method, flags in methods.items()]
    return [cell for cell in found if only in f"{cell.teacher}-{cell.method}"]


def run_cells(todo: Sequence[Cell], jobs: int) -> list[Cell]:
    """Runs cells, several at once, and returns those that failed. A Ctrl-C reaches the running cells too."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(Cell.execute, todo))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return [cell for cell, code in zip(todo, codes, strict=True) if code]


def held_out_file(folder: Path, teacher: str) -> Path:
    """Returns the file of a teacher's held-out states."""
    return folder / GAME / f"methods-held-out-{teacher}.npz"


def make_held_out(folder: Path, teacher: str) -> None:
    """Distils the reference student and stores states that it visits, unless they are there."""
    path = held_out_file(folder, teacher)
    if path.is_file():
        return
    cell = reference(folder, teacher)
    if cell.results() is None and cell.execute():
        raise ValueError(f"no held-out states: {cell.name} failed")
    states = on_policy_states(load_student(cell.run), GAME, NUM_HELD_OUT, seed=REFERENCE_SEED)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, obs=states.numpy())
    write_atomically(path, buffer.getvalue())


@dataclass(frozen=True)
class HeldOut:
    """Held-out states, uint8 `(N, 4, 84, 84)`, with a teacher's outputs, float32 `(N, num_actions)`."""

    obs: torch.Tensor
    teacher_NA: torch.Tensor
    temperature: float

    @torch.inference_mode()
    def measure(self, student: Student) -> tuple[float, float]:
        """Returns KL(teacher || student) in nats and the fraction of equal greedy actions."""
        student_NA = torch.cat([student(obs) for obs in self.obs.split(500)])
        kl_N = kl_divergence_B(log_policy(self.teacher_NA, self.temperature), log_policy(student_NA))
        agree_N = self.teacher_NA.argmax(dim=1) == student_NA.argmax(dim=1)
        return float(kl_N.mean()), float(agree_N.float().mean())


def load_held_out(path: Path, teacher: Teacher) -> HeldOut | None:
    """Returns the held-out states of a teacher, or None if there are none."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        obs = torch.from_numpy(arrays["obs"])
    return HeldOut(obs, torch.cat([teacher(part) for part in obs.split(500)]), teacher.temperature)


def resampled_means(groups: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    """Returns bootstrapped means: seeds drawn with replacement, then games within each (Davison & Hinkley, 1997, 3.8).

    Resampling games alone would hold the seeds fixed, and a method that was lucky with three seeds would look certain.
    With three seeds the interval is still too narrow, so the table has each seed's mean.
    """
    drawn = generator.integers(len(groups), size=(RESAMPLES, len(groups)))
    games = np.array([np.mean(generator.choice(g, (RESAMPLES, len(g))), axis=1) for g in groups])
    return np.asarray(np.take_along_axis(games.T, drawn, axis=1).mean(axis=1))


HEADER = (
    "| method | seeds | KL, nats | agreement"
    + "".join(f" | {p} | each seed | distinct" for p in ("no-op starts, sampled", "sticky 0.25, greedy"))
    + " | learning, wall | whole cell, CPU | states | updates |\n|---|---:|---:|---:"
    + "|---:|---|---:" * 2
    + "|---:|---:|---:|---:|"
)
NUM_COLUMNS = 14


def table(folder: Path, num_seeds: int, only: str = "") -> str:
    """Returns the tables as Markdown, with the methods that are not finished."""
    lines = []
    for name in TABLES:
        groups: dict[str, list[Cell]] = {}
        for cell in cells(folder, num_seeds, only):
            if cell.teacher == name:
                groups.setdefault(cell.method, []).append(cell)
        finished = [results for group in groups.values() for cell in group if (results := cell.results())]
        if finished:
            held_out = load_held_out(held_out_file(folder, name), load_teacher(f"bundled:{name}", game=GAME))
            teacher = ["**teacher**", "", "0", "100%", *_return_cells([finished[0].teacher])]
            lines += [f"\n{name.upper()} teacher\n", HEADER, _line(teacher)]
            lines += [_line(_method_cells(group, held_out)) for group in groups.values()]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    padding = [""] * (NUM_COLUMNS - len(cells))
    return "| " + " | ".join([*cells, *padding]) + " |"


def _method_cells(group: Sequence[Cell], held_out: HeldOut | None) -> list[str]:
    """Returns a method's cells of the table; seeds that are not finished are counted."""
    finished = [(cell, results) for cell in group if (results := cell.results())]
    found = [group[0].method, f"{len(finished)} of {len(group)}"]
    if not finished:
        return [*found, "not finished"]
    measured = [held_out.measure(load_student(cell.run)) for cell, _ in finished] if held_out else []
    found += [_spread([kl for kl, _ in measured], ".3f"), _spread([agreement for _, agreement in measured], ".1%")]
    found += _return_cells([results.student for _, results in finished])
    seconds = [results.wall_seconds.get("rounds", results.wall_seconds.get("learn", 0.0)) for _, results in finished]
    found += [f"{np.mean(seconds):.0f} s", f"{np.mean([cell.cpu_seconds() for cell, _ in finished]):.0f} s"]
    first = finished[0][1]
    return [*found, f"{first.num_states_labelled or 0:,}", f"{first.num_updates or 0:,}"]


def _return_cells(seeds: Sequence[PolicyResult]) -> list[str]:
    """Returns, for each protocol, the mean return with its interval, each seed's mean, and distinct returns."""
    found = []
    for protocol in PROTOCOLS:
        groups = [seed.protocols[protocol].returns for seed in seeds]
        pooled = [x for group in groups for x in group]
        low, high = np.quantile(resampled_means(groups, np.random.default_rng(0)), [0.025, 0.975])
        means = ", ".join(f"{np.mean(group):.1f}" for group in groups)
        found += [f"{np.mean(pooled):.2f} [{low:.2f}, {high:.2f}]", means, f"{len(set(pooled))} of {len(pooled)}"]
    return found


def _spread(values: Sequence[float], form: str) -> str:
    """Returns the mean of the seeds, with minimum and maximum if there are several."""
    if not values:
        return ""
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


@dataclass(frozen=True)
class Args:
    """Compares distillation methods on Pong; see the top of this file."""

    do: Annotated[Literal["list", "run", "held-out", "table"], tyro.conf.Positional]
    seeds: int = 3
    """seeds per method"""
    only: str = ""
    """text that the TEACHER-METHOD of a cell must contain"""
    jobs: int = 1
    """cells at once, one core each"""
    folder: Path = Path("runs")
    """folder that holds all runs"""


def main(args: Args) -> None:
    """Lists, runs or tabulates the cells.

    Raises:
        ValueError: a cell failed, or was made with other flags.
    """
    prepare_device("cpu", 1)
    chosen = cells(args.folder, args.seeds, args.only)
    if args.do == "table":
        print(table(args.folder, args.seeds, args.only))
        return
    if args.do == "held-out":
        for name in dict.fromkeys(cell.teacher for cell in chosen):
            make_held_out(args.folder, name)
        return
    todo = [cell for cell in chosen if cell.results() is None]
    print(f"{len(chosen) - len(todo)} of {len(chosen)} cells are finished", flush=True)
    if args.do == "list":
        print("\n".join(shlex.join(["policykd", *cell.arguments]) for cell in todo))
    elif failed := run_cells(todo, args.jobs):
        raise ValueError(f"failed: {', '.join(cell.name for cell in failed)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except ValueError as error:
        sys.exit(f"error: {error}")
