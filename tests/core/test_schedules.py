"""Quantities that change: at their ends and between, in a dataclass's fields, on a command line."""

from dataclasses import dataclass

import pytest

from policykd.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    Progress,
    Quantity,
    ReturnGap,
    ReturnReached,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
    check_bounds,
    follows_return,
    format_schedule,
    iter_schedules,
    parse_schedule,
    resolve,
    schedule_values,
)


def test_anchors() -> None:
    rate = WarmupCosine(2.0, warmup=0.2)
    assert rate(0.0) == 0.0
    assert rate(0.1) == pytest.approx(1.0)
    assert rate(0.2) == pytest.approx(2.0)
    assert rate(0.6) == pytest.approx(1.0)
    assert rate(1.0) == pytest.approx(0.0)


def test_a_rate_warms_up_stays_and_decays() -> None:
    rate = WarmupStableDecay(2.0, decay=0.4, warmup=0.1)
    assert [rate(x) for x in (0.0, 0.05, 0.1, 0.6, 0.8, 1.0)] == pytest.approx([0.0, 1.0, 2.0, 2.0, 1.0, 0.0])
    for decay, warmup in ((0.0, 0.1), (0.95, 0.1), (0.3, -0.1)):
        with pytest.raises(ValueError, match="must be positive and at most 1 together"):
            WarmupStableDecay(1.0, decay, warmup)


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
    progress = Progress(0.7, student, teacher_return=20.0, random_return=-20.0)
    assert ReturnGap(3.0)(progress) == pytest.approx(3.0 * gap)
    assert ReturnReached(0.2, 1.0)(progress) == pytest.approx(0.2 + 0.8 * (1.0 - gap))


def test_against_zero_the_gap_is_qdaggers() -> None:
    """max(1 - G_S / G_T, 0) (Agarwal et al., 2022)."""
    for student in (0.0, 100.0, 300.0, 500.0):
        assert ReturnGap(1.0)(Progress(0.0, student, 400.0)) == pytest.approx(max(1.0 - student / 400.0, 0.0))


@pytest.mark.parametrize("progress", [0.5, Progress(0.0, 1.0), Progress(0.0, 1.0, -21.0, -20.0)])
def test_feedback_needs_a_teacher_that_beats_a_random_policy(progress: float) -> None:
    with pytest.raises(ValueError, match="needs a teacher that beats a random policy"):
        ReturnGap(1.0)(progress)


@dataclass(frozen=True)
class Inner:
    floor: Quantity = 0.5


@dataclass(frozen=True)
class Outer:
    weight: Quantity
    inner: Inner
    parts: tuple[Inner, ...] = ()
    name: str = "x"


def test_the_schedules_of_a_config_are_found_by_the_names_of_their_fields() -> None:
    outer = Outer(Linear(1.0, 0.0), Inner(Cosine(0.0, 2.0)), (Inner(), Inner(Constant(7.0))))
    expected = {"loss.weight": 0.5, "loss.inner.floor": 1.0, "loss.parts.1.floor": 7.0}
    assert schedule_values(outer, 0.5, prefix="loss.") == pytest.approx(expected)
    assert [name for name, _ in iter_schedules(outer)] == ["weight", "inner.floor", "parts.1.floor"]
    assert schedule_values(lambda: None, 0.5) == {}
    assert not follows_return(outer)
    assert follows_return(outer, Outer(1.0, Inner(ReturnGap())))


def test_numbers_and_functions_are_quantities_alike() -> None:
    assert resolve(0.25, 0.9) == 0.25
    assert resolve(Linear(0.0, 1.0), 0.9) == pytest.approx(0.9)
    assert resolve(lambda progress: 1.0 - progress, 0.9) == pytest.approx(0.1)
    assert resolve(lambda progress: progress.student_return or -1.0, Progress(0.9, 5.0)) == 5.0
    assert resolve(None, 0.9, default=0.01) == 0.01


@pytest.mark.parametrize(
    "quantity", [1.5, float("nan"), Linear(0.0, 1.5), lambda progress: 2.0, ReturnReached(0.0, 2.0)]
)
def test_bounds_hold_all_over_a_run(quantity: Quantity) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        check_bounds("share", quantity, 0.0, 1.0)
    check_bounds("share", Linear(0.0, 1.0), 0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("constant:2", Constant(2.0)),
        ("0.1234567890123", 0.1234567890123),
        ("warmup-cosine:2e-3", WarmupCosine(2e-3)),
        ("warmup-stable-decay:2e-3", WarmupStableDecay(2e-3)),
        ("linear:1:0", Linear(1.0, 0.0)),
        ("linear:0:1:0.3", Linear(0.0, 1.0, 0.3)),
        ("cosine:4:1", Cosine(4.0, 1.0)),
        ("exponential:1:0.01", Exponential(1.0, 0.01)),
        ("gap:3", ReturnGap(3.0)),
        ("reached:0:1", ReturnReached(0.0, 1.0)),
    ],
)
def test_spelling(text: str, expected: Quantity) -> None:
    assert parse_schedule(text) == expected
    assert parse_schedule(format_schedule(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "linear", "linear:1", "linear:1:x", "gap:1:2:3", "exponential:1:0", "ramp:1:2"]
)
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a number nor a schedule"):
        parse_schedule(text)


@pytest.mark.parametrize("until", [0.0, -1.0, 1.5])
def test_an_end_outside_the_run_is_refused(until: float) -> None:
    with pytest.raises(ValueError, match="a fraction of the run"):
        Linear(1.0, 0.0, until)
