"""Schedules: quantities that change over a run, as functions of its progress.

A `Quantity` is a number or a function `progress -> float`; a number is accepted wherever a schedule is. The frozen
dataclasses below are such functions. They compare and print by value, so that a run's config can hold them as text
(`linear:4:1`); a lambda of yours works in Python too, but cannot be written to a config file.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass


class Progress(float):
    """Fraction of the run that is done, from 0.0 to 1.0, with the returns that a schedule may follow.

    All returns are mean episodic returns with unclipped rewards.
    """

    student_return: float | None
    """return of the student over its latest own episodes; None before there are any"""
    teacher_return: float | None
    random_return: float
    """return of a random policy, which counts as no skill at all"""

    def __new__(
        cls,
        fraction: float,
        student_return: float | None = None,
        teacher_return: float | None = None,
        random_return: float = 0.0,
    ) -> "Progress":
        """Returns a number that also carries the returns."""
        progress = super().__new__(cls, fraction)
        progress.student_return = student_return
        progress.teacher_return = teacher_return
        progress.random_return = random_return
        return progress

    @property
    def return_progress(self) -> float:
        """The student's return between a random policy's (0.0) and its teacher's (1.0), clipped to [0, 1].

        Raises:
            ValueError: the teacher's return is unknown, or no better than a random policy's.
        """
        if self.teacher_return is None or self.teacher_return <= self.random_return:
            raise ValueError(
                "a schedule that follows the return needs a teacher that beats a random policy, not"
                f" {self.teacher_return} against {self.random_return}; use one that follows the run's progress"
            )
        # Before its first episode the student counts as a random policy, so that a run has a defined beginning.
        if self.student_return is None:
            return 0.0
        reached = (self.student_return - self.random_return) / (self.teacher_return - self.random_return)
        return min(1.0, max(0.0, reached))


class Schedule:
    """Base class of the schedules that can be spelled on a command line and drawn as curves."""

    def __call__(self, progress: float, /) -> float:
        """Returns the value at `progress`, from 0.0 (start) to 1.0 (end)."""
        raise NotImplementedError


Quantity = float | Callable[[Progress], float]


@dataclass(frozen=True)
class Constant(Schedule):
    """A fixed number."""

    value: float

    def __call__(self, progress: float, /) -> float:
        """Returns the number."""
        return self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    """value at the beginning of the run"""
    end: float
    """value from `until` on"""
    until: float = 1.0
    """fraction of the run after which the value stays the same"""

    def __post_init__(self) -> None:
        if not 0.0 < self.until <= 1.0:
            raise ValueError(f"a schedule's last number is a fraction of the run in (0, 1], not {self.until}")

    def ramp_progress(self, progress: float) -> float:
        return min(1.0, max(0.0, progress / self.until))


@dataclass(frozen=True)
class Linear(_Ramp):
    """Linear interpolation from `start` to `end`."""

    def __call__(self, progress: float, /) -> float:
        """Returns start + r (end - start), with r the progress of the ramp."""
        return self.start + self.ramp_progress(progress) * (self.end - self.start)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine from `start` to `end`: slow at both ends (Loshchilov & Hutter, 2017)."""

    def __call__(self, progress: float, /) -> float:
        """Returns end + (start - end) (1 + cos(pi r)) / 2, with r the progress of the ramp."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.ramp_progress(progress)))
        return self.end + (self.start - self.end) * cosine


@dataclass(frozen=True)
class Exponential(_Ramp):
    """Exponential decay or growth from `start` to `end`: the same factor per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start * self.end > 0.0:
            raise ValueError(f"an exponential schedule must not reach or cross 0: from {self.start} to {self.end}")

    def __call__(self, progress: float, /) -> float:
        """Returns start (end / start)^r, with r the progress of the ramp."""
        return self.start * math.exp(self.ramp_progress(progress) * math.log(self.end / self.start))


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up to `peak`, then half a cosine to zero (Loshchilov & Hutter, 2017)."""

    peak: float
    """maximum value"""
    warmup: float = 0.02
    """fraction of the run that the warm-up takes"""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must lie in [0, 1), not {self.warmup}")

    def __call__(self, progress: float, /) -> float:
        """Returns the value at `progress`."""
        # Adam's second moments are unreliable in the first updates; small steps keep them from mattering.
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup)))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up to `peak`, constant, then linear decay to zero (Zhai et al., 2022; Hägele et al., 2024)."""

    peak: float
    """maximum value"""
    decay: float = 0.3
    """fraction of the run that the decay takes"""
    warmup: float = 0.02
    """fraction of the run that the warm-up takes"""

    def __post_init__(self) -> None:
        if self.warmup < 0.0 or not 0.0 < self.decay <= 1.0 - self.warmup:
            raise ValueError(f"decay {self.decay} and warmup {self.warmup} must be positive and at most 1 together")

    def __call__(self, progress: float, /) -> float:
        """Returns the value at `progress`."""
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        return self.peak * min(1.0, (1.0 - progress) / self.decay)


@dataclass(frozen=True)
class ReturnGap(Schedule):
    """Weight that falls to 0 as the student's return approaches the teacher's (QDagger; Agarwal et al., 2022).

    With `random_return` 0 this is the paper's max(1 - G_student / G_teacher, 0), which has no meaning where returns are
    negative, as a beginner's are in Pong; relative to a random policy it falls from 1 to 0 in every game.
    """

    weight: float = 1.0
    """value while the student is no better than a random policy, or has not played yet"""

    def __call__(self, progress: float, /) -> float:
        """Returns weight clip(1 - (G_student - G_random) / (G_teacher - G_random), 0, 1)."""
        return self.weight * (1.0 - _with_returns(progress).return_progress)


@dataclass(frozen=True)
class ReturnReached(Schedule):
    """Linear interpolation from `start` to `end` as the student's return rises to its teacher's."""

    start: float
    """value while the student is no better than a random policy, or has not played yet"""
    end: float
    """value once it is as good as its teacher"""

    def __call__(self, progress: float, /) -> float:
        """Returns start + (end - start) clip((G_student - G_random) / (G_teacher - G_random), 0, 1)."""
        return self.start + (self.end - self.start) * _with_returns(progress).return_progress


def resolve(quantity: Quantity | None, progress: float, default: float = 1.0) -> float:
    """Returns the value of a quantity at a point of a run; `default` for None."""
    if quantity is None:
        return default
    return quantity(_with_returns(progress)) if callable(quantity) else float(quantity)


def check_bounds(name: str, quantity: Quantity | None, minimum: float, maximum: float = math.inf) -> None:
    """Checks a number, or a schedule's values all over a run, before the run begins.

    Raises:
        ValueError: a value outside [minimum, maximum], or not finite.
    """
    if quantity is None:
        return
    # Now, not in the round that reaches the value: a run would end after hours. Both ends of the student's return.
    probes = [
        Progress(i / 100, student_return, teacher_return=1.0) for i in range(101) for student_return in (0.0, 1.0)
    ]
    for value in (resolve(quantity, progress) for progress in probes):
        if not (minimum <= value <= maximum and math.isfinite(value)):
            bounds = f"at least {minimum:g}" if maximum == math.inf else f"in [{minimum:g}, {maximum:g}]"
            at = f" in {format_schedule(quantity)}" if isinstance(quantity, Schedule) else ""
            raise ValueError(f"{name} must be {bounds}, not {value:g}{at}")


def follows_return(*configs: object) -> bool:
    """Returns whether a schedule in these dataclasses depends on the student's return."""
    return any(isinstance(schedule, ReturnGap | ReturnReached) for c in configs for _, schedule in iter_schedules(c))


def iter_schedules(config: object, prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    """Yields the schedules in a dataclass, with names such as `temperature` or `weight.floor`."""
    # Depth first, in the order of the fields, so that names are stable from run to run.
    if isinstance(config, Schedule):
        yield prefix.removesuffix("."), config
    elif own := getattr(config, "iter_schedules", None):  # a loss function that is not a dataclass
        yield from own(prefix)
    elif isinstance(config, tuple):
        for i, part in enumerate(config):
            yield from iter_schedules(part, f"{prefix}{i}.")
    elif is_dataclass(config) and not isinstance(config, type):
        for field in fields(config):
            yield from iter_schedules(getattr(config, field.name), f"{prefix}{field.name}.")


def schedule_values(config: object, progress: float, prefix: str = "") -> dict[str, float]:
    """Returns the current value of every schedule in a dataclass, by name: the `schedule/` curves of a run."""
    return {name: schedule(progress) for name, schedule in iter_schedules(config, prefix)}


def parse_schedule(text: str) -> float | Schedule:
    """Returns the quantity that a command line spells: `0.5`, `linear:1:0`, `cosine:4:1:0.5`, `gap:3`.

    Raises:
        ValueError: neither a number nor a schedule.
    """
    # A number has no colon; everything else is KIND:NUMBER[:NUMBER...].
    kind, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers or [text]]
        if not all(map(math.isfinite, values)):
            raise ValueError("its numbers must be finite")
        return SCHEDULES[kind](*values) if numbers else values[0]
    except (KeyError, TypeError, ValueError) as error:
        # float() and the constructors' own messages about wrong arguments add nothing for the user.
        reason = f" ({error})" if isinstance(error, ValueError) and "convert" not in str(error) else ""
        known = "linear:START:END[:UNTIL], cosine:..., exponential:..., gap:WEIGHT, reached:START:END"
        raise ValueError(f"{text!r} is neither a number nor a schedule{reason}; write {known}") from error


def format_schedule(quantity: Quantity) -> str:
    """Returns the text from which `parse_schedule` makes the same quantity.

    Raises:
        ValueError: a function of the user's, which has no such text.
    """
    if isinstance(quantity, int | float):
        return _format_number(quantity)
    # The exact class: a subclass of the user's may compute something else from the same numbers.
    for kind, schedule_class in SCHEDULES.items():
        if type(quantity) is schedule_class:
            numbers = [getattr(quantity, field.name) for field in fields(quantity)]  # type: ignore[arg-type]
            return ":".join([kind, *(_format_number(number) for number in numbers)])
    raise ValueError(f"{quantity!r} is not one of the schedules that can be written as text: {', '.join(SCHEDULES)}")


def _format_number(number: float) -> str:
    # Six digits where they are enough, all of them where not: a config must give back the same number.
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def _with_returns(progress: float) -> Progress:
    return progress if isinstance(progress, Progress) else Progress(progress)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "warmup-cosine": WarmupCosine,
    "warmup-stable-decay": WarmupStableDecay,
    "gap": ReturnGap,
    "reached": ReturnReached,
}
