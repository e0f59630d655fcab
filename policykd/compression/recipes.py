"""Recipes: where a compressed network starts from and which methods are applied, as in `7%+structured:0.5+int8`."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from policykd.agents.networks import num_parameters
from policykd.agents.student import SIZES, Size, Student
from policykd.compression.fine_tuning import FineTuning, train_from_scratch
from policykd.compression.low_rank import factorize_and_tune
from policykd.compression.networks import teacher_as_student
from policykd.compression.pruning import prune_by_magnitude, prune_structured
from policykd.compression.quantization import Precision
from policykd.losses import ActionNLL, ForwardKL, LossFn

Tuned = Literal["magnitude", "structured", "low-rank"]

SHARPENED = 0.25
"""factor of the teacher's temperature for `:sharp` targets, between its own policy and hard labels"""

STANDARD = (
    "teacher", "student", "student+int8", "student+magnitude:0.5", "student+structured:0.5",
    "student+structured:0.5+int8", "student+low-rank:8", "teacher+structured:0.9", "teacher+int8",
)  # fmt: skip
"""the recipes of `--compare standard`"""


@dataclass(frozen=True)
class Recipe:
    """One way to a small network."""

    start: str
    """`student` (of the run), `teacher`, or a size that is distilled from scratch, with `:hard` labels or `:sharp`
    targets if given"""
    steps: tuple[tuple[Tuned, float], ...] = ()
    """methods that tune, each with its sparsity (fraction of weights or parameters removed) or rank"""
    precision: Precision = "float32"

    def __str__(self) -> str:
        """Returns the text that `parse_recipe` reads."""
        steps = [f"{method}:{amount:g}" for method, amount in self.steps]
        precision = [] if self.precision == "float32" else [self.precision]
        return "+".join([self.start, *steps, *precision])

    @property
    def family(self) -> str:
        """The kind of method, for tables and pictures."""
        size, _, targets = self.start.partition(":")
        if len(self.steps) > 1 or (self.steps and (self.start != "teacher" or self.precision != "float32")):
            return "combined"
        if self.steps:
            return self.steps[0][0]
        if self.precision != "float32":
            return "int8"
        return {"hard": "hard labels", "sharp": "sharp targets"}.get(targets, "distilled" if size in SIZES else size)

    @property
    def num_trainings(self) -> int:
        """How many times the budget of updates is spent."""
        return len(self.steps) + (self.start not in ("student", "teacher"))

    @property
    def parent(self) -> "Recipe | None":
        """The recipe without its last method, whose student the last method starts from; None without methods."""
        if self.precision != "float32":
            return Recipe(self.start, self.steps)
        return Recipe(self.start, self.steps[:-1]) if self.steps else None


def parse_recipe(text: str) -> Recipe:
    """Returns a recipe given as text.

    Raises:
        ValueError: unknown start or method, or an invalid amount.
    """
    start, *methods = text.split("+")
    size, _, targets = start.partition(":")
    if start not in ("student", "teacher") and (size not in SIZES or targets not in ("", "hard", "sharp")):
        raise ValueError(f"{text}: starts with {start!r}, expected student, teacher or a size ({', '.join(SIZES)})")
    precision: Precision = "float32"
    if methods and methods[-1] in get_args(Precision):
        precision = cast(Precision, methods.pop())
    steps = []
    for part in methods:
        method, _, amount = part.partition(":")
        if method not in get_args(Tuned):
            raise ValueError(f"{text}: unknown method {part!r}; use {', '.join(get_args(Tuned))}, then int8 at the end")
        try:
            number = float(amount)
        except ValueError:
            number = -1.0
        valid = number >= 1 and number.is_integer() if method == "low-rank" else 0.0 < number < 1.0
        if not valid:
            expected = "a rank, such as low-rank:8" if method == "low-rank" else f"a sparsity, such as {method}:0.5"
            raise ValueError(f"{text}: expected {expected}")
        steps.append((cast(Tuned, method), number))
    return Recipe(start, tuple(steps), precision)


def start_student(recipe: Recipe, student: Student, tuning: FineTuning) -> Student:
    """Returns the network that a recipe starts from; `student` is the run's."""
    if recipe.start == "student":
        return student
    if recipe.start == "teacher":
        return teacher_as_student(tuning.teacher)
    size, _, targets = recipe.start.partition(":")
    losses: dict[str, LossFn] = {
        "": ForwardKL(),
        "hard": ActionNLL(),
        "sharp": ForwardKL(tuning.teacher.temperature * SHARPENED),
    }
    return train_from_scratch(cast(Size, size), tuning, losses[targets])


def apply_last_step(recipe: Recipe, student: Student, tuning: FineTuning) -> Student:
    """Returns the student of `recipe.parent` after the recipe's last method; int8 leaves it as it is."""
    if recipe.precision != "float32":
        return student
    method, amount = recipe.steps[-1]
    if method == "magnitude":
        return prune_by_magnitude(student, tuning, amount)
    if method == "structured":
        return prune_structured(student, tuning, round((1.0 - amount) * num_parameters(student)))
    return factorize_and_tune(student, tuning, int(amount))
