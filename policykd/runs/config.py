"""Flags that several commands share, those of `policykd distill`, their bounds, and their form in `config.json`.

A command's arguments are a frozen, keyword-only dataclass that inherits the groups it needs. Bounds are annotations
(`pydantic.Field`), which `check_flags` enforces. `config.json` spells flags as a command line does: a schedule as
`linear:4:1`, and a member of a union of dataclasses by its class name under `kind`.
"""

import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import annotated_types
import tyro
from pydantic import Field as Bounds
from pydantic import JsonValue, TypeAdapter, ValidationError

from policykd.agents.student import Size
from policykd.agents.teacher import TEACHER_HELP, WEIGHTS_HELP
from policykd.envs.games import canonical_names
from policykd.io.files import BadFile
from policykd.io.machine import DeviceName as DeviceName
from policykd.io.typed import one_line
from policykd.loop import DistillConfig
from policykd.losses import (
    ActionNLL,
    AuxiliaryLossWeights,
    ForwardKL,
    JensenShannon,
    LogitHuber,
    LogitMSE,
    PolicyLoss,
    ReverseKL,
    SoftAndHard,
    TwoSidedKL,
)
from policykd.methods.divergences import DecoupledKL, StandardizedKL
from policykd.methods.state_weights import StateWeighting, weigh_states
from policykd.runs.budget import FIRST_STAGE_ROUNDS, BudgetName, stage_ends
from policykd.schedules import Quantity, check_bounds, follows_return, format_schedule, parse_schedule
from policykd.states import BlendedStates, DatasetStates, MixedStates, StudentStates, TeacherStates, student_acts_alone

T = TypeVar("T")

Positive = Annotated[int, Bounds(ge=1)]
NotNegative = Annotated[int, Bounds(ge=0)]
Probability = Annotated[float, Bounds(ge=0, le=1)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
"""what NumPy, torch and the emulators all accept"""
Settings = dict[str, JsonValue]
"""flags of a command by name, as JSON"""


@dataclass(frozen=True, kw_only=True)
class GameArgs:
    """The game to learn."""

    game: str
    """Atari game; Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same"""


@dataclass(frozen=True, kw_only=True)
class DebugArgs:
    """How much is printed about an error."""

    debug: bool = False
    """print the traceback of an error"""


@dataclass(frozen=True, kw_only=True)
class TrustArgs:
    """Permission to execute code in the user's own files."""

    trust_pickle: bool = False
    """let SB3 itself load a teacher, which executes code in the file: only for your own archives"""


@dataclass(frozen=True, kw_only=True)
class TeacherArgs(TrustArgs):
    """The teacher to learn from."""

    teacher: Annotated[str, tyro.conf.arg(help=f"teacher: {TEACHER_HELP}")] = "auto"
    teacher_weights: Annotated[str, tyro.conf.arg(help=WEIGHTS_HELP)] = "equal"
    allow_weak_teacher: bool = False
    """accept a teacher that may play no better than a random policy"""


@dataclass(frozen=True, kw_only=True)
class RunArgs(DebugArgs):
    """The folder of a run."""

    name: str = ""
    """name of the run's folder; by default made of other settings, such as the seed"""
    folder: Path = Path("runs")
    """folder that holds all runs"""
    resume: bool = False
    """resume the run of this --name from its last checkpoint, or start it if there is none"""


@dataclass(frozen=True, kw_only=True)
class ThreadArgs:
    """The cores to compute on."""

    threads: NotNegative = 0
    """CPU threads per batch and number of emulator processes; 0 takes as many as torch finds"""


@dataclass(frozen=True, kw_only=True)
class MachineArgs(ThreadArgs):
    """The hardware to compute on."""

    device: DeviceName = "auto"
    """device to compute on; auto takes cuda if available, else mps, else cpu"""


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """Evaluations during and after a run."""

    eval_every: NotNegative = 5
    """rounds between periodic evaluations (16 episodes, no-op starts, sampled actions); 0 for none"""
    eval_episodes: Positive = 50
    """full episodes per protocol in the final evaluation, for the student and for a teacher whose card has none"""


@dataclass(frozen=True, kw_only=True)
class SeedArgs:
    """The source of randomness."""

    seed: Seed = 0
    """random seed"""


def check_flags(args: Any) -> None:
    """Checks every number of a dataclass against the bounds in its annotation."""
    hints = get_type_hints(type(args), include_extras=True)
    for field in fields(args):
        value = getattr(args, field.name)
        minimum, maximum = _bounds(hints[field.name])
        # Written so that NaN, which compares false with everything, is out of bounds.
        is_below = minimum is not None and value is not None and not value >= minimum
        is_above = maximum is not None and value is not None and not value <= maximum
        if is_below or is_above:
            limits = f"at least {minimum}" if maximum is None else f"at least {minimum} and at most {maximum}"
            raise ValueError(f"--{field.name.replace('_', '-')} must be {limits}, not {value}")


@contextmanager
def flag_errors(args: Any) -> Iterator[None]:
    """Spells the setting that a ValueError begins with as the flag that the user gave: batch_size is --batch-size."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in {field.name for field in fields(args)}:
            raise
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from error


def _bounds(hint: Any) -> tuple[Any, Any]:
    """Returns the inclusive bounds in an annotation, None where there is none."""
    constraints = [c for extra in getattr(hint, "__metadata__", ()) for c in getattr(extra, "metadata", ())]
    minimum = next((c.ge for c in constraints if isinstance(c, annotated_types.Ge)), None)
    maximum = next((c.le for c in constraints if isinstance(c, annotated_types.Le)), None)
    return minimum, maximum


def check_name(name: str) -> None:
    """Raises ValueError for a run's name that would lead out of its folder."""
    if name != Path(name).name or name in {".", ".."}:
        raise ValueError(f"--name must be the name of a folder, not {name!r}; --folder sets the folder that holds it")


def to_settings(config: object) -> Settings:
    """Returns a config dataclass as JSON."""
    hints = get_type_hints(type(config))
    return {name: _encode(hints[name], value) for name, value in vars(config).items() if name in hints}


def from_settings(kind: type[T], settings: Settings, name: str | Path) -> T:
    """Returns the config that `to_settings` wrote; `name` is the file of the settings, for errors."""
    try:
        config: T = _decode(kind, settings)
    except (ValueError, TypeError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        step = "written by another version of policykd, or damaged; start a new run under another --name"
        raise BadFile(f"{name}: invalid settings ({one_line(reason)}); {step}") from error
    return config


def changed_settings(before: Settings, now: Settings) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    """Yields each setting that differs as (dotted name, before, now)."""
    # Options of one loss are compared one by one; another loss is one change.
    for key in now | before:
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
            yield from ((f"{key}.{inner}", *values) for inner, *values in changed_settings(old, new))  # type: ignore[misc]
        elif old != new:
            yield key, old, new


def _encode(hint: Any, value: Any) -> JsonValue:
    # A number stays a number, a schedule becomes the text that the command line takes.
    if _is_quantity(hint):
        return value if value is None or isinstance(value, int | float) else format_schedule(value)
    members = _members(hint)
    # The exact class: a subclass of the user's has another name, and may compute something else.
    if members and type(value) not in members:
        known = ", ".join(member.__name__ for member in members)
        raise ValueError(f"{value!r} is not one of those that can be written as text: {known}; pass it to distill()")
    # The class is only named where there is a choice.
    if is_dataclass(value):
        kind = {"kind": type(value).__name__} if len(members) > 1 else {}
        return {**kind, **to_settings(value)}
    return TypeAdapter(hint).dump_python(value, mode="json")  # type: ignore[no-any-return]


def _decode(hint: Any, value: Any) -> Any:
    if _is_quantity(hint):
        return parse_schedule(value) if isinstance(value, str) else TypeAdapter(float | None).validate_python(value)
    members = _members(hint)
    if not members:
        # As JSON, in which a tuple is a list and a path is text.
        return TypeAdapter(hint).validate_json(json.dumps(value))
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} instead of an object")
    # Nested dataclasses field by field, because they may hold schedules too.
    kind = members[0]
    if len(members) > 1:
        by_name = {member.__name__: member for member in members}
        kind = by_name[value["kind"]]
    given = {key: part for key, part in value.items() if not (key == "kind" and len(members) > 1)}
    hints = get_type_hints(kind, include_extras=True)
    # Checked for a message that names the setting; Python's KeyError would not explain itself.
    if unknown := given.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"{', '.join(sorted(unknown))}: unknown")
    return kind(**{key: _decode(hints[key], part) for key, part in given.items()})


def _is_quantity(hint: Any) -> bool:
    return hint in (Quantity, Quantity | None)


def _members(hint: Any) -> list[Any]:
    """Returns the dataclasses that a field of this type may hold."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    candidates = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [candidate for candidate in candidates if is_dataclass(candidate)]


AnyLoss = (
    ForwardKL
    | ReverseKL
    | JensenShannon
    | TwoSidedKL
    | SoftAndHard
    | DecoupledKL
    | StandardizedKL
    | LogitMSE
    | LogitHuber
    | ActionNLL
)
"""losses that a command offers"""
AnyStates = MixedStates | StudentStates | TeacherStates | DatasetStates | BlendedStates
"""state sources that a command offers"""

RESUMABLE_CHANGES = frozenset(
    {
        *("device", "threads", "overlap"),  # the machine: other last bits at most, with a warning
        *("name", "folder", "resume", "debug"),
        *("eval_every", "eval_episodes"),
        "teacher",  # its content is compared, not the reference to it
        "trust_pickle",  # only ever taken from the command line
        *("rounds", "budget", "steps", "checkpoint_every"),  # the length; that of distill is compared separately
    }
)
"""settings that may differ when a run is resumed"""
_GIGABYTES_PER_STATE = 7.2e-6
"""size of the replay buffer: one new 84 x 84 frame, and the teacher's outputs"""
_MAX_GIGABYTES = 1000


@dataclass(frozen=True, kw_only=True)
class TaskArgs(GameArgs):
    """The game and the size of the student; first in the help text."""

    student: Size = "7%"
    """size in per cent of the NatureCNN's parameters, or a design with few multiply-accumulates (docs/students.md)"""


# Bases are listed from the last in the help text to the first; where two define a field, the one on the left counts.
@dataclass(frozen=True, kw_only=True)
class DistillRunConfig(RunArgs, MachineArgs, SeedArgs, EvaluationArgs, DistillConfig, TeacherArgs, TaskArgs):
    """Settings of a distillation run, the flags of `policykd distill`."""

    game: str
    """Atari game; Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same. Several, such as Pong,Breakout, give one
    student that plays them all (docs/multi_game.md): --teacher then takes as many, and --num-envs, --states-per-round
    and --updates-per-round count per game"""
    loss: AnyLoss = ForwardKL()  # noqa: RUF009  (frozen)
    """loss to minimise: --loss two-sided-kl and the like (docs/losses.md; docs/methods.md compares them)"""
    states: AnyStates = MixedStates()  # noqa: RUF009  (frozen)
    """who acts while states are collected: --states mixed (from teacher to student: DAgger), student, teacher;
    dataset:PATH trains on stored states only, blended:PATH on stored and live ones"""
    state_weighting: StateWeighting = "none"
    """weight states by the teacher's certainty (entropy, gap of its two best actions) or the student's disagreement"""
    min_state_weight: Quantity = 0.1
    """weight of a state where that measure is 0; where it is 1, the weight is 1"""
    auxiliary: AuxiliaryLossWeights = AuxiliaryLossWeights()  # noqa: RUF009  (frozen)
    """weights of auxiliary losses, in addition to that of the policies (docs/auxiliary_losses.md)"""
    num_envs: Positive = 16
    """environments that collect states in parallel"""
    heads: Literal["separate", "shared"] = "separate"
    """last layer of a student of several games: one for each game, or one of ALE's 18 actions"""
    rounds: NotNegative = 0
    """rounds of collecting states and training on all collected so far; 0 leaves their number to --budget"""
    budget: BudgetName = "auto"
    """quick, standard and full evaluate the student after --rounds (by default 4), and double the length of the run
    until it is within a tolerance of its teacher's score or no longer improves: quick 5 %, at most 4 times as long;
    standard 2 %, 8 times; full 1 %, 32 times. none trains for --rounds (by default 16). auto is standard without
    --rounds, for one game with live states, else none"""

    def __post_init__(self) -> None:
        """Takes a folder as text too, and decides what auto means; leaves the checks to `check_config`."""
        object.__setattr__(self, "folder", Path(self.folder))
        if self.budget == "auto":
            is_one_game = "," not in self.game
            follows = follows_return(self.loss, self.min_state_weight, self.auxiliary, self.states)
            has_rule = not self.rounds and is_one_game and not self.is_offline and not follows
            object.__setattr__(self, "budget", "standard" if has_rule else "none")
        if not self.rounds:
            rounds = DistillConfig.rounds if self.budget == "none" else FIRST_STAGE_ROUNDS
            object.__setattr__(self, "rounds", rounds)

    @property
    def games(self) -> tuple[str, ...]:
        """The games, one or several."""
        return canonical_names(self.game)

    @property
    def is_offline(self) -> bool:
        """True if no states are collected."""
        return isinstance(self.states, DatasetStates)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Numbers of rounds after which the run may end."""
        return stage_ends(self.budget, self.rounds)

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss with the states weighted."""
        return weigh_states(self.loss, self.state_weighting, self.min_state_weight)

    def loop_config(self, threads: int, *, rounds: int = 0) -> DistillConfig:
        """Returns the settings of the loop alone, for a number of rounds (by default, of the first stage).

        `threads` is the resolved number.
        """
        # By name: the run's config inherits all fields of the loop's, so a new one needs no line here.
        names = {field.name for field in fields(DistillConfig)} - {"threads", "rounds"}
        settings = {name: getattr(self, name) for name in names}
        for name in ("states_per_round", "updates_per_round"):
            settings[name] *= len(self.games)
        return DistillConfig(threads=threads, rounds=rounds or self.rounds, **settings)


def check_config(config: DistillRunConfig) -> None:
    """Checks a config before a run touches any file.

    Raises:
        ValueError: a setting out of bounds, or settings that contradict each other; the line names the flag.
    """
    # Each value by itself ...
    check_flags(config)
    check_name(config.name)
    with flag_errors(config):
        config.loop_config(threads=1)  # checks the bounds of the loop's own settings
    check_bounds("--min-state-weight", config.min_state_weight, 0.0, 1.0)
    to_settings(config)  # refuses functions of the user's, which config.json cannot hold
    # ... then those that depend on each other. The buffer is allocated at once, so its size is known now.
    num_states = config.stage_ends[-1] * config.states_per_round * len(config.games)
    if (gigabytes := num_states * _GIGABYTES_PER_STATE) > _MAX_GIGABYTES:
        length = "" if config.budget == "none" else f" for up to {config.stage_ends[-1]:,} rounds"
        raise ValueError(
            f"--rounds times --states-per-round takes {gigabytes:,.0f} GB of memory{length}; lower one of them"
        )
    # Every environment takes the same number of steps per round.
    if config.states_per_round % config.num_envs:
        raise ValueError(
            f"--states-per-round {config.states_per_round} is not a multiple of --num-envs {config.num_envs}"
        )
    _check_games(config)
    # An option without effect is more likely a mistake than meant.
    if config.state_weighting == "none" and config.min_state_weight != DistillRunConfig.min_state_weight:
        raise ValueError("--min-state-weight needs --state-weighting entropy, gap or disagreement; leave it out")
    if config.budget != "none" and config.eval_every != DistillRunConfig.eval_every:
        raise ValueError(
            f"--eval-every {config.eval_every}: --budget {config.budget} evaluates where the run may end; leave it at"
            f" {DistillRunConfig.eval_every}"
        )
    _check_return_schedules(config)
    if config.is_offline:
        for name in ("states_per_round", "num_envs", "replay_window_rounds"):
            if getattr(config, name) != getattr(DistillRunConfig, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: --states dataset:PATH collects no states; leave it out")


def _check_games(config: DistillRunConfig) -> None:
    """Raises ValueError for settings that do not work with several games, or only with several."""
    games = config.games
    if len(games) == 1:
        if config.heads != DistillRunConfig.heads:
            raise ValueError(f"--heads {config.heads}: for several games; leave it out, or give --game GAME,GAME")
        return
    if config.teacher != "auto" and len(config.teacher.split(",")) != len(games):
        raise ValueError(f"--teacher {config.teacher}: give one per game, {len(games)} references joined by commas")
    # What compares or weighs all outputs of a state, or reads its rewards, would count those of other games.
    unsupported = {
        "loss": isinstance(config.loss, DecoupledKL | StandardizedKL | LogitMSE | LogitHuber),
        "state-weighting": config.state_weighting != "none",
        "auxiliary": bool(config.auxiliary.active),
        "states": isinstance(config.states, DatasetStates | BlendedStates),
        "budget": config.budget != "none",
        "teacher-weights": config.teacher_weights != "equal",
    }
    for flag, is_given in unsupported.items():
        if is_given:
            raise ValueError(f"--{flag}: not for several games at once; leave it out")
    if depends_on_return(config):
        raise ValueError("--game: a schedule that follows the return is for one game; give another schedule")


def _check_return_schedules(config: DistillRunConfig) -> None:
    """Raises ValueError if schedules follow the student's return and nothing measures it during the run."""
    if not depends_on_return(config):
        return
    # The return of a student is measured by periodic evaluations, or by collected episodes that are all its own.
    has_periodic_evaluations = config.budget == "none" and 0 < config.eval_every < config.rounds
    # States that depend on the return themselves might never be left to the student.
    acts_alone = not follows_return(config.states) and student_acts_alone(config.states, 1.0)
    if not has_periodic_evaluations and not acts_alone:
        raise ValueError(
            "--eval-every: a schedule that follows the return needs episodes that the student plays alone; give it"
            " less than --rounds, without a --budget, or --states student"
        )


def depends_on_return(config: DistillRunConfig) -> bool:
    """Returns whether a schedule follows the student's return: periodic evaluations then change the training."""
    return follows_return(config.policy_loss, config.auxiliary, config.states)
