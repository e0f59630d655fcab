"""Measures each stage beside its limit, in one run: `python benchmarks/stages.py [--json FILE]` (or `make benchmark`).

Rates of computing are per second of CPU time of one thread, so that they are per core and hardly change when others
use the machine; a work and its limit are measured in turn, and the share is the median over those pairs. Times are wall
times. A few minutes; the goals are an idle AVX2 machine's.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import ale_py
import torch
from ale_py import roms
from torch import Tensor

from policykd.agents.networks import ConvNet, num_macs
from policykd.agents.student import Size, make_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.cli.command import prepare_device, versions
from policykd.envs.atari import make_atari
from policykd.envs.games import rom_id
from policykd.export.compiled import compile_policy
from policykd.legacy.loop import distill
from policykd.legacy.losses import ForwardKL
from policykd.legacy.replay import Replay
from policykd.legacy.schedules import WarmupCosine
from policykd.legacy.states import MixedStates
from policykd.legacy.train_state import Learner, make_learner
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.storage.generations import commit, last
from policykd.storage.manifest import Manifest

REPETITIONS = 5
MATRIX = 768  # rows and columns; their product is the limit of all networks


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    values: list[float]
    unit: str
    limits: list[float] | None = None
    """what the hardware could do, measured beside each value"""
    goal: str = ""

    def __str__(self) -> str:
        median, limit, share = statistics.median(self.values), "", ""
        best = (max if self.unit.endswith("/s") else min)(self.values)
        number = ",.0f" if median >= 100 else ".3g"
        if self.limits:
            limit = f"{statistics.median(self.limits):{number}}"
            share = f"{statistics.median(v / x for v, x in zip(self.values, self.limits, strict=True)):.0%}"
        cells = [self.stage, f"{median:{number}}", f"{best:{number}}", self.unit, limit, share, self.goal]
        return f"| {' | '.join(cells)} |"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(*works: Callable[[], float]) -> list[list[float]]:
    """Returns what each work does in a second of CPU time, every repetition after one that is not counted."""
    rates = list[list[float]]([] for _ in works)
    for _ in range(REPETITIONS + 1):
        for work, of_work in zip(works, rates, strict=True):
            began = time.process_time()
            of_work.append(work() / (time.process_time() - began))
    return [of_work[1:] for of_work in rates]


def collection(game: str) -> list[Row]:
    """Returns steps of 16 games beside four frames of the bare emulator, whose screen nobody looks at."""
    ale, rom = ale_py.ALEInterface(), roms.get_rom_path(rom_id(game))
    assert rom is not None
    ale.loadROM(rom)
    legal = ale.getMinimalActionSet()
    generator = torch.Generator().manual_seed(0)
    envs = make_atari(game, 16, seed=0)
    envs.reset()

    def raw() -> int:
        for action in torch.randint(len(legal), (600,), generator=generator).tolist():
            for _ in range(4):
                ale.act(legal[action])
            if ale.game_over():
                ale.reset_game()
        return 600

    def exact() -> int:
        for actions_B in torch.randint(envs.num_actions, (50, 16), generator=generator):
            envs.step(actions_B)
        return 800

    ours, limit = in_turn(exact, raw)
    return [Row(f"collect {game}, SB3's exact pixels", ours, "steps/s", limit, "75%")]


def collected(game: str, teacher: Teacher, num_states: int) -> Replay:
    """Returns states of random play with the teacher's scores, the last few held out."""
    envs, generator = make_atari(game, 16, seed=0), torch.Generator().manual_seed(0)
    replay = Replay(num_states, 16, envs.num_actions, envs.obs_shape, stack=4, dtype=torch.uint8)
    obs, starts_B = envs.reset(), torch.ones(16, dtype=torch.bool)
    while len(replay) < num_states:
        replay.add(obs, starts_B, teacher(obs))
        step = envs.step(torch.randint(envs.num_actions, (16,), generator=generator))
        obs, starts_B = step.obs, step.starts_B
    replay.num_held_out = 16
    return replay


def fresh_learner(game: str, size: Size, replay: Replay) -> Learner:
    student = make_student(size, replay.scores_NA.shape[1])
    return make_learner(student, make_atari(game, 16, seed=0), seed=0, replay=replay)


@dataclass(frozen=True)
class Work:
    """Something to be done with a network, and how much arithmetic it is."""

    stage: str
    run: Callable[[], float]
    """returns the number of states"""
    num_macs: float
    """for one of them"""
    goal: str


def labelling(teacher: Teacher, obs: Tensor) -> list[Work]:
    def label(policy: Teacher, batch_size: int) -> int:
        for obs_B in obs.split(batch_size):
            policy(obs_B)
        return len(obs)

    assert isinstance(teacher.net, ConvNet)
    num, compiled = num_macs(teacher.net, teacher.obs_shape), compile_policy(teacher, obs)
    policies = [(compiled, "85%"), (teacher, "")] if compiled is not teacher else [(teacher, "")]
    return [
        Work(f"label, {policy.backend}, {size} at a time", partial(label, policy, size), num, goal)
        for policy, goal in policies
        for size in (16, 256)
    ]


def fitting(game: str, teacher: Teacher, replay: Replay, size: Size, goal: str) -> Work:
    """Returns 8 updates by the loop itself, offline."""
    learner = fresh_learner(game, size, replay)
    offline = partial(distill, teacher, learner, rounds=REPETITIONS + 2, states_per_round=0, updates_per_round=8)
    rounds = offline(loss=ForwardKL(), states=MixedStates(), learning_rate=WarmupCosine(1e-3))
    of_pixels = (
        20 * 20 * learner.student.get_parameter("net.conv1.weight").numel()
    )  # nobody asks for the gradient of pixels
    num = 3 * num_macs(learner.student, teacher.obs_shape) - of_pixels
    return Work(f"fit {size} student, 256 at a time", lambda: 8 * 256 if next(rounds) else 0, num, goal)


def networks(game: str, teacher: Teacher, replay: Replay) -> list[Row]:
    """Returns labelling and fitting beside the matrix product, and what a batch's stacks cost."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    generator = torch.Generator().manual_seed(0)

    def matmul() -> float:
        for _ in range(30):
            torch.mm(a, b)
        return 30.0 * MATRIX**3

    def gather() -> int:
        for _ in range(20):
            replay.sample(256, generator)
        return 20 * 256

    fits = [fitting(game, teacher, replay, "7%", "55%"), fitting(game, teacher, replay, "1%", "")]
    works = [*labelling(teacher, replay.gather(torch.arange(256))), *fits]
    matmuls, gathers, *rates = in_turn(matmul, gather, *(work.run for work in works))
    rows = [Row(f"matrix product, {MATRIX} cubed", [m / 1e9 for m in matmuls], "GMAC/s")]
    for work, rate in zip(works, rates, strict=True):
        rows.append(Row(work.stage, rate, "states/s", [m / work.num_macs for m in matmuls], work.goal))
    for work, rate in zip(fits, rates[-2:], strict=True):
        of_step = [100 * f / g for f, g in zip(rate, gathers, strict=True)]
        rows.append(Row(f"gather stacks to {work.stage}", of_step, "% of it", goal="2"))
    num_bytes = sum(t.nbytes for t in (replay.frames, replay.pasts_N, replay.scores_NA)) / replay.capacity
    return [*rows, Row("a stored state", [num_bytes], "bytes", goal="7,200")]


def storage(game: str, replay: Replay) -> list[Row]:
    """Returns what a commit and a resumption take, in the working directory's file system."""
    content = os.urandom(6_000_000)
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as name:
        folder, store = Path(name), Path(name, "store")

        def commit_one() -> None:
            commit(store, last(store, "round"), Manifest(unit="round", position=0), {"model.safetensors": content})

        def write() -> None:
            with (folder / "plain").open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        def resume() -> None:
            learner = fresh_learner(game, "7%", Replay(len(replay), *shape, stack=4, dtype=torch.uint8))
            restore_checkpoint(learner, folder / "run")
            learner.envs.step(torch.zeros(16, dtype=torch.int64))

        shape = (16, replay.scores_NA.shape[1], replay.obs_shape)
        learner = fresh_learner(game, "7%", replay)
        for _ in range(100):
            learner.obs = learner.envs.step(torch.zeros(16, dtype=torch.int64)).obs
        save_checkpoint(learner, folder / "run")
        commits, writes = zip(*((1e3 * seconds(commit_one), 1e3 * seconds(write)) for _ in range(10)), strict=True)
        resumed = [seconds(resume) for _ in range(REPETITIONS)]
        return [
            Row("commit a checkpoint, 6 MB, beside a write and fsync", list(commits), "ms", list(writes), "30 ms"),
            Row(f"resume, {len(replay):,} states, to the first step", resumed, "s", goal="1 s"),
        ]


def startup() -> list[Row]:
    run = partial(subprocess.run, check=True, capture_output=True)
    names = {
        "import policykd and torch": ("-c", "import policykd; policykd.load_student, policykd.make_atari"),
        "scripts/distill_atari.py --help": ("scripts/distill_atari.py", "--help"),
    }
    times = {
        name: [seconds(partial(run, [sys.executable, *a])) for _ in range(REPETITIONS)] for name, a in names.items()
    }
    return [Row(name, of_name, "s", goal="3 s") for name, of_name in times.items()]


def end_to_end(game: str) -> list[Row]:
    """Returns how busy a short run keeps the cores, start-up and judging included, if nobody else wants them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        flags = "--rounds 5 --states-per-round 2000 --updates-per-round 175 --eval-every 0 --eval-episodes 1 --name run"
        command = [sys.executable, "scripts/distill_atari.py", "--game", game, "--folder", folder, *flags.split()]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = seconds(partial(subprocess.run, command, check=True, capture_output=True))
        (path,) = Path(folder).glob("*/run/results.json")
        results = json.loads(path.read_text())
    usage, spent = resource.getrusage(resource.RUSAGE_CHILDREN), results["wall_seconds"]
    cpu = sum(usage[:2]) - sum(before[:2])
    return [
        Row("a run of 5 small rounds, start to end", [wall], "s"),
        Row(f"  CPU time of {cores} cores", [100 * cpu / (cores * wall)], "% of it", goal="90"),
        Row("  states visited, labelled and fitted", [results["num_states_labelled"] / wall], "states/s"),
        *(Row(f"  {phase}", [s], "s") for phase, s in spent.items()),
    ]


def machine() -> str:
    """Returns the CPU and what of it matters here."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    if (info := Path("/proc/cpuinfo")).is_file():
        fields = dict(line.split("\t", 1) for line in info.read_text().split("\n\n")[0].splitlines() if "\t" in line)
        model, flags = fields["model name"].strip("\t: "), set(fields["flags"].split())
    matter = [f for f in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{model} ({' '.join(matter) or 'flags unknown'}), {os.cpu_count()} cores"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--game", default="Pong", help="has a bundled teacher")
    parser.add_argument("--json", type=Path, help="write the table there too")
    args = parser.parse_args()
    prepare_device("cpu", 1)
    rows, loads = list[Row](), [os.getloadavg()[0]]
    teacher = load_teacher(game=args.game)
    replay = collected(args.game, teacher, 4096)
    print(f"{machine()}, one thread, load {loads[0]:.1f}; {', '.join(map(' '.join, versions().items()))}\n")
    print("| stage | median | best | | limit | share | goal |\n|---|---:|---:|---|---:|---:|---:|")
    stages: list[Callable[[], list[Row]]] = [
        *(partial(collection, game) for game in ("Pong", "Breakout", "Seaquest")),
        partial(networks, args.game, teacher, replay),
        partial(storage, args.game, replay),
        startup,
        partial(end_to_end, args.game),
    ]
    for measure in stages:
        for row in measure():
            rows.append(row)
            print(row, flush=True)
    loads.append(os.getloadavg()[0])
    print(f"\nload {loads[1]:.1f} at the end; medians of {REPETITIONS}, the run of one")
    if args.json:
        about = {"machine": machine(), "loads": loads, "versions": versions()}
        args.json.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
