import pytest

from policykd.schedules import WarmupCosine


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
