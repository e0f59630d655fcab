"""When a run ends: after a fixed number of rounds, or once its student is as good as its teacher.

With a budget, training proceeds in stages, each as long as all before it together. At the end of a stage the default
learning rate has decayed to 0, so the student can be evaluated there, and the run ends or continues with the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BudgetName = Literal["auto", "none", "quick", "standard", "full"]
"""auto is decided when the flags are read (`DistillRunConfig`)"""
StopReason = Literal["reached", "stalled", "spent"]


@dataclass(frozen=True)
class Budget:
    """Tolerance and maximum length of a run."""

    tolerance: float
    """shortfall from the teacher's return that is accepted, as a share of its return above random play"""
    num_doublings: int
    """number of times that the run's length may be doubled"""


BUDGETS: dict[BudgetName, Budget] = {
    "none": Budget(0.0, 0),
    "quick": Budget(0.05, 2),
    "standard": Budget(0.02, 3),
    "full": Budget(0.01, 5),
}
FIRST_STAGE_ROUNDS = 4
"""rounds of the first stage, if none are given"""
MIN_KL_DECREASE = 0.1
"""a student whose KL on new states fell by this share in the last stage still improves, whatever its noisy returns"""


def stage_ends(budget: BudgetName, rounds: int) -> tuple[int, ...]:
    """Returns the numbers of rounds after which a run may end; `rounds` is that of the first stage.

    Raises:
        ValueError: an unknown budget.
    """
    if budget not in BUDGETS:
        raise ValueError(f"--budget must be one of {', '.join(BUDGETS)}, not {budget!r}")
    return tuple(rounds * 2**k for k in range(BUDGETS[budget].num_doublings + 1))


@dataclass(frozen=True)
class StageResult:
    """The student at the end of a stage."""

    score: float
    """(student - random) / (teacher - random), of mean returns"""
    new_kl: float
    """KL on states that it has not been trained on, nats"""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a run with a budget ended."""

    reason: StopReason
    budget: BudgetName
    num_rounds: int
    max_rounds: int
    score: float
    """score at that time; that of the final evaluation has its interval"""

    def __str__(self) -> str:
        """Returns one sentence, with the next step for a student below its teacher."""
        tolerance = BUDGETS[self.budget].tolerance
        after = f"after {self.num_rounds} of at most {self.max_rounds} rounds"
        if self.reason == "reached":
            return f"Ended {after}: the student is within {tolerance:.0%} of its teacher ({self.score:.1%})."
        why = "it no longer improves" if self.reason == "stalled" else "the budget is spent"
        is_extendable = self.reason == "spent" and self.budget != "full"
        next_step = "--budget full" if is_extendable else "more --rounds or a larger --student"
        return (
            f"Ended {after}: {why}. The student keeps {self.score:.1%} of its teacher's score, less than the"
            f" {1 - tolerance:.0%} asked for; try {next_step}."
        )


def decide(stages: Sequence[StageResult], budget: BudgetName, rounds: int) -> Stop | None:
    """Returns why a run ends after the stages so far, or None if it continues.

    Args:
        stages: results of all stages, at least one.
        budget: name of the budget.
        rounds: rounds of the first stage.
    """
    ends = stage_ends(budget, rounds)
    tolerance = BUDGETS[budget].tolerance
    last = stages[-1]
    reason: StopReason | None = None
    if last.score >= 1.0 - tolerance:
        reason = "reached"
    elif len(stages) == len(ends):
        reason = "spent"
    elif len(stages) > 1 and last.score - stages[-2].score < tolerance:
        # Returns of a few dozen games are noisy; the KL is not.
        reason = "stalled" if last.new_kl > (1.0 - MIN_KL_DECREASE) * stages[-2].new_kl else None
    if reason is None:
        return None
    return Stop(reason=reason, budget=budget, num_rounds=ends[len(stages) - 1], max_rounds=ends[-1], score=last.score)
