"""`policykd compress`: makes a run's student smaller, or compares several methods in one table and one picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from policykd.agents.student import load_student
from policykd.agents.teacher import Teacher
from policykd.compression.comparison import compare, comparison_table
from policykd.compression.fine_tuning import ComparisonSettings, FineTuning
from policykd.compression.pareto import draw_pareto
from policykd.compression.recipes import STANDARD, check_recipe
from policykd.envs.atari import make_atari
from policykd.evaluation.policies import infer_game, load_run_teacher
from policykd.io.files import write_atomically
from policykd.io.machine import prepare_device
from policykd.runs.config import DebugArgs, NotNegative, Positive, SeedArgs, TrustArgs, check_name
from policykd.states import DatasetStates
from policykd.storage.dataset import label, open_replay


@dataclass(frozen=True, kw_only=True)
class CompressArgs(DebugArgs, TrustArgs, SeedArgs):
    """Compresses the student of a run, or compares several methods with --compare.

    Fine-tunes with the distillation loss on the run's states, and prints one table of costs and returns. Every network
    is a folder in runs/GAME/compression that the other commands take like a run. The table and the picture next to them
    have all networks that were made there. The same command continues where it was interrupted.

    Examples:
      policykd compress runs/Pong/pong --method structured --sparsity 0.5
      policykd compress runs/Pong/pong --method magnitude+int8 --sparsity 0.8
      policykd compress runs/Pong/pong --compare teacher+structured:0.9 1% student+structured:0.5+int8
    """

    run: Annotated[Path, tyro.conf.Positional]
    """folder of a finished run"""
    method: str = "structured"
    """magnitude, structured, low-rank, int8 (weights), int8-static (activations too), or several joined by +"""
    sparsity: float = 0.5
    """fraction of the weights (magnitude) or parameters (structured) to remove"""
    rank: int = 8
    """rank of the first dense layer (low-rank)"""
    compare: tuple[str, ...] = ()
    """recipes to compare, each a start and methods joined by +: start student, teacher or a size distilled from scratch
    (1%, or 1%:hard for hard labels, 1%:sharp for a quarter of the temperature), methods as in --method with their
    amount, such as structured:0.5; `standard` compares the most common ones"""
    updates: int = 3000
    """gradient steps per method that trains"""
    batch_size: Positive = 256
    """states per gradient step"""
    episodes: NotNegative = 100
    """full episodes per network and protocol, 0 for none; the teacher's come from its card if it has one"""
    states: Path | None = None
    """dataset or run to take the states from; by default the run's own"""
    held_out: float = 0.05
    """fraction of the states, the last ones, that nothing is trained on: KL and agreement are measured there"""
    teacher: str = ""
    """where the run's teacher is now, if it was moved"""
    name: str = "compression"
    """name of the folder to write, next to the run's"""
    threads: Positive = 1
    """CPU threads per batch"""


def run(args: CompressArgs) -> None:
    """Loads student, teacher and states, and compresses or compares."""
    check_name(args.name)
    # --method names methods of the run's student, with amounts from --sparsity and --rank.
    amounts = {"magnitude": f":{args.sparsity:g}", "structured": f":{args.sparsity:g}", "low-rank": f":{args.rank}"}
    methods = [method + amounts.get(method, "") for method in args.method.split("+")]
    # The untouched student is always the row to compare with.
    recipes = args.compare or ("student", "+".join(["student", *methods]))
    recipes = STANDARD if recipes == ("standard",) else recipes
    for recipe in recipes:
        check_recipe(recipe)

    # Student, teacher and states of the run.
    device = prepare_device("cpu", args.threads)
    game = infer_game([str(args.run)])
    student = load_student(args.run)
    teacher = load_run_teacher(
        args.run, ref=args.teacher, alternative="give --teacher", trust_pickle=args.trust_pickle
    ).policy
    assert isinstance(teacher, Teacher)
    states = DatasetStates(args.states or args.run, held_out=args.held_out)
    replay = open_replay(states, teacher, game).to(device)
    label(replay, teacher)
    # One environment, which is never stepped: the loop reads the shapes of observations and actions from it.
    settings = ComparisonSettings(
        game, teacher.sha256, str(states.path.resolve()), args.updates, args.batch_size, args.seed
    )
    tuning = FineTuning(settings, teacher, make_atari(game, 1, args.seed), replay, args.threads)

    # Networks that the folder holds already are not made again, so an interrupted comparison continues.
    folder = args.run.parent / args.name
    comparison = compare(folder, recipes, student, tuning, args.episodes)
    table = comparison_table(comparison)
    write_atomically(folder / "compression.md", table.encode())
    if args.episodes:
        write_atomically(folder / "pareto.svg", draw_pareto(comparison))
    print(f"\n{table}\n{folder}/ holds compression.json and, as a table and a picture, compression.md and pareto.svg")
