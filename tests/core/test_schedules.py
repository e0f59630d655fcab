"""Quantities that change: at their ends and between, in a dataclass's fields, on a command line."""

from dataclasses import dataclass

import pytest

from policykd.legacy.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Measured,
    Quantity,
    ReturnGap,
    ReturnReached,
    Schedule,
    WarmupCosine,
    at,
    parse,
    spelled,
    value,
    values,
)


def test_anchors() -> None:
    rate = WarmupCosine(2.0, warmup=0.2)
    assert rate(0.0) == 0.0
    assert rate(0.1) == pytest.approx(1.0)
    assert rate(0.2) == pytest.approx(2.0)
    assert rate(0.6) == pytest.approx(1.0)
    assert rate(1.0) == pytest.approx(0.0)


def test_it_rises_then_falls() -> None:
    values = [WarmupCosine(1.0)(i / 1000) for i in range(1001)]
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert top == 20


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(3.0), (3.0, 3.0, 3.0)),
        (Linear(4.0, 1.0), (4.0, 2.5, 1.0)),
        (Linear(0.0, 1.0, 0.5), (0.0, 1.0, 1.0)),
        (Cosine(4.0, 1.0), (4.0, 2.5, 1.0)),
        (Exponential(4.0, 1.0), (4.0, 2.0, 1.0)),
        (Exponential(-1.0, -0.01), (-1.0, -0.1, -0.01)),
    ],
    ids=repr,
)
def test_start_middle_and_end(schedule: Schedule, expected: tuple[float, ...]) -> None:
    assert [schedule(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(expected)
    assert schedule(1.5) == pytest.approx(expected[2])  # behind the end nothing changes


def test_a_cosine_is_slow_at_both_ends() -> None:
    cosine, linear = Cosine(1.0, 0.0), Linear(1.0, 0.0)
    assert cosine(0.25) == pytest.approx(0.8535534)
    assert cosine(0.25) > linear(0.25)
    assert cosine(0.75) < linear(0.75)


@pytest.mark.parametrize(
    ("student", "gap"), [(None, 1.0), (-21.0, 1.0), (-20.0, 1.0), (0.0, 0.5), (20.0, 0.0), (21.0, 0.0)]
)
def test_feedback_follows_the_return(student: float | None, gap: float) -> None:
    measured = Measured(student, teacher_return=20.0, random_return=-20.0)
    assert ReturnGap(3.0)(0.7, measured) == pytest.approx(3.0 * gap)
    assert ReturnReached(0.2, 1.0)(0.7, measured) == pytest.approx(0.2 + 0.8 * (1.0 - gap))


def test_against_zero_the_gap_is_qdaggers() -> None:
    """max(1 - G_S / G_T, 0) (Agarwal et al., 2022)."""
    for student in (0.0, 100.0, 300.0, 500.0):
        assert ReturnGap(1.0)(0.0, Measured(student, 400.0)) == pytest.approx(max(1.0 - student / 400.0, 0.0))


@pytest.mark.parametrize("measured", [Measured(1.0), Measured(1.0, -21.0, -20.0)])
def test_feedback_needs_a_teacher_that_beats_chance(measured: Measured) -> None:
    with pytest.raises(ValueError, match="needs a teacher that beats random play"):
        ReturnGap(1.0)(0.0, measured)


@dataclass(frozen=True)
class Inner:
    floor: Quantity = 0.5


@dataclass(frozen=True)
class Outer:
    weight: Quantity
    inner: Inner
    parts: tuple[Inner, ...] = ()
    name: str = "x"


def test_a_dataclass_at_a_moment_holds_numbers() -> None:
    outer = Outer(Linear(1.0, 0.0), Inner(Cosine(0.0, 2.0)), (Inner(), Inner(Constant(7.0))))
    now = at(outer, 0.5)
    assert now == Outer(0.5, Inner(1.0), (Inner(0.5), Inner(7.0)))
    assert values(outer, 0.5, prefix="loss.") == pytest.approx(
        {"loss.weight": 0.5, "loss.inner.floor": 1.0, "loss.parts.1.floor": 7.0}
    )
    assert at(now, 0.9) is now
    assert not values(now, 0.5)
    assert at((outer, "rest"), 1.0) == (Outer(0.0, Inner(2.0), (Inner(0.5), Inner(7.0))), "rest")


def test_what_is_no_dataclass_stays_what_it_is() -> None:
    def loss() -> None: ...

    assert at(loss, 0.5) is loss
    assert values(loss, 0.5) == {}
    assert value(0.25, 0.9) == 0.25
    assert value(Linear(0.0, 1.0), 0.9) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("constant:2", Constant(2.0)),
        ("linear:1:0", Linear(1.0, 0.0)),
        ("linear:0:1:0.3", Linear(0.0, 1.0, 0.3)),
        ("cosine:4:1", Cosine(4.0, 1.0)),
        ("exponential:1:0.01", Exponential(1.0, 0.01)),
        ("gap:3", ReturnGap(3.0)),
        ("reached:0:1", ReturnReached(0.0, 1.0)),
    ],
)
def test_spelling(text: str, expected: Quantity) -> None:
    assert parse(text) == expected
    assert parse(spelled(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "linear", "linear:1", "linear:1:x", "gap:1:2:3", "exponential:1:0", "ramp:1:2"]
)
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a number nor a schedule"):
        parse(text)


@pytest.mark.parametrize("until", [0.0, -1.0, 1.5])
def test_an_end_outside_the_run_is_refused(until: float) -> None:
    with pytest.raises(ValueError, match="a share of the run"):
        Linear(1.0, 0.0, until)
