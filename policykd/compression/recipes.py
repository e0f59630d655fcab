"""Recipes: the start of a compressed network and the methods that follow, as text: `7%+structured:0.5+int8`.

A start is `student` (of the run), `teacher`, or a size that is distilled from scratch, `1%:hard` on hard labels and
`1%:sharp` on sharper targets. Methods that train have an amount: `magnitude` and `structured` a sparsity (the fraction
of weights or parameters to remove), `low-rank` a rank.
"""

from typing import Literal, cast, get_args

from policykd.agents.networks import num_parameters
from policykd.agents.student import SIZES, Size, Student
from policykd.compression.fine_tuning import FROM_TRAINED, FineTuning, train_from_scratch
from policykd.compression.networks import factorize, teacher_as_student
from policykd.compression.pruning import prune_by_magnitude, prune_structured
from policykd.losses import ActionNLL, ForwardKL, LossFn

Quantization = Literal["int8", "int8-static"]
"""int8 weights, computed in float32, as `policykd export` writes them; int8 weights and activations, statically"""

TRAINED = ("magnitude", "structured", "low-rank")
"""methods that spend the budget of updates"""
STARTS = ("student", "teacher")
TARGETS = {"": "distilled", "hard": "hard labels", "sharp": "sharp targets"}
"""targets that a size is trained on -> its family in tables and pictures"""

SHARPENED = 0.25
"""factor of the teacher's temperature for `:sharp` targets, between its own policy and hard labels"""

STANDARD = (
    "teacher", "student", "student+int8", "student+magnitude:0.5", "student+structured:0.5",
    "student+structured:0.5+int8", "student+low-rank:8", "teacher+structured:0.9", "teacher+int8",
)  # fmt: skip
"""the recipes of `--compare standard`"""


def check_recipe(recipe: str) -> None:
    """Raises ValueError for an unknown start or method, or an invalid amount."""
    start, *methods = recipe.split("+")
    size, _, targets = start.partition(":")
    if start not in STARTS and (size not in SIZES or targets not in TARGETS):
        raise ValueError(f"{recipe}: starts with {start!r}, expected student, teacher or a size ({', '.join(SIZES)})")
    # Quantization comes last: what it gives is an ONNX file, which no other method takes.
    if methods and methods[-1] in get_args(Quantization):
        methods.pop()
    # The remaining methods train, and need an amount.
    for part in methods:
        method, _, amount = part.partition(":")
        if method not in TRAINED:
            raise ValueError(f"{recipe}: unknown method {part!r}; use {', '.join(TRAINED)}, then int8 at the end")
        if method == "low-rank" and not (amount.isdecimal() and int(amount) > 0):
            raise ValueError(f"{recipe}: expected a rank, such as low-rank:8")
        if method != "low-rank" and not 0.0 < _as_float(amount) < 1.0:
            raise ValueError(f"{recipe}: expected a sparsity, such as {method}:0.5")


def _as_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def parent(recipe: str) -> str:
    """Returns the recipe without its last method, whose student that method starts from; empty without methods."""
    return recipe.rpartition("+")[0]


def quantization(recipe: str) -> Quantization | None:
    """Returns how a recipe's network is quantized, None for float32."""
    last = recipe.rpartition("+")[2]
    return cast(Quantization, last) if last in get_args(Quantization) else None


def num_trainings(recipe: str) -> int:
    """Returns how many times a recipe spends the budget of updates."""
    start, *methods = recipe.split("+")
    return (start not in STARTS) + sum(method.startswith(TRAINED) for method in methods)


def family(recipe: str) -> str:
    """Returns the kind of a recipe's last method, for tables and pictures; several that train are `combined`."""
    start, *methods = recipe.split("+")
    size, _, targets = start.partition(":")
    # A method on a network that was distilled from scratch is a combination of both.
    trained = [method.partition(":")[0] for method in methods if method.startswith(TRAINED)]
    if trained:
        is_single = len(methods) == 1 and start in STARTS
        return trained[0] if is_single else "combined"
    if methods:
        return "int8"
    return size if size in STARTS else TARGETS[targets]


def apply_recipe(recipe: str, previous: Student, tuning: FineTuning) -> Student:
    """Returns the student of a recipe, by applying its last method to the student of `parent(recipe)`.

    For a recipe without methods, `previous` is the run's student.
    """
    start, *methods = recipe.split("+")
    if not methods and start == "student":
        return previous
    if not methods and start == "teacher":
        return teacher_as_student(tuning.teacher)
    if not methods:
        size, _, targets = start.partition(":")
        # Distilled from scratch: soft targets, the teacher's best actions, or targets between the two.
        sharpened = tuning.teacher.temperature * SHARPENED
        losses: dict[str, LossFn] = {"": ForwardKL(), "hard": ActionNLL(), "sharp": ForwardKL(sharpened)}
        return train_from_scratch(cast(Size, size), tuning, losses[targets])
    method, _, amount = methods[-1].partition(":")
    if method == "magnitude":
        return prune_by_magnitude(previous, tuning, float(amount))
    # A sparsity of structured pruning is of the parameters of the network that it starts from.
    if method == "structured":
        return prune_structured(previous, tuning, round((1.0 - float(amount)) * num_parameters(previous)))
    if method == "low-rank":
        return tuning.train_fully(factorize(tuning.prepare(previous), int(amount)), FROM_TRAINED)
    return previous  # quantized when it is exported
