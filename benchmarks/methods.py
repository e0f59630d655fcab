"""Compares the methods on Pong at one budget, several seeds each: plays the cells, prints the table of docs/methods.md.

`python benchmarks/methods.py run --jobs 2`, `... held-out`, then `... table`; benchmarks/methods.sh does all three. A
cell is a method with a seed, one run of a script under runs/Pong/. A finished cell is skipped, one that was cut goes on
where it stopped; seed 0 of every method comes first, so that a table can be printed early.

Held-out states: a student of another size, distilled with another seed and in no row of the table, plays, and KL and
agreement of every cell are taken on its states.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policykd.agents.policy import sample
from policykd.agents.student import Student, load_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.cli.command import INTERRUPTED, prepare_device
from policykd.envs.atari import make_atari
from policykd.evaluation.evaluate import PROTOCOLS
from policykd.evaluation.statistics import RESAMPLES
from policykd.io.files import write_atomically
from policykd.legacy.losses import kl_divergence_B, log_policy

GAME = "Pong"
DISTIL, REINFORCE = "scripts/distill_atari.py", "scripts/distill_rl.py"

# The budget of a cell: 12,800 labelled states, 1,200 updates of 256, at twice the rate of the default, for it is small.
BUDGET = ["--rounds", "8", "--states-per-round", "1600", "--updates-per-round", "150", "--learning-rate", "4e-3"]
BUDGET += ["--eval-every", "0", "--loss", "forward-kl"]  # a method's own --loss counts instead
STEPS = ["--steps", "12800"]
JUDGED = ["--eval-episodes", "10", "--threads", "1"]


@dataclass(frozen=True)
class Table:
    """Methods that are compared with each other."""

    shared: list[str]
    """flags of every cell"""
    methods: dict[str, list[str]]
    """a method's name -> its own flags of distill_atari.py"""
    reinforcement: dict[str, list[str]]
    """the same of distill_rl.py"""


LOSSES = {
    "forward-kl": [],
    "reverse-kl": ["--loss", "reverse-kl"],
    "jensen-shannon": ["--loss", "jensen-shannon"],
    "two-sided-kl, T 2": ["--loss", "two-sided-kl", "--loss.temperature", "2"],
    "two-sided-kl, T 10": ["--loss", "two-sided-kl", "--loss.temperature", "10"],
    "soft-and-hard": ["--loss", "soft-and-hard"],
    "decoupled-kl": ["--loss", "decoupled-kl"],
    "standardised-kl": ["--loss", "standardised-kl"],
    "score-mse": ["--loss", "score-mse"],
    "score-huber": ["--loss", "score-huber"],
    "action-nll": ["--loss", "action-nll"],
}
DYNAMIC = {
    "two-sided-kl, T 4 to 1": ["--loss", "two-sided-kl", "--loss.temperature", "linear:4:1"],
    "two-sided-kl, T 10 to 1": ["--loss", "two-sided-kl", "--loss.temperature", "exponential:10:1"],
    "hard to soft": ["--loss", "soft-and-hard", "--loss.hard", "cosine:1:0"],
    "by entropy": ["--count-states-by", "entropy"],
    "by gap": ["--count-states-by", "gap"],
    "by disagreement": ["--count-states-by", "disagreement"],
}
STATES = {
    "teacher's states": ["--states", "teacher"],
    "teacher's, epsilon 0.05": ["--states", "teacher", "--states.epsilon", "0.05"],
    "student's states": ["--states", "student"],
    "student's, newest round": ["--states", "student", "--rounds-kept", "1"],
    "slow handover": ["--states", "mixed", "--states.student", "linear:0:1"],
    "blended": ["--states", "blended:{reference}", "--states-per-round", "800"],  # half live, half the reference's
}
BEYOND = {
    f"{name} {weight}": [f"--beyond.{name}", weight]
    for name, weight in {
        "value": "0.5",
        "hint": "0.5",
        "attention": "1",
        "similarity": "0.1",
        "relational": "0.5",
        "shift": "0.5",
    }.items()
}
RL = {
    "on-policy": ["--method", "on-policy"],
    "on-policy, reward": ["--method", "on-policy", "--reward-weight", "1"],
    "n-distill": ["--method", "n-distill"],
    "n-distill, reward": ["--method", "n-distill", "--reward-weight", "1"],
    "expected-entropy": ["--method", "expected-entropy"],
    "expected-entropy, reward": ["--method", "expected-entropy", "--reward-weight", "1"],
    "proximal": ["--method", "ppd"],
    "kickstarting": ["--method", "kickstarting"],
}
TABLES = {
    "ppo": Table(
        ["--game", GAME, "--teacher", "bundled:ppo", "--student", "1%"],
        LOSSES | DYNAMIC | STATES | BEYOND | {"with the DQN teacher": ["--teacher", "bundled:ppo+bundled:dqn"]},
        RL,
    ),
    "dqn": Table(
        ["--game", GAME, "--teacher", "bundled:dqn", "--student", "1%"],
        {
            **{
                f"forward-kl, T {t}": ["--loss", "forward-kl", "--loss.temperature", t]
                for t in ("1", "0.1", "0.01", "0.001")
            },
            "score-mse": ["--loss", "score-mse"],
            "action-nll": ["--loss", "action-nll"],
            "reverse-kl": ["--loss", "reverse-kl"],
            "jensen-shannon": ["--loss", "jensen-shannon"],
            "two-sided-kl, T 10": ["--loss", "two-sided-kl", "--loss.temperature", "10"],
        },
        {
            "qdagger": [
                "--method",
                "qdagger",
                "--steps",
                "3200",
                "--offline-steps",
                "12800",
                "--offline-updates",
                "9600",
            ]
        },
    ),
}

# What plays the held-out states: in no table.
REFERENCE = ["--student", "4%", "--eval-episodes", "1"]
REFERENCE_SEED = 1000
NUM_HELD_OUT, NUM_ENVS, EVERY = 4_000, 16, 8
"""states; games at once; agent steps of a game from one state that is kept to the next"""


@dataclass(frozen=True)
class Cell:
    """One run of a method."""

    teacher: str
    method: str
    seed: int
    script: str
    flags: list[str]
    folder: Path

    @property
    def name(self) -> str:
        """The run's."""
        words = "".join(c if c.isalnum() or c in "-." else " " for c in self.method).split()
        return f"methods-{self.teacher}-{'-'.join(words)}-seed{self.seed}"

    @property
    def run(self) -> Path:
        """Where its results are."""
        return self.folder / GAME / self.name

    @property
    def command(self) -> list[str]:
        """What is played, in the repository's folder."""
        where = ["--seed", str(self.seed), "--name", self.name, "--folder", str(self.folder), "--resume"]
        return [self.script, *where, *self.flags]


def cells(folder: Path, num_seeds: int, only: str = "") -> list[Cell]:
    """Returns the cells whose method or teacher holds the text `only`, in the order in which they are to be run."""
    found = []
    visited = str(reference(folder, "ppo").run)
    for seed in range(num_seeds):
        for teacher, table in TABLES.items():
            for method, flags in table.methods.items():
                own = [flag.replace("{reference}", visited) for flag in flags]
                found.append(Cell(teacher, method, seed, DISTIL, [*table.shared, *BUDGET, *JUDGED, *own], folder))
            for method, flags in table.reinforcement.items():
                every = [*table.shared, *STEPS, *JUDGED, *flags]
                found.append(Cell(teacher, method, seed, REINFORCE, every, folder))
    return [cell for cell in found if only in f"{cell.teacher}-{cell.method}"]


def reference(folder: Path, teacher: str) -> Cell:
    """Returns the run whose student plays a teacher's held-out states."""
    flags = [*TABLES[teacher].shared, *BUDGET, *JUDGED, *REFERENCE]
    return Cell(teacher, "reference", REFERENCE_SEED, DISTIL, flags, folder)


def results_of(cell: Cell) -> dict[str, Any] | None:
    """Returns what a finished cell's run wrote, or None; ValueError if it was another command."""
    file = cell.run / "results.json"
    if not file.is_file():
        return None
    results: dict[str, Any] = json.loads(file.read_text())
    made = shlex.split(results["command"])
    if made[1:] != cell.command[1:]:
        raise ValueError(f"{cell.run}: made by other flags ({shlex.join(made)}); remove it, or put its flags back")
    return results


class Runner:
    """Runs cells, some at once; those that are still running end with it."""

    def __init__(self) -> None:
        self.running, self.stopping = dict[int, Cell](), False

    def __call__(self, todo: Sequence[Cell], jobs: int) -> list[Cell]:
        """Returns the cells that failed."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failed = []
        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(self.run, cell): cell for cell in todo}
            try:
                for k, done in enumerate(as_completed(waiting), 1):
                    cell = waiting[done]
                    code, seconds = done.result()
                    if code == INTERRUPTED:
                        raise KeyboardInterrupt
                    if code:
                        failed.append(cell)
                    said = f"failed ({code}), see {log_of(cell)}" if code else f"{seconds:.0f} s"
                    print(f"{k}/{len(todo)} {cell.name}: {said}", flush=True)
            except KeyboardInterrupt:
                self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                for pid in list(self.running):
                    end(pid)
                print("interrupted: the same command goes on", file=sys.stderr)
                raise
        return failed

    def run(self, cell: Cell) -> tuple[int, float]:
        """Runs one cell in a process of its own; returns its exit code and the wall seconds, keeps the CPU's."""
        began = time.perf_counter()
        log_of(cell).parent.mkdir(parents=True, exist_ok=True)
        with log_of(cell).open("a") as log:
            process = subprocess.Popen(  # a session of its own: a Ctrl-C is handed on once, by us
                [sys.executable, *cell.command], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.running[process.pid] = cell
            if self.stopping:
                end(process.pid)
            _, status, used = os.wait4(process.pid, 0)  # with its emulators' processes
            del self.running[process.pid]
            process.returncode = os.waitstatus_to_exitcode(status)
        if cell.run.is_dir():
            spent = cpu_seconds(cell) + used.ru_utime + used.ru_stime
            write_atomically(cell.run / "cpu.json", f"{spent:.1f}\n".encode())
        return process.returncode, time.perf_counter() - began


def end(pid: int) -> None:
    """Asks a cell's process to save what it has and to end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def log_of(cell: Cell) -> Path:
    return cell.folder / GAME / "methods-logs" / f"{cell.name}.log"


def cpu_seconds(cell: Cell) -> float:
    """Returns the CPU time of a cell so far, its judgement and what was repeated after a cut in it."""
    file = cell.run / "cpu.json"
    return float(file.read_text()) if file.is_file() else 0.0


def held_out_file(folder: Path, teacher: str) -> Path:
    return folder / GAME / f"methods-held-out-{teacher}.npz"


@torch.inference_mode()
def visit(student: Student, seed: int) -> np.ndarray:
    """Returns stacks that a student's own sampled play comes by, `(NUM_HELD_OUT, 4, 84, 84)`, uint8."""
    envs, generator = make_atari(GAME, NUM_ENVS, seed), torch.Generator().manual_seed(seed)
    obs, kept = envs.reset(), list[torch.Tensor]()
    for step in range(NUM_HELD_OUT // NUM_ENVS * EVERY):
        if step % EVERY == EVERY - 1:
            kept.append(obs.clone())
        obs = envs.step(sample(student(obs), generator)).obs
    return torch.cat(kept).numpy()


def make_held_out(folder: Path, teacher: str) -> None:
    """Distils the reference student, unless it is there, and keeps states that it visits."""
    if held_out_file(folder, teacher).is_file():
        return
    cell = reference(folder, teacher)
    if results_of(cell) is None and Runner()([cell], 1):
        raise ValueError(f"no held-out states without the reference student; see {log_of(cell)}")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, obs=visit(load_student(cell.run), REFERENCE_SEED))
    write_atomically(held_out_file(folder, teacher), buffer.getvalue())


@dataclass(frozen=True)
class HeldOut:
    """Held-out states with a teacher's scores."""

    obs: torch.Tensor
    teacher_NA: torch.Tensor
    temperature: float

    @torch.inference_mode()
    def compare(self, student: Student) -> tuple[float, float]:
        """Returns KL(teacher || student) in nats, the teacher at its own temperature, and the agreement."""
        student_NA = torch.cat([student(obs) for obs in self.obs.split(500)])
        kl_N = kl_divergence_B(log_policy(self.teacher_NA, self.temperature), log_policy(student_NA))
        agree_N = self.teacher_NA.argmax(dim=1) == student_NA.argmax(dim=1)
        return float(kl_N.mean()), float(agree_N.float().mean())


def load_held_out(folder: Path, teacher: Teacher, name: str) -> HeldOut | None:
    file = held_out_file(folder, name)
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        obs = torch.from_numpy(arrays["obs"])
    return HeldOut(obs, torch.cat([teacher(part) for part in obs.split(500)]), teacher.temperature)


def resampled_means(groups: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    """Returns bootstrapped means: seeds drawn with replacement, then games within each (Davison & Hinkley, 1997, 3.8).

    Drawing games alone would hold the seeds fixed, and a method that was lucky with three of them would look sure.
    With three seeds it is still too sure: their means are printed beside it.
    """
    drawn = generator.integers(len(groups), size=(RESAMPLES, len(groups)))
    games = np.array([np.mean(generator.choice(g, (RESAMPLES, len(g))), axis=1) for g in groups])
    return np.asarray(np.take_along_axis(games.T, drawn, axis=1).mean(axis=1))


def played(groups: list[list[float]]) -> list[str]:
    """Returns mean and interval, each seed's mean, and distinct returns."""
    pooled = [x for g in groups for x in g]
    low, high = np.quantile(resampled_means(groups, np.random.default_rng(0)), [0.025, 0.975])
    seeds = ", ".join(f"{np.mean(g):.1f}" for g in groups)
    return [f"{np.mean(pooled):.2f} [{low:.2f}, {high:.2f}]", seeds, f"{len(set(pooled))} of {len(pooled)}"]


def spread(values: Sequence[float], form: str) -> str:
    """Returns the mean of the seeds, and the least and greatest where there are several."""
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def row(group: list[Cell], held_out: HeldOut | None) -> str:
    """Returns a method's line of the table; seeds that are not finished are counted."""
    finished = [(cell, found) for cell in group if (found := results_of(cell))]
    line = [group[0].method, f"{len(finished)} of {len(group)}"]
    if not finished:
        return "| " + " | ".join([*line, *["not finished"] + [""] * (NUM_COLUMNS - 3)]) + " |"
    compared = [held_out.compare(load_student(cell.run)) for cell, _ in finished] if held_out else []
    line += (
        [spread([kl for kl, _ in compared], ".3f"), spread([a for _, a in compared], ".1%")] if compared else ["", ""]
    )
    for protocol in PROTOCOLS:
        line += played([r["student"]["protocols"][protocol]["returns"] for _, r in finished])
    wall = [r["wall_seconds"].get("rounds", r["wall_seconds"].get("learn", 0.0)) for _, r in finished]
    line += [f"{np.mean(wall):.0f} s", f"{np.mean([cpu_seconds(cell) for cell, _ in finished]):.0f} s"]
    first = finished[0][1]
    line += [f"{first[key]:,}" for key in ("num_states_labelled", "num_updates")]
    return "| " + " | ".join(line) + " |"


def teacher_row(results: dict[str, Any]) -> str:
    """Returns the teacher's line."""
    line = ["**teacher**", "", "0", "100%"]
    for protocol in PROTOCOLS:
        line += played([results["teacher"]["protocols"][protocol]["returns"]])
    return "| " + " | ".join([*line, *[""] * (NUM_COLUMNS - len(line))]) + " |"


HEADER = (
    "| method | seeds | KL, nats | agreement"
    + "".join(f" | {p} | each seed | distinct" for p in ("no-op starts, sampled", "sticky 0.25, greedy"))
    + " | learning, wall | whole cell, CPU | states | updates |\n|---|---:|---:|---:"
    + "|---:|---|---:" * 2
    + "|---:|---:|---:|---:|"
)
NUM_COLUMNS = 14


def table(folder: Path, num_seeds: int, only: str) -> str:
    """Returns the tables as Markdown, methods that are not finished among them."""
    lines = []
    for name in TABLES:
        groups: dict[str, list[Cell]] = {}
        for cell in cells(folder, num_seeds, only):
            if cell.teacher == name:
                groups.setdefault(cell.method, []).append(cell)
        finished = [found for group in groups.values() for cell in group if (found := results_of(cell))]
        if not finished:
            continue
        held_out = load_held_out(folder, load_teacher(f"bundled:{name}", game=GAME), name)
        lines += [f"\n{name.upper()} teacher\n", HEADER, teacher_row(finished[0])]
        lines += [row(group, held_out) for group in groups.values()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["list", "run", "held-out", "table"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose TEACHER-METHOD holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, a core each")
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    args = parser.parse_args()
    prepare_device("cpu", 1)
    wanted = cells(args.folder, args.seeds, args.only)
    if args.do == "table":
        print(table(args.folder, args.seeds, args.only))
    elif args.do == "held-out":
        for name in {cell.teacher: None for cell in wanted}:
            make_held_out(args.folder, name)
    else:
        todo = [cell for cell in wanted if results_of(cell) is None]
        print(f"{len(wanted) - len(todo)} of {len(wanted)} cells are finished", flush=True)
        if args.do == "list":
            print("\n".join(shlex.join(cell.command) for cell in todo))
        elif failed := Runner()(todo, args.jobs):
            sys.exit(f"failed: {', '.join(cell.name for cell in failed)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
