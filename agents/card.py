"""Metadata of teachers and students, typed: the cards next to archives, and the provenance in student.json."""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated

from pydantic import Field, JsonValue

MAX_CARD_BYTES = 4 << 20
"""10,000 episodes under two protocols take 0.5 MB"""

# A card may come from anybody, so every field has a bound.
Text = Annotated[str, Field(max_length=500)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Return = Annotated[float, Field(gt=-1e12, lt=1e12, allow_inf_nan=False)]
"""an episodic return; NaN and infinity are refused"""


@dataclass(frozen=True)
class CardProtocol:
    """Episodes of one evaluation protocol, as an evaluator recorded them on a card."""

    returns: Annotated[tuple[Return, ...], Field(min_length=1)]
    """episodic returns, unclipped"""
    lengths: tuple[Count, ...] = ()
    """agent steps of each episode; empty if not recorded"""
    num_truncated: Count = 0
    num_unfinished: Count = 0

    @property
    def mean(self) -> float:
        """Mean episodic return."""
        return sum(self.returns) / len(self.returns)


@dataclass(frozen=True, kw_only=True)
class TeacherRecord:
    """Identity of a teacher, as recorded in the files of a run."""

    ref: Text
    """reference that `load_teacher` takes"""
    sha256: Text
    """hash of the archive"""
    revision: Text = ""
    """commit on the Hub"""
    algorithm: Text = ""
    file: Text = ""
    """name of the archive, without its folder"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Metadata of a teacher: FILE.json next to FILE.zip, or what an rl-zoo folder's own files contain.

    Unknown fields of a card are ignored. Everything has a default, since most archives come without a card.
    """

    game: Text = ""
    algorithm: Text = ""
    sha256: Text = ""
    """hash of the archive that the card describes"""
    reported_return: Return | None = None
    """mean episodic return from an evaluation without recorded episodes"""
    protocols: dict[str, CardProtocol] = field(default_factory=dict)
    """recorded episodes by protocol, such as noop_sampled"""
    policy: Text = ""
    agent_steps: Count | None = None
    """training length: agent steps"""
    updates: Count | None = None
    """training length: gradient updates"""
    wall_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    command: str = ""
    """training command"""
    settings: dict[str, JsonValue] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    members: tuple[TeacherRecord, ...] = ()
    """members of an ensemble"""
    weights: str = ""
    """weights of those members"""

    def __post_init__(self) -> None:
        # Returns are evidence about one file: without its hash they could be those of another agent.
        if self.protocols and not self.sha256:
            raise ValueError("protocols without the sha256 of the archive that played them")

    def with_defaults(self, other: "Card") -> "Card":
        """Returns the card with the fields that it leaves at their defaults taken from another card."""
        # A field is unset if it equals an empty card's.
        empty = Card()
        unset = [f.name for f in fields(self) if getattr(self, f.name) == getattr(empty, f.name)]
        return replace(self, **{name: getattr(other, name) for name in unset})


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of a student, recorded in student.json next to its shape and hash."""

    game: Text = ""
    teacher: TeacherRecord | None = None
    command: str = ""
    made_by: str = ""
    """compression that made it, with its settings"""
    fit_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """wall-clock seconds that this took"""
