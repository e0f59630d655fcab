"""Measures each stage next to its limit, in one run: `python benchmarks/stages.py [--json FILE]` (or `make benchmark`).

Rates of computing are per second of CPU time of one thread, so that they are per core and hardly change when other
programs use the machine. A stage and its limit are measured in turns, and the share is the median over those pairs.
Times are wall-clock times. A few minutes; the goals are those of an idle AVX2 machine.
"""

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ale_py
import torch
import tyro
from ale_py import roms
from labelled_states import labelled_states
from torch import Tensor

from policykd.agents.networks import ConvNet, num_macs
from policykd.agents.policy import Policy
from policykd.agents.student import Size, make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import rom_id
from policykd.export.compiled import compile_policy
from policykd.io.machine import prepare_device, versions
from policykd.io.typed import write_json
from policykd.loop import DistillConfig, distill
from policykd.replay import DrawRange, Replay
from policykd.runs.folder import load_results
from policykd.states import DatasetStates
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.train_state import TrainState, make_train_state

MATRIX = 768
"""rows and columns of the matrices whose product is the limit of all networks"""


@dataclass(frozen=True)
class Args:
    """Measures the stages of distillation next to their limits."""

    game: str = "Pong"
    """a game with a bundled teacher"""
    games: tuple[str, ...] = ("Pong", "Breakout", "Seaquest")
    """games whose collection is measured"""
    num_states: int = 4096
    """stored states for training and resuming"""
    repetitions: int = 5
    """measurements per stage, of which the table has the median"""
    json: Path | None = None
    """write the table to this file too"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    values: tuple[float, ...]
    unit: str
    limits: tuple[float, ...] = ()
    """what the hardware could do, measured next to each value"""
    goal: str = ""

    def __str__(self) -> str:
        """Returns the line as Markdown."""
        median = statistics.median(self.values)
        best = max(self.values) if self.unit.endswith("/s") else min(self.values)
        number = ",.0f" if median >= 100 else ".3g"
        limit = ""
        share = ""
        if self.limits:
            limit = f"{statistics.median(self.limits):{number}}"
            ratios = [value / x for value, x in zip(self.values, self.limits, strict=True)]
            share = f"{statistics.median(ratios):.0%}"
        cells = [self.stage, f"{median:{number}}", f"{best:{number}}", self.unit, limit, share, self.goal]
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Table:
    """Content of the file that --json writes."""

    machine: str
    loads: list[float]
    """load of the machine at the beginning and the end"""
    versions: dict[str, str] = field(default_factory=versions)
    rows: list[Row] = field(default_factory=list)


def seconds(work: Callable[[], object]) -> float:
    """Returns the wall-clock duration of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rates_in_turns(works: Sequence[Callable[[], float]], repetitions: int) -> list[tuple[float, ...]]:
    """Returns what each work does per second of CPU time, for every repetition after one that is not counted."""
    rates: list[list[float]] = [[] for _ in works]
    for _ in range(repetitions + 1):
        for work, of_work in zip(works, rates, strict=True):
            began = time.process_time()
            amount = work()
            of_work.append(amount / (time.process_time() - began))
    return [tuple(of_work[1:]) for of_work in rates]


def collection(game: str, repetitions: int) -> list[Row]:
    """Returns the steps of 16 games next to four frames of the bare emulator, whose screen is not read."""
    ale = ale_py.ALEInterface()
    rom = roms.get_rom_path(rom_id(game))
    assert rom is not None
    ale.loadROM(rom)
    legal = ale.getMinimalActionSet()
    generator = torch.Generator().manual_seed(0)
    envs = make_atari(game, 16, seed=0)
    envs.reset()

    def emulate() -> int:
        for action in torch.randint(len(legal), (600,), generator=generator).tolist():
            for _ in range(4):
                ale.act(legal[action])
            if ale.game_over():
                ale.reset_game()
        return 600

    def collect() -> int:
        for actions_B in torch.randint(envs.num_actions, (50, 16), generator=generator):
            envs.step(actions_B)
        return 800

    ours, limit = rates_in_turns([collect, emulate], repetitions)
    return [Row(f"collect {game}, SB3's exact pixels", ours, "steps/s", limit, "75%")]


def train_state(game: str, size: Size, replay: Replay, config: DistillConfig) -> TrainState:
    """Returns a run's state at its start, with stored states."""
    student = make_student(size, replay.teacher_NA.shape[1])
    return make_train_state(student, make_atari(game, 16, seed=0), config, replay=replay)


@dataclass(frozen=True)
class Work:
    """Work of a network, with its arithmetic."""

    stage: str
    run: Callable[[], float]
    """returns the number of states"""
    num_macs: float
    """multiply-accumulates per state"""
    goal: str


def labelling(teacher: Teacher, obs: Tensor) -> list[Work]:
    """Returns the teacher's forward passes, in torch and in ONNX Runtime."""

    def label(policy: Policy, batch_size: int) -> int:
        for obs_B in obs.split(batch_size):
            policy(obs_B)
        return len(obs)

    assert isinstance(teacher.net, ConvNet)
    num = num_macs(teacher.net, teacher.obs_shape)
    compiled = compile_policy(teacher, obs)
    policies = [("ONNX Runtime", compiled, "85%")] if compiled is not teacher else []
    return [
        Work(f"label, {name}, {size} at a time", partial(label, policy, size), num, goal)
        for name, policy, goal in [*policies, ("torch", teacher, "")]
        for size in (16, 256)
    ]


def training(args: Args, teacher: Teacher, replay: Replay, size: Size, goal: str) -> Work:
    """Returns rounds of 8 updates by the loop itself, on stored states."""
    config = DistillConfig(
        rounds=args.repetitions + 2, updates_per_round=8, learning_rate=1e-3, states=DatasetStates(Path())
    )
    state = train_state(args.game, size, replay, config)
    rounds = distill(teacher, state.student, state.envs, config, state=state)
    # The backward pass costs twice the forward pass, without the gradient of the pixels.
    of_pixels = 20 * 20 * state.student.get_parameter("net.conv1.weight").numel()
    num = 3 * num_macs(state.student, teacher.obs_shape) - of_pixels
    return Work(f"train {size} student, 256 at a time", lambda: 8 * 256 if next(rounds) else 0, num, goal)


def networks(args: Args, teacher: Teacher, replay: Replay) -> list[Row]:
    """Returns labelling and training next to the matrix product, and what gathering a batch's stacks costs."""
    a = torch.randn(MATRIX, MATRIX)
    b = torch.randn(MATRIX, MATRIX)
    drawn = DrawRange(0, len(replay) - replay.num_held_out)
    generator = torch.Generator().manual_seed(0)

    def matmul() -> float:
        for _ in range(30):
            torch.mm(a, b)
        return 30.0 * MATRIX**3

    def gather() -> int:
        for rows_B in replay.batches(20, 256, drawn, generator):
            replay.gather(rows_B)
        return 20 * 256

    trainings = [training(args, teacher, replay, "7%", "55%"), training(args, teacher, replay, "1%", "")]
    works = [*labelling(teacher, replay.gather(torch.arange(256))), *trainings]
    matmuls, gathers, *rates = rates_in_turns([matmul, gather, *(work.run for work in works)], args.repetitions)
    rows = [Row(f"matrix product, {MATRIX} cubed", tuple(m / 1e9 for m in matmuls), "GMAC/s")]
    for work, rate in zip(works, rates, strict=True):
        rows.append(Row(work.stage, rate, "states/s", tuple(m / work.num_macs for m in matmuls), work.goal))
    for work, rate in zip(trainings, rates[-2:], strict=True):
        share = tuple(100 * trained / gathered for trained, gathered in zip(rate, gathers, strict=True))
        rows.append(Row(f"gather stacks to {work.stage}", share, "% of it", goal="2"))
    arrays = (replay.frames, replay.num_past_frames_N, replay.teacher_NA)
    num_bytes = sum(tensor.nbytes for tensor in arrays) / replay.capacity
    return [*rows, Row("a stored state", (num_bytes,), "bytes", goal="7,200")]


def storage(args: Args, teacher: Teacher, folder: Path) -> list[Row]:
    """Returns the durations of a checkpoint and of a resumption, in the file system of `folder`."""
    config = DistillConfig(rounds=1, states_per_round=args.num_states)

    def new_state(replay: Replay | None = None) -> TrainState:
        student = make_student("25%", teacher.num_actions)
        return make_train_state(student, make_atari(args.game, 16, seed=0), config, replay=replay)

    def save() -> None:
        state.round += 1
        save_checkpoint(state, folder / "run")

    def write() -> None:
        with (folder / "plain").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def resume() -> None:
        restored = new_state()
        restore_checkpoint(restored, folder / "run")
        restored.envs.step(torch.zeros(16, dtype=torch.int64))

    state = new_state(labelled_states(args.game, teacher, args.num_states, 0, teacher_plays=False))
    # The first checkpoint writes the states; those that are timed write weights and moments alone.
    save()
    content = os.urandom(3 * 4 * sum(parameter.numel() for parameter in state.student.parameters()))
    pairs = [(1e3 * seconds(save), 1e3 * seconds(write)) for _ in range(2 * args.repetitions)]
    saves, writes = zip(*pairs, strict=True)
    resumed = tuple(seconds(resume) for _ in range(args.repetitions))
    return [
        Row("save a checkpoint of the 25% student, next to a write and fsync", saves, "ms", writes, "30 ms"),
        Row(f"resume, {args.num_states:,} states, to the first step", resumed, "s", goal="1 s"),
    ]


def startup(repetitions: int) -> list[Row]:
    """Returns how long an import and a help text take."""
    commands = {
        "import policykd and torch": ["-c", "import policykd; policykd.load_student, policykd.make_env"],
        "policykd distill --help": ["-m", "policykd", "distill", "--help"],
    }
    rows = []
    for name, words in commands.items():
        run = partial(subprocess.run, [sys.executable, *words], check=True, capture_output=True)
        rows.append(Row(name, tuple(seconds(run) for _ in range(repetitions)), "s", goal="3 s"))
    return rows


def end_to_end(game: str) -> list[Row]:
    """Returns how busy a short run keeps the cores, start-up and final evaluation included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        flags = "--rounds 5 --states-per-round 2000 --updates-per-round 175 --eval-every 0 --eval-episodes 1"
        command = [sys.executable, "-m", "policykd", "distill", "--game", game, *flags.split()]
        command += ["--folder", folder, "--name", "run"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = seconds(partial(subprocess.run, command, check=True, capture_output=True))
        results = load_results(next(Path(folder).glob("*/run")))
    assert results is not None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        Row("a run of 5 small rounds, start to end", (wall,), "s"),
        Row(f"  CPU time of {cores} cores", (100 * cpu / (cores * wall),), "% of it", goal="90"),
        Row("  states collected, labelled and trained on", ((results.num_states_labelled or 0) / wall,), "states/s"),
        *(Row(f"  {phase}", (duration,), "s") for phase, duration in results.wall_seconds.items()),
    ]


def machine() -> str:
    """Returns the CPU with the instruction sets that matter here."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        first = info.read_text().split("\n\n")[0]
        fields = dict(line.split("\t", 1) for line in first.splitlines() if "\t" in line)
        model = fields["model name"].strip("\t: ")
        flags = set(fields["flags"].split())
    known = [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{model} ({' '.join(known) or 'flags unknown'}), {os.cpu_count()} cores"


def main(args: Args) -> None:
    """Prints the table, a row as soon as it is measured."""
    prepare_device("cpu", 1)
    table = Table(machine(), [os.getloadavg()[0]])
    teacher = load_teacher(game=args.game)
    replay = labelled_states(args.game, teacher, args.num_states, 0, teacher_plays=False)
    replay.num_held_out = 16
    of_packages = ", ".join(" ".join(pair) for pair in table.versions.items())
    print(f"{table.machine}, one thread, load {table.loads[0]:.1f}; {of_packages}\n")
    print("| stage | median | best | | limit | share | goal |\n|---|---:|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as folder:
        stages: list[Callable[[], list[Row]]] = [
            *(partial(collection, game, args.repetitions) for game in args.games),
            partial(networks, args, teacher, replay),
            partial(storage, args, teacher, Path(folder)),
            partial(startup, args.repetitions),
            partial(end_to_end, args.game),
        ]
        for measure in stages:
            for row in measure():
                table.rows.append(row)
                print(row, flush=True)
    table.loads.append(os.getloadavg()[0])
    print(f"\nload {table.loads[1]:.1f} at the end; medians of {args.repetitions}, the run of one")
    if args.json:
        write_json(args.json, table)


if __name__ == "__main__":
    main(tyro.cli(Args))
