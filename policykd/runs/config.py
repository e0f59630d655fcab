"""Config of a distillation run: every flag of `policykd distill`, typed, and what of it may change on resume."""

from dataclasses import dataclass, fields
from pathlib import Path

from policykd.agents.student import Size
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
from policykd.methods.decoupled_kl import DecoupledKL
from policykd.methods.standardized_kl import StandardizedKL
from policykd.methods.state_weights import StateWeighting, weigh_states
from policykd.runs.groups import (
    EvaluationArgs,
    MachineArgs,
    Positive,
    RunArgs,
    SeedArgs,
    TeacherArgs,
    check_flags,
    check_name,
    flag_errors,
    to_settings,
)
from policykd.schedules import Quantity, check_bounds, follows_return
from policykd.states import (
    BlendedStates,
    DatasetStates,
    MixedStates,
    StudentStates,
    TeacherStates,
    student_acts_alone,
)

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
        "rounds",  # may grow; compared separately
    }
)
"""settings that may differ when a run is resumed"""
_GIGABYTES_PER_STATE = 7.2e-6
"""of the replay buffer: one new 84 x 84 frame, and the teacher's outputs"""
_MAX_GIGABYTES = 1000


@dataclass(frozen=True, kw_only=True)
class TaskArgs:
    """What is distilled into what; first in the help text."""

    game: str
    """Atari game; Pong, PongNoFrameskip-v4 and ALE/Pong-v5 all mean the same"""
    student: Size = "7%"
    """size in per cent of the NatureCNN's parameters, or a design with few multiply-accumulates (docs/students.md)"""


# Bases are listed from the last in the help text to the first; where two define a field, the one on the left counts.
@dataclass(frozen=True, kw_only=True)
class DistillRunConfig(RunArgs, MachineArgs, SeedArgs, EvaluationArgs, DistillConfig, TeacherArgs, TaskArgs):
    """Settings of a distillation run, the flags of `policykd distill`."""

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

    def __post_init__(self) -> None:
        """Takes a folder as text too; leaves the checks to `check_config`, which knows the flags' names."""
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def is_offline(self) -> bool:
        """Whether no states are collected."""
        return isinstance(self.states, DatasetStates)

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss with the states weighted."""
        return weigh_states(self.loss, self.state_weighting, self.min_state_weight)

    def loop_config(self, threads: int) -> DistillConfig:
        """Returns the settings of the loop alone, with the number of threads resolved."""
        # By name: the run's config inherits all fields of the loop's, so a new one needs no line here.
        names = {field.name for field in fields(DistillConfig)} - {"threads"}
        return DistillConfig(threads=threads, **{name: getattr(self, name) for name in names})


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
    if (gigabytes := config.rounds * config.states_per_round * _GIGABYTES_PER_STATE) > _MAX_GIGABYTES:
        raise ValueError(f"--rounds times --states-per-round takes {gigabytes:,.0f} GB of memory; lower one of them")
    # Every environment takes the same number of steps per round.
    if config.states_per_round % config.num_envs:
        raise ValueError(
            f"--states-per-round {config.states_per_round} is not a multiple of --num-envs {config.num_envs}"
        )
    if isinstance(config.learning_rate, int | float) and not config.learning_rate > 0.0:
        raise ValueError(f"--learning-rate must be positive, not {config.learning_rate}")
    # An option without effect is more likely a mistake than meant.
    default_weight = DistillRunConfig.min_state_weight
    if config.state_weighting == "none" and config.min_state_weight != default_weight:
        raise ValueError("--min-state-weight needs --state-weighting entropy, gap or disagreement; leave it out")
    _check_return_schedules(config)
    if config.is_offline:
        _check_offline(config)


def _check_return_schedules(config: DistillRunConfig) -> None:
    """Raises ValueError if schedules follow the student's return and nothing measures it during the run."""
    if not depends_on_return(config):
        return
    # The return of a student is measured by periodic evaluations, or by collected episodes that are all its own.
    has_periodic_evaluations = 0 < config.eval_every < config.rounds
    # States that depend on the return themselves might never be left to the student.
    acts_alone = not follows_return(config.states) and student_acts_alone(config.states, 1.0)
    if not has_periodic_evaluations and not acts_alone:
        raise ValueError(
            "--eval-every: a schedule that follows the return needs episodes that the student plays alone; give it"
            " less than --rounds, or --states student"
        )


def _check_offline(config: DistillRunConfig) -> None:
    """Raises ValueError for settings of a collection that an offline run does not have."""
    if config.states_per_round != DistillRunConfig.states_per_round or config.num_envs != DistillRunConfig.num_envs:
        raise ValueError("--states dataset:PATH collects no states; leave out --states-per-round and --num-envs")
    if config.replay_window_rounds:
        raise ValueError("--states dataset:PATH collects no states; leave out --replay-window-rounds")


def depends_on_return(config: DistillRunConfig) -> bool:
    """Returns whether a schedule follows the student's return: periodic evaluations then change the training."""
    return follows_return(config.policy_loss, config.auxiliary, config.states)
