"""Weights of losses and of states, against torch.distributions and by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from policykd.losses import Batch, ForwardKL, LogitMSE, PolicyLoss, TwoSidedKL
from policykd.methods.state_weights import (
    ByDisagreement,
    ByEntropy,
    ByGap,
    StateWeight,
    WeightedStates,
    weigh_states,
)
from policykd.schedules import Linear, Progress

Formula = Callable[[Tensor, Tensor], Tensor]


def scores(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sureness_B(s: Tensor, t: Tensor) -> Tensor:
    entropy_B: Tensor = Categorical(logits=t).entropy()
    return 1.0 - entropy_B / math.log(6)


def gap_B(s: Tensor, t: Tensor) -> Tensor:
    p_BA = t.softmax(dim=1).sort(dim=1, descending=True).values
    return p_BA[:, 0] - p_BA[:, 1]


def total_variation_B(s: Tensor, t: Tensor) -> Tensor:
    """The largest difference of the two in the probability of any set of actions, over all 64 sets."""
    sets = torch.tensor([[i >> a & 1 for a in range(6)] for i in range(64)], dtype=torch.float64)
    return ((s.softmax(dim=1) - t.softmax(dim=1)) @ sets.T).amax(dim=1)


CASES: list[tuple[StateWeight, Formula]] = [
    (ByEntropy(floor=0.0), sureness_B),
    (ByEntropy(0.2), lambda s, t: 0.1 + 0.9 * sureness_B(s, t / 0.2)),
    (ByGap(floor=0.0), gap_B),
    (ByGap(0.2, floor=0.3), lambda s, t: 0.3 + 0.7 * gap_B(s, t / 0.2)),
    (ByDisagreement(floor=0.0), total_variation_B),
    (ByDisagreement(0.2), lambda s, t: 0.1 + 0.9 * total_variation_B(s, t / 0.2)),
]
WEIGHTS = [weight for weight, _ in CASES]


def check_formula(weight: Formula, formula: Formula) -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    torch.testing.assert_close(weight(student_BA, teacher_BA), formula(student_BA, teacher_BA))


@pytest.mark.parametrize(("weight", "formula"), CASES, ids=[repr(weight) for weight in WEIGHTS])
def test_agrees_with_a_formula_written_another_way(weight: StateWeight, formula: Formula) -> None:
    check_formula(lambda s, t: weight(s, t, 1.0, 0.0), formula)


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_one_number_a_row_between_0_and_1_whatever_the_batch(weight: StateWeight) -> None:
    extremes_BA = torch.tensor([[0.0] * 6, [1e6, -1e6, 0.0, 0.0, 0.0, 0.0], [1e6] * 6], dtype=torch.float64)
    student_BA = torch.cat([scores(8, 6), extremes_BA, -extremes_BA])
    teacher_BA = torch.cat([scores(8, 6, seed=1), extremes_BA, extremes_BA])
    for number in (torch.float64, torch.float32):
        weight_B = weight(student_BA.to(number), teacher_BA.to(number), 1.0, 0.0)
        assert weight_B.shape == (14,)
        assert ((weight_B >= 0) & (weight_B <= 1)).all()
        for i in range(14):
            alone_B = weight(student_BA[i : i + 1].to(number), teacher_BA[i : i + 1].to(number), 1.0, 0.0)
            torch.testing.assert_close(alone_B, weight_B[i : i + 1])


def test_the_ends_of_each_measure() -> None:
    sure_BA, even_BA = torch.tensor([[1e6, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    two_BA = torch.tensor([[1e6, 1e6, 0.0, 0.0]])
    for weight in (ByEntropy(), ByGap()):
        assert weight(even_BA, sure_BA, 1.0, 0.0).item() == pytest.approx(1.0)
        assert weight(even_BA, even_BA, 1.0, 0.0).item() == pytest.approx(0.1)
    seven_BA = torch.zeros(1, 7)  # whose float32 entropy is above log 7
    assert ByEntropy(floor=0.0)(seven_BA, seven_BA, 1.0, 0.0).item() == 0.0
    assert ByEntropy(floor=0.0)(even_BA, two_BA, 1.0, 0.0).item() == pytest.approx(0.5)
    assert ByGap(floor=0.0)(even_BA, two_BA, 1.0, 0.0).item() == 0.0
    assert ByDisagreement()(sure_BA, sure_BA, 1.0, 0.0).item() == pytest.approx(0.1)
    assert ByDisagreement()(-sure_BA, sure_BA, 1.0, 0.0).item() == pytest.approx(1.0)
    assert ByDisagreement(floor=0.0)(even_BA, sure_BA, 1.0, 0.0).item() == pytest.approx(0.75)


def test_the_gap_of_two_q_values_is_a_hyperbolic_tangent() -> None:
    """The number of ByGap's docstring."""
    teacher_BA = torch.tensor([[1.0, 0.99, -5.0]])
    assert ByGap(0.01, floor=0.0)(teacher_BA, teacher_BA, 1.0, 0.0).item() == pytest.approx(math.tanh(0.5), abs=1e-5)
    assert math.tanh(0.5) == pytest.approx(0.46, abs=5e-3)


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_no_gradient_flows_through_a_weight(weight: StateWeight) -> None:
    teacher_BA = scores(4, 6, seed=1)
    student_BA = scores(4, 6).requires_grad_()
    assert not weight(student_BA, teacher_BA, 1.0, 0.0).requires_grad
    (whole_BA,) = torch.autograd.grad(
        WeightedStates(ForwardKL(), weight).per_state(student_BA, teacher_BA, 1.0, 0.0).sum(), student_BA
    )
    (plain_BA,) = torch.autograd.grad(ForwardKL().per_state(student_BA, teacher_BA, 1.0, 0.0).sum(), student_BA)
    torch.testing.assert_close(whole_BA, weight(student_BA, teacher_BA, 1.0, 0.0)[:, None] * plain_BA)


def test_a_weight_of_ones_own_is_a_constant_to_the_gradient_too() -> None:
    teacher_BA = scores(4, 6, seed=1)
    student_BA = scores(4, 6).requires_grad_()
    weighted_B = WeightedStates(ForwardKL(), lambda s, t, *_: s[:, 0]).per_state(student_BA, teacher_BA, 1.0, 0.0)
    (gradient_BA,) = torch.autograd.grad(weighted_B.sum(), student_BA)
    (plain_BA,) = torch.autograd.grad(ForwardKL().per_state(student_BA, teacher_BA, 1.0, 0.0).sum(), student_BA)
    torch.testing.assert_close(gradient_BA, student_BA.detach()[:, :1] * plain_BA)


@pytest.mark.parametrize(
    "loss",
    [
        WeightedStates(ForwardKL(), ByEntropy()),
        WeightedStates(LogitMSE(), ByGap()),
        WeightedStates(TwoSidedKL(), ByGap()),
    ],
    ids=repr,
)
def test_a_weighted_loss_is_a_loss(loss: PolicyLoss) -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    loss_B = loss.per_state(student_BA, teacher_BA, 1.0, 0.0)
    assert loss_B.shape == (8,)
    for i in range(8):
        torch.testing.assert_close(
            loss.per_state(student_BA[i : i + 1], teacher_BA[i : i + 1], 1.0, 0.0), loss_B[i : i + 1]
        )
    assert torch.autograd.gradcheck(lambda s: loss.per_state(s, teacher_BA, 1.0, 0.0), (student_BA.requires_grad_(),))


def test_the_teachers_temperature_reaches_what_is_inside() -> None:
    student_BA = scores(8, 6)
    teacher_BA = scores(8, 6, seed=1, scale=0.01)
    open_loss = TwoSidedKL(4.0)
    fixed_loss = TwoSidedKL(4.0, 0.01)
    for left_open, fixed in (
        (open_loss, fixed_loss),
        (WeightedStates(open_loss, ByEntropy()), WeightedStates(fixed_loss, ByEntropy(0.01))),
        (WeightedStates(open_loss, ByGap(floor=Linear(1.0, 0.0))), WeightedStates(fixed_loss, ByGap(0.01, floor=0.25))),
    ):
        found_B = left_open.per_state(student_BA, teacher_BA, 0.01, 0.75)
        torch.testing.assert_close(found_B, fixed.per_state(student_BA, teacher_BA, 1.0, 0.0))


def test_weighted_states_plug_into_the_loop() -> None:
    student = torch.nn.Linear(6, 6)
    obs, teacher_BA = scores(8, 6).float(), scores(8, 6, seed=1).float()
    rows_B = torch.arange(8)
    batch = Batch(obs, teacher_BA, rows_B, 0.5, Progress(0.5), rows_B)
    loss = weigh_states(ForwardKL(), "gap", Linear(0.4, 0.0))
    loss_B, metrics = loss(student, batch)
    torch.testing.assert_close(loss_B, loss.per_state(student(obs), teacher_BA, 0.5, 0.5))
    torch.testing.assert_close(metrics["state_weight"], ByGap(0.5, floor=0.2)(obs, teacher_BA, 1.0, 0.0))
    assert weigh_states(ForwardKL(), "none", 0.1) == ForwardKL()


def test_numbers_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], not 1\.5"):
        ByGap(floor=1.5)
    with pytest.raises(ValueError, match="temperature must be at least"):
        ByEntropy(0.0)


ATTACKS: dict[str, tuple[StateWeight, Formula]] = {
    "entropy: not normalised": (ByEntropy(floor=0.0), lambda s, t: 1.0 - Categorical(logits=t).entropy()),
    "entropy: the other way round": (ByEntropy(floor=0.0), lambda s, t: 1.0 - sureness_B(s, t)),
    "entropy: of the student": (ByEntropy(floor=0.0), lambda s, t: sureness_B(t, s)),
    "entropy: the temperature forgotten": (ByEntropy(0.2), lambda s, t: ByEntropy()(s, t, 1.0, 0.0)),
    "gap: of the scores": (ByGap(floor=0.0), lambda s, t: t.topk(2).values[:, 0] - t.topk(2).values[:, 1]),
    "gap: to the worst": (ByGap(floor=0.0), lambda s, t: t.softmax(1).amax(1) - t.softmax(1).amin(1)),
    "disagreement: not halved": (ByDisagreement(floor=0.0), lambda s, t: (s.softmax(1) - t.softmax(1)).abs().sum(1)),
    "disagreement: both tempered": (ByDisagreement(0.2), lambda s, t: ByDisagreement()(s / 0.2, t / 0.2, 1.0, 0.0)),
}
FORMULAS = dict(CASES)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_check_notices_a_faulty_weight(name: str) -> None:
    weight, faulty = ATTACKS[name]
    with pytest.raises(AssertionError):
        check_formula(faulty, FORMULAS[weight])
