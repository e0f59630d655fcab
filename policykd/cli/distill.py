"""`policykd distill`: one distillation run."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path

from policykd.cli.arguments import parse_args
from policykd.io.typed import read_json
from policykd.runs.config import DistillRunConfig, from_settings
from policykd.runs.folder import RunRecord, pin_teacher_revision


@dataclass(frozen=True, kw_only=True)
class DistillArgs(DistillRunConfig):
    """Distils a trained Stable-Baselines3 Atari agent into a compact student, and measures what that cost.

    Writes runs/GAME/NAME/ with config.json, TensorBoard curves, metrics.jsonl, evaluations.npz, checkpoints/,
    student.safetensors + student.json, results.json, report.html and student.gif.

    Typical commands:
      policykd distill --game Pong
      policykd distill --game Breakout --teacher hub:dqn --student 1% --loss two-sided-kl --loss.temperature linear:4:1
      policykd distill --game Pong,Breakout,SpaceInvaders --student 25%
      policykd distill --config runs/Pong/NAME/config.json --seed 1
      policykd resume runs/Pong/NAME
    """

    config: Path | None = None
    """config.json of a run to repeat under another --name; further flags override it"""


def parse(words: Sequence[str], prog: str) -> DistillArgs:
    """Returns the arguments; those of `--config FILE` are the defaults of the others."""
    # The file has to be read before the other flags are parsed, so --config is looked for by hand.
    default = None
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, joined, value = word.partition("=")
        if flag == "--config":
            name = value if joined else following
            if not name or name.startswith("--"):
                raise ValueError("--config needs a file: the config.json of a run")
            default = _load_config(Path(name))
    return parse_args(DistillArgs, words, prog=prog, default=default)


def run(args: DistillArgs) -> None:
    """Runs the distillation."""
    # --config is no setting of a run: what it named is in the other fields.
    config = DistillRunConfig(**{field.name: getattr(args, field.name) for field in fields(DistillRunConfig)})
    # Each is imported where it is needed, and not for --help.
    if len(config.games) > 1:
        from policykd.runs.multi_game_run import distill_games_run

        distill_games_run(config)
    else:
        from policykd.runs.distill_run import distill_run

        distill_run(config)


def _load_config(path: Path) -> DistillArgs:
    record = read_json(RunRecord, path, next_step="give the config.json of a run of policykd distill")
    if record.subcommand != "distill":
        raise ValueError(f"--config {path}: a run of policykd {record.subcommand}, not of distill; give another file")
    config = from_settings(DistillArgs, record.settings, path)
    # The same agent, also if its repository has a newer one by now; a folder of its own. Pickles are never executed
    # because a file says so, only by a flag of this command.
    teacher = pin_teacher_revision(config.teacher, record)
    return replace(config, teacher=teacher, name="", resume=False, trust_pickle=False)
