"""Quantities that change over a run: functions of its progress from 0 to 1, or of what it has measured.

A field of a frozen dataclass that may hold either a number or a schedule is a `Quantity`; `at` returns the dataclass
with numbers alone, so that the formulas never know of time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What a run has measured so far, for schedules that answer to it; returns are episodic and unclipped."""

    student_return: float | None = None
    """mean of the student's latest games of its own; None before there is one"""
    teacher_return: float | None = None
    random_return: float = 0.0
    """of play at random: what counts as nothing"""


NOTHING = Measured()


class Schedule(Protocol):
    """A number for every moment of a run."""

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns the value at `progress`, from 0 (start) to 1 (end)."""
        ...


class Varying:
    """Marks what stands in a dataclass's field for a number that changes: subclass it for a schedule of your own."""


Quantity = float | Schedule


@dataclass(frozen=True)
class Constant(Varying):
    """The same number at every time."""

    value: float

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns the number."""
        return self.value


@dataclass(frozen=True)
class _Ramp(Varying):
    start: float
    """at the beginning of the run"""
    end: float
    """from `until` on"""
    until: float = 1.0
    """share of the run after which nothing changes any more"""

    def __post_init__(self) -> None:
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"a schedule changes until a share of the run in (0, 1], not {self.until}")

    def share(self, progress: float) -> float:
        """Returns how much of the way is done, from 0 to 1."""
        return min(1.0, max(0.0, progress / self.until))


@dataclass(frozen=True)
class Linear(_Ramp):
    """Goes from `start` to `end` in a straight line."""

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns start + share (end - start)."""
        return self.start + self.share(progress) * (self.end - self.start)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Goes from `start` to `end` along half a cosine (Loshchilov & Hutter, 2017): slowly at both ends."""

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns end + (start - end) (1 + cos(pi share)) / 2."""
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self.share(progress)))


@dataclass(frozen=True)
class Exponential(_Ramp):
    """Goes from `start` to `end` by the same factor at every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start * self.end > 0.0:
            raise ValueError(f"an exponential schedule cannot reach or cross 0: from {self.start} to {self.end}")

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns start (end / start)^share."""
        return self.start * math.exp(self.share(progress) * math.log(self.end / self.start))


@dataclass(frozen=True)
class WarmupCosine(Varying):
    """Rises linearly to `peak`, then falls to zero along half a cosine (Loshchilov & Hutter, 2017)."""

    peak: float
    """the highest value"""
    warmup: float = 0.02
    """share of the run that it rises for"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must lie in [0, 1), not {self.warmup}")

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns the value at `progress`."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup)))


@dataclass(frozen=True)
class ReturnGap(Varying):
    """Falls as the student's return comes near the teacher's, to 0 where it is as good (QDagger; Agarwal et al., 2022).

    With `random_return` 0 this is the paper's max(1 - G_student / G_teacher, 0), which means nothing where returns are
    negative, as a beginner's are in Pong; against random play it falls from 1 to 0 in every game.
    """

    weight: float = 1.0
    """while the student is no better than chance, or has not played yet"""

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns weight clip(1 - (G_student - G_random) / (G_teacher - G_random), 0, 1).

        Raises:
            ValueError: the teacher's return is not known, or no better than random play's.
        """
        return self.weight * (1.0 - reached(measured))


@dataclass(frozen=True)
class ReturnReached(Varying):
    """Goes from `start` to `end` as the student's return does from random play's to the teacher's."""

    start: float
    """while the student is no better than chance, or has not played yet"""
    end: float
    """where it is as good as its teacher"""

    def __call__(self, progress: float, measured: Measured = NOTHING, /) -> float:
        """Returns start + (end - start) clip((G_student - G_random) / (G_teacher - G_random), 0, 1).

        Raises:
            ValueError: the teacher's return is not known, or no better than random play's.
        """
        return self.start + (self.end - self.start) * reached(measured)


def reached(measured: Measured) -> float:
    """Returns how far the student has come from random play (0) to its teacher (1), never less or more.

    Raises:
        ValueError: the teacher's return is not known, or no better than random play's.
    """
    teacher, random = measured.teacher_return, measured.random_return
    if teacher is None or teacher <= random:
        raise ValueError(
            f"a schedule that follows the return needs a teacher that beats random play, not {teacher} against"
            f" {random}; use one that follows the run's progress"
        )
    if measured.student_return is None:
        return 0.0
    return min(1.0, max(0.0, (measured.student_return - random) / (teacher - random)))


def value(quantity: Quantity, progress: float, measured: Measured = NOTHING) -> float:
    """Returns what a quantity is now."""
    return float(quantity) if isinstance(quantity, int | float) else quantity(progress, measured)


def at(thing: T, progress: float, measured: Measured = NOTHING) -> T:
    """Returns a frozen dataclass with every schedule in its fields, and in theirs, replaced by its number."""
    if isinstance(thing, tuple):
        parts = tuple(_now(part, progress, measured) for part in thing)
        return thing if all(a is b for a, b in zip(parts, thing, strict=True)) else parts  # type: ignore[return-value]
    if not is_dataclass(thing) or isinstance(thing, type):
        return thing
    now = {f.name: _now(getattr(thing, f.name), progress, measured) for f in fields(thing) if f.init}
    changed = {name: part for name, part in now.items() if part is not getattr(thing, name)}
    return replace(thing, **changed) if changed else thing


def scheduled(thing: object, prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    """Yields the schedules in a dataclass with the names of their fields, such as `temperature` or `weight.floor`."""
    parts: list[tuple[str, Any]] = []
    if isinstance(thing, tuple):
        parts = [(str(i), part) for i, part in enumerate(thing)]
    elif is_dataclass(thing) and not isinstance(thing, type):
        parts = [(f.name, getattr(thing, f.name)) for f in fields(thing)]
    for name, part in parts:
        if isinstance(part, Varying):
            yield prefix + name, part  # type: ignore[misc]
        else:
            yield from scheduled(part, f"{prefix}{name}.")


def values(thing: object, progress: float, measured: Measured = NOTHING, prefix: str = "") -> dict[str, float]:
    """Returns what every schedule in a dataclass is now, by its field's name: the curves of a run."""
    return {name: schedule(progress, measured) for name, schedule in scheduled(thing, prefix)}


def parse(text: str) -> Quantity:
    """Returns the quantity that a command line spells: `0.5`, `linear:1:0`, `cosine:4:1:0.5`, `gap:3`.

    Raises:
        ValueError: no number and no schedule.
    """
    kind, *numbers = text.split(":")
    try:
        if not all(math.isfinite(float(n)) for n in numbers or [text]):
            raise ValueError("finite numbers are needed")
        return SPELLED[kind](*(float(n) for n in numbers)) if numbers else float(text)
    except (KeyError, TypeError, ValueError) as error:
        known = "linear:START:END[:UNTIL], cosine:..., exponential:..., gap:WEIGHT, reached:START:END"
        why = f" ({error})" if isinstance(error, ValueError) and "convert" not in str(error) else ""
        raise ValueError(f"{text!r} is neither a number nor a schedule{why}; write {known}") from error


def spelled(quantity: Quantity) -> str:
    """Returns how a command line spells a quantity."""
    if isinstance(quantity, int | float):
        return f"{quantity:g}"
    kind = next(kind for kind, made in SPELLED.items() if isinstance(quantity, made))
    numbers = [getattr(quantity, f.name) for f in fields(quantity)]  # type: ignore[arg-type]
    return ":".join([kind, *(f"{number:g}" for number in numbers)])


def _now(part: Any, progress: float, measured: Measured) -> Any:
    return part(progress, measured) if isinstance(part, Varying) else at(part, progress, measured)  # type: ignore[operator]


SPELLED: dict[str, Any] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "gap": ReturnGap,
    "reached": ReturnReached,
}
