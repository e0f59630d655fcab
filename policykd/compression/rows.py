"""The rows of a comparison: which way, from which network, and how the result is stored."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from policykd.agents.networks import num_parameters
from policykd.agents.student import Size, make_student, packed_weights
from policykd.compression.compressors import Compressor, Distilled, Unchanged, hard_labels
from policykd.compression.low_rank import LowRank
from policykd.compression.pruning import Magnitude, Structured
from policykd.legacy.losses import ForwardKL

Family = Literal[
    "teacher", "distilled", "sharpened", "hard labels", "magnitude", "structured", "low rank", "int8", "combined"
]
Store = Literal["dense", "sparse", "int8", "sparse-int8", "int8-weights"]
"""as safetensors; as a bit mask and the weights that are left; as an ONNX file of int8; as that, deflated; as an ONNX
file whose weights alone are int8"""
Origin = Literal["distillation", "hard labels", "teacher"]
"""what a network was born from, whatever was done later: the teacher's scores, its best actions, its own weights"""

SHARPENED = 0.25
"""of the teacher's own temperature: between its policy, whose chances a small student blurs, and hard labels"""

TEACHER = "teacher"
"""the row that the others begin with"""


@dataclass(frozen=True)
class Row:
    """One network of a comparison, and how to get there."""

    name: str
    """of its folder, and for `--rows`"""
    label: str
    family: Family
    make: Compressor
    begins_with: str = TEACHER
    """the row whose network `make` is given"""
    store: Store = "dense"

    @property
    def made_by(self) -> str:
        """What decides the result: another way under the same name is another row."""
        return f"{self.make!r} on {self.begins_with}, {self.store}"


def standard_rows(num_actions: int, temperature: float) -> dict[str, Row]:
    """Returns every row by name, in an order in which none comes before the one that it begins with.

    Args:
        num_actions: of the game.
        temperature: of the teacher's own policy.
    """
    sharp = ForwardKL(temperature * SHARPENED)
    sizes = {size: make_student(size, num_actions) for size in get_args(Size)}
    num_bytes = {size: len(packed_weights(student)) for size, student in sizes.items()}
    num = {size: num_parameters(student) for size, student in sizes.items()}
    rows = [
        Row(TEACHER, "teacher", "teacher", Unchanged()),
        *(Row(_word(size), size, "distilled", Distilled(size)) for size in sizes),
        *(int8(begun, begun) for begun in (TEACHER, "25%", "7%", "4%", "1%", "half")),
        *(int8_weights(begun, begun) for begun in (TEACHER, "7%")),
        *(
            Row(f"hard-{_word(s)}", f"{s}, hard labels", "hard labels", hard_labels(s))
            for s in ("7%", "1%", "0.3%", "0.1%")
        ),
        *(
            Row(f"sharp-{_word(s)}", f"{s}, sharp targets", "sharpened", Distilled(s, sharp))
            for s in ("1%", "0.3%", "0.1%")
        ),
        *(
            Row(
                f"magnitude-{_word(s)}",
                f"magnitude, bytes of {s}",
                "magnitude",
                Magnitude(num_bytes[s]),
                store="sparse",
            )
            for s in ("25%", "7%", "1%")
        ),
        *(
            Row(f"structured-{_word(s)}", f"structured, parameters of {s}", "structured", Structured(num[s]))
            for s in ("25%", "7%", "1%")
        ),
        Row("low-rank-25pct", "rank 94, parameters of 25%", "low rank", LowRank(94)),
        Row("low-rank-7pct", "rank 8, parameters of 7%", "low rank", LowRank(8)),
        Row("7pct-structured", "7%, structured to half", "combined", Structured(num["7%"] // 2), "7pct"),
        Row("7pct-structured-int8", "7%, structured to half, int8", "combined", Unchanged(), "7pct-structured", "int8"),
        Row("7pct-magnitude", "7%, magnitude to half", "combined", Magnitude(num_bytes["7%"] // 2), "7pct", "sparse"),
        Row(
            "7pct-magnitude-int8",
            "7%, magnitude to half, int8",
            "combined",
            Unchanged(),
            "7pct-magnitude",
            "sparse-int8",
        ),
    ]
    return {row.name: row for row in rows}


def int8(label: str, begins_with: str) -> Row:
    """Returns the row of another row's network in int8."""
    word = _word(begins_with)
    return Row(f"{word}-int8", f"{label}, int8", "int8", Unchanged(), word, "int8")


def int8_weights(label: str, begins_with: str) -> Row:
    """Returns the row of another row's network with weights of int8 that computes in float32."""
    word = _word(begins_with)
    return Row(f"{word}-int8-weights", f"{label}, int8 weights", "int8", Unchanged(), word, "int8-weights")


def lineage(row: Row, rows: Mapping[str, Row]) -> tuple[str, ...]:
    """Returns the names of the rows that one goes back to, the next first; of one that begins at random, none."""
    if row.name == TEACHER or isinstance(row.make, Distilled):
        return ()
    return (row.begins_with, *lineage(rows[row.begins_with], rows))


def origin(row: Row, rows: Mapping[str, Row]) -> Origin:
    """Returns what a row's network was born from."""
    first = rows[[row.name, *lineage(row, rows)][-1]]
    if not isinstance(first.make, Distilled):
        return "teacher"
    return "hard labels" if first.family == "hard labels" else "distillation"


def updates_in_all(row: Row, rows: Mapping[str, Row], updates: int) -> int:
    """Returns the gradient steps behind a row's network, each fit taking `updates`: those of its lineage with them."""
    fitted = [name for name in (row.name, *lineage(row, rows)) if not isinstance(rows[name].make, Unchanged)]
    return updates * len(fitted)


def _word(size: str) -> str:
    return size.replace("%", "pct")


def chosen(rows: dict[str, Row], names: Iterable[str]) -> list[Row]:
    """Returns the rows of these names (of none: all) and those that they begin with, in order.

    Raises:
        ValueError: no such row.
    """
    wanted = set(names) or set(rows)
    if unknown := sorted(wanted - rows.keys()):
        raise ValueError(f"--rows {', '.join(unknown)}: choose from {', '.join(rows)}")
    while more := {rows[name].begins_with for name in wanted} - wanted:
        wanted |= more
    return [row for name, row in rows.items() if name in wanted]


def check_order(rows: Sequence[Row]) -> None:
    """Raises ValueError where a row begins with one that is not there or comes after it, or a name comes twice."""
    seen: set[str] = set()
    for row in rows:
        if row.name in seen:
            raise ValueError(f"two rows are called {row.name}; give each its own name")
        if row.begins_with not in seen | ({TEACHER} if row.name == TEACHER else set()):
            raise ValueError(f"the row {row.name} begins with {row.begins_with}, which does not stand before it")
        seen.add(row.name)
