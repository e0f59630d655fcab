"""Five properties for every loss, and the attacks that they must notice."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from policykd import losses
from policykd.agents.policy import log_policy
from policykd.losses import Batch, PolicyLoss, kl_divergence_B
from policykd.methods import divergences
from policykd.methods.divergences import standardize
from policykd.schedules import Linear, Progress

Formula = Callable[[Tensor, Tensor], Tensor]


def as_formula(kind: type[PolicyLoss]) -> Any:
    """Returns a loss class whose instances are called with outputs alone, for a teacher of temperature 1."""
    return type(kind.__name__, (kind,), {"__call__": lambda self, s, t: self.per_state(s, t, 1.0, 0.0)})


ForwardKL = as_formula(losses.ForwardKL)
ReverseKL = as_formula(losses.ReverseKL)
JensenShannon = as_formula(losses.JensenShannon)
TwoSidedKL = as_formula(losses.TwoSidedKL)
SoftAndHard = as_formula(losses.SoftAndHard)
LogitMSE = as_formula(losses.LogitMSE)
LogitHuber = as_formula(losses.LogitHuber)
ActionNLL = as_formula(losses.ActionNLL)
DecoupledKL = as_formula(divergences.DecoupledKL)
StandardizedKL = as_formula(divergences.StandardizedKL)


def scores(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl_B(p_BA: Tensor, q_BA: Tensor) -> Tensor:
    """Of two rows of logits, by torch.distributions."""
    return kl_divergence(Categorical(logits=p_BA), Categorical(logits=q_BA))


def nll_B(s: Tensor, t: Tensor) -> Tensor:
    log_prob_B: Tensor = Categorical(logits=s).log_prob(t.argmax(dim=1))
    return -log_prob_B


def mixed_kl_B(s: Tensor, t: Tensor, share: float) -> Tensor:
    p, q = Categorical(logits=t), Categorical(logits=s)
    m = Categorical(probs=share * p.probs + (1 - share) * q.probs)
    return share * kl_divergence(p, m) + (1 - share) * kl_divergence(q, m)


def decoupled_B(s: Tensor, t: Tensor, alpha: float, beta: float) -> Tensor:
    """Row by row, with a binary distribution and one over the actions that are left."""
    rows = []
    for p, q in zip(t.softmax(1), s.softmax(1), strict=True):
        best = int(p.argmax())
        rest = [a for a in range(len(p)) if a != best]
        which = kl_divergence(Categorical(probs=p[rest]), Categorical(probs=q[rest]))
        rows.append(alpha * kl_divergence(Bernoulli(p[best]), Bernoulli(q[best])) + beta * which)
    return torch.stack(rows)


def z(x: Tensor) -> Tensor:
    return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, unbiased=False, keepdim=True)


def huber_B(s: Tensor, t: Tensor, delta: float) -> Tensor:
    d = (s - t).abs()
    return torch.where(d <= delta, d**2 / 2, delta * (d - delta / 2)).mean(dim=1)


CASES: list[tuple[Any, Formula]] = [
    (ForwardKL(), lambda s, t: kl_B(t, s)),
    (ForwardKL(0.5), lambda s, t: kl_B(t / 0.5, s)),
    (ReverseKL(), lambda s, t: kl_B(s, t)),
    (ReverseKL(3.0), lambda s, t: kl_B(s, t / 3.0)),
    (JensenShannon(), lambda s, t: mixed_kl_B(s, t, 0.5)),
    (JensenShannon(0.5, teacher_share=0.2), lambda s, t: mixed_kl_B(s, t / 0.5, 0.2)),
    (TwoSidedKL(), lambda s, t: kl_B(t, s)),
    (TwoSidedKL(4.0, 0.5), lambda s, t: 16 * kl_B(t / 2.0, s / 4.0)),
    (SoftAndHard(), lambda s, t: 0.9 * kl_B(t, s) + 0.1 * nll_B(s, t)),
    (SoftAndHard(0.5, hard=0.3), lambda s, t: 0.7 * kl_B(t / 0.5, s) + 0.3 * nll_B(s, t)),
    (DecoupledKL(), lambda s, t: decoupled_B(s, t, 1.0, 1.0)),
    (DecoupledKL(4.0, 0.5, alpha=2.0, beta=8.0), lambda s, t: 16 * decoupled_B(s / 4.0, t / 2.0, 2.0, 8.0)),
    (StandardizedKL(), lambda s, t: 4 * kl_B(z(t) / 2.0, z(s) / 2.0)),
    (StandardizedKL(0.5), lambda s, t: 0.25 * kl_B(z(t) / 0.5, z(s) / 0.5)),
    (LogitMSE(), lambda s, t: torch.nn.functional.mse_loss(s, t, reduction="none").sum(dim=1) / 6),
    (LogitMSE(0.5), lambda s, t: torch.nn.functional.mse_loss(s / 2, t, reduction="none").sum(dim=1) / 6),
    (LogitHuber(), lambda s, t: huber_B(s, t, 1.0)),
    (LogitHuber(0.5, delta=0.3), lambda s, t: huber_B(s / 2, t, 0.3)),
    (ActionNLL(), nll_B),
]
LOSSES = [loss for loss, _ in CASES]


def check_formula(loss: Formula, formula: Formula) -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    torch.testing.assert_close(loss(student_BA, teacher_BA), formula(student_BA, teacher_BA))


def check_rows(loss: Formula) -> None:
    student_BA, teacher_BA = scores(16, 6), scores(16, 6, seed=1)
    loss_B = loss(student_BA, teacher_BA)
    assert loss_B.shape == (16,)
    for i in range(16):
        torch.testing.assert_close(loss(student_BA[i : i + 1], teacher_BA[i : i + 1]), loss_B[i : i + 1])


def check_least_at(loss: Formula, student_BA: Tensor, teacher_BA: Tensor, least: float | None = 0.0) -> None:
    """The loss there, a gradient of zero, and more at three students who differ."""
    student_BA = student_BA.clone().requires_grad_()
    loss_B = loss(student_BA, teacher_BA)
    (gradient_BA,) = torch.autograd.grad(loss_B.sum(), student_BA)
    torch.testing.assert_close(gradient_BA, torch.zeros_like(gradient_BA), atol=1e-7, rtol=0)
    if least is not None:
        torch.testing.assert_close(loss_B.detach(), torch.full((len(loss_B),), least, dtype=torch.float64))
    for seed in range(10, 13):
        assert (loss(student_BA + scores(*student_BA.shape, seed=seed), teacher_BA) > loss_B + 1e-4).all()


@pytest.mark.parametrize(("loss", "formula"), CASES, ids=[repr(loss) for loss in LOSSES])
def test_agrees_with_a_formula_written_another_way(loss: Any, formula: Formula) -> None:
    check_formula(loss, formula)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_one_number_a_row_whatever_the_batch(loss: Any) -> None:
    check_rows(loss)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients(loss: Any) -> None:
    teacher_BA = scores(4, 6, seed=1, scale=0.1)
    student_BA = scores(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher_BA), (student_BA,))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("make", [ForwardKL, ReverseKL, JensenShannon])
def test_zero_where_the_student_is_the_tempered_teacher(make: Callable[[float], Any], temperature: float) -> None:
    """A student whose softmax is the tempered teacher's, up to a shift of its logits."""
    student_BA = scores(32, 6)
    check_least_at(make(temperature), student_BA, temperature * (student_BA + 7.0))


@pytest.mark.parametrize("teacher_temperature", [0.01, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("make", [TwoSidedKL, DecoupledKL])
def test_zero_where_the_student_plays_the_teachers_policy_whatever_softens_both(
    make: Callable[[float, float], Any], temperature: float, teacher_temperature: float
) -> None:
    student_BA = scores(32, 6)
    loss = make(temperature, teacher_temperature)
    check_least_at(loss, student_BA, teacher_temperature * (student_BA + 7.0))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_standardised_zero_at_any_scale_of_the_teachers_scores(scale: float) -> None:
    student_BA = scores(32, 6)
    check_least_at(StandardizedKL(), student_BA, scale * (student_BA + 7.0))


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("make", [LogitMSE, LogitHuber])
def test_score_losses_are_zero_at_the_teachers_scores_alone(make: Callable[[float], Any], temperature: float) -> None:
    """Not at a shift of them: 2 units off is 4 squared, and 1.5 by Huber."""
    teacher_BA = scores(32, 6)
    check_rows(make(temperature))
    loss = make(temperature)
    assert float(loss(teacher_BA / temperature, teacher_BA).abs().max()) < 1e-20
    off_B = loss((teacher_BA + 2.0) / temperature, teacher_BA)
    torch.testing.assert_close(off_B, torch.full_like(off_B, 4.0 if make is LogitMSE else 1.5))


def test_soft_and_hard_is_least_at_the_mixture_and_the_nll_at_certainty() -> None:
    teacher_BA = scores(32, 6)
    best_BA = torch.nn.functional.one_hot(teacher_BA.argmax(dim=1), 6).double()
    mixture_BA = 0.7 * torch.softmax(teacher_BA / 0.5, dim=1) + 0.3 * best_BA
    check_least_at(SoftAndHard(0.5, hard=0.3), mixture_BA.log(), teacher_BA, least=None)
    torch.testing.assert_close(ActionNLL()(100.0 * best_BA, teacher_BA), torch.zeros(32, dtype=torch.float64))


@pytest.mark.parametrize("make", [ForwardKL, ReverseKL, JensenShannon])
def test_one_convention_divides_the_teacher_alone(make: Callable[[float], Any]) -> None:
    """(Rusu et al., 2015)."""
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    torch.testing.assert_close(make(4.0)(student_BA, teacher_BA), make(1.0)(student_BA, teacher_BA / 4.0))


def test_the_other_convention_matches_scores_when_both_are_hot() -> None:
    """(Hinton et al., 2015, section 2.1): with T^2 it tends to half the squared difference of centred logits."""
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    centred = [x - x.mean(dim=1, keepdim=True) for x in (student_BA, teacher_BA)]
    half_mse_B = 0.5 * LogitMSE()(*centred)
    torch.testing.assert_close(TwoSidedKL(100.0)(student_BA, teacher_BA), half_mse_B, rtol=0.05, atol=0)
    torch.testing.assert_close(TwoSidedKL(100.0, 0.01)(student_BA, 0.01 * teacher_BA), half_mse_B, rtol=0.05, atol=0)
    half_mse_B = 0.5 * LogitMSE()(z(student_BA), z(teacher_BA))
    torch.testing.assert_close(StandardizedKL(100.0)(student_BA, teacher_BA), half_mse_B, rtol=0.05, atol=0)


@pytest.mark.parametrize("temperature", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("make", [TwoSidedKL, DecoupledKL, StandardizedKL])
def test_float32_keeps_its_digits_when_both_are_hot(make: Any, temperature: float) -> None:
    student_BA, teacher_BA = scores(64, 6, scale=3.0), scores(64, 6, seed=1, scale=3.0)
    loss = make(temperature=temperature)
    torch.testing.assert_close(
        loss(student_BA.float(), teacher_BA.float()).double(), loss(student_BA, teacher_BA), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("make", [TwoSidedKL, DecoupledKL, StandardizedKL])
def test_more_heat_than_float32_bears_is_refused(
    make: Any,
) -> None:
    with pytest.raises(ValueError, match=r"temperature must be in \[1e-06, 100\], not 1000"):
        make(temperature=1000.0)


@pytest.mark.parametrize("numbers", [{"alpha": -1.0}, {"beta": float("nan")}])
def test_parts_of_a_decoupled_loss_have_no_negative_weight(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        DecoupledKL(**numbers)


@pytest.mark.parametrize(
    ("loss", "number", "slope", "gap"),
    [
        (ForwardKL(0.01), 0.111, -0.231, 1.0),
        (ForwardKL(0.02), 0.030, -0.122, 0.5),
        (TwoSidedKL(2.0, 0.01), 0.121, -0.245, 1.0),
    ],
    ids=repr,
)
def test_the_worked_numbers_of_the_page(loss: Any, number: float, slope: float, gap: float) -> None:
    """docs/losses.md: Q-values 1.00 and 0.99, a student that scores both 0, and the scores that it ends at."""
    student_BA, teacher_BA = torch.zeros(1, 2, requires_grad=True), torch.tensor([[1.0, 0.99]])
    loss_B = loss(student_BA, teacher_BA)
    (gradient_BA,) = torch.autograd.grad(loss_B.sum(), student_BA)
    assert loss_B.item() == pytest.approx(number, abs=5e-4)
    assert gradient_BA[0].tolist() == pytest.approx([slope, -slope], abs=5e-4)
    assert loss(torch.tensor([[gap, 0.0]]), teacher_BA).item() == pytest.approx(0.0, abs=1e-6)


def test_a_cold_teacher_is_its_best_action() -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    torch.testing.assert_close(ForwardKL(1e-4)(student_BA, teacher_BA), ActionNLL()(student_BA, teacher_BA))


def test_jensen_shannon_lies_between_the_kls() -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    js_B = JensenShannon()(student_BA, teacher_BA)
    torch.testing.assert_close(JensenShannon()(teacher_BA, student_BA), js_B)
    assert (JensenShannon()(100.0 * student_BA, 100.0 * teacher_BA) <= math.log(2.0) + 1e-12).all()
    near, far = JensenShannon(teacher_share=1e-6), JensenShannon(teacher_share=1 - 1e-6)
    forward_B, reverse_B = ForwardKL()(student_BA, teacher_BA), ReverseKL()(student_BA, teacher_BA)
    torch.testing.assert_close(near(student_BA, teacher_BA) / 1e-6, forward_B, rtol=1e-4, atol=0)
    torch.testing.assert_close(far(student_BA, teacher_BA) / 1e-6, reverse_B, rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_kl_is_the_two_sided_kl_at_one_beta_a_row(temperature: float) -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1, scale=0.01)
    rest_B = 1.0 - torch.softmax(teacher_BA / (0.01 * temperature), dim=1).amax(dim=1)
    rows = [
        DecoupledKL(temperature, 0.01, beta=float(beta))(student_BA[i : i + 1], teacher_BA[i : i + 1])
        for i, beta in enumerate(rest_B)
    ]
    torch.testing.assert_close(torch.cat(rows), TwoSidedKL(temperature, 0.01)(student_BA, teacher_BA))


def test_decoupled_kl_of_teachers_who_are_sure() -> None:
    """In float32 1 - p underflows, for the first row's Q-values 0.2 apart as for the second's 1000 apart."""
    teacher_BA = torch.tensor([[0.5, 0.3, 0.299], [1000.0, 0.0, -0.5]])
    student_BA = torch.tensor([[0.0, 1.0, 0.0], [50.0, 0.0, 0.0]], requires_grad=True)
    loss_B = DecoupledKL(teacher_temperature=0.01)(student_BA, teacher_BA)
    first = decoupled_B(student_BA[:1].detach().double(), teacher_BA[:1].double() / 0.01, 1.0, 1.0)
    second = math.log(2.0)  # of the others the teacher takes one, the student either
    torch.testing.assert_close(loss_B.detach(), torch.tensor([float(first), second]))
    loss_B.sum().backward()
    assert student_BA.grad is not None
    torch.testing.assert_close(student_BA.grad[1], torch.tensor([0.0, -0.5, 0.5]))


def test_standardised_kl_sees_neither_scale_nor_shift_of_either_side() -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    expected_B = StandardizedKL()(student_BA, teacher_BA)
    torch.testing.assert_close(StandardizedKL()(3.0 * student_BA - 2.0, 0.01 * teacher_BA + 5.0), expected_B)


def test_a_score_loss_at_a_temperature_compares_in_the_teachers_units() -> None:
    """The student's scores are Q / 0.01, so that its softmax is the policy that it plays."""
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    for make in (LogitMSE, LogitHuber):
        torch.testing.assert_close(make(0.01)(student_BA / 0.01, teacher_BA), make()(student_BA, teacher_BA))
    torch.testing.assert_close(
        LogitHuber(delta=100.0)(student_BA, teacher_BA), 0.5 * LogitMSE()(student_BA, teacher_BA)
    )


def test_the_ends_of_soft_and_hard() -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    ends: list[tuple[float, Any]] = [(0.0, ForwardKL(0.5)), (1.0, ActionNLL())]
    for end, loss in ends:
        torch.testing.assert_close(SoftAndHard(0.5, hard=end)(student_BA, teacher_BA), loss(student_BA, teacher_BA))


def test_half_precision_is_widened_before_any_of_them() -> None:
    student_BA, teacher_BA = scores(8, 6).bfloat16(), scores(8, 6, seed=1).bfloat16()
    for loss in LOSSES:
        assert torch.equal(loss(student_BA, teacher_BA), loss(student_BA.float(), teacher_BA.float()))


OPEN_AND_FIXED = [
    (losses.ForwardKL(), losses.ForwardKL(0.01)),
    (losses.ReverseKL(), losses.ReverseKL(0.01)),
    (losses.JensenShannon(teacher_share=0.2), losses.JensenShannon(0.01, teacher_share=0.2)),
    (losses.SoftAndHard(hard=0.3), losses.SoftAndHard(0.01, hard=0.3)),
    (losses.TwoSidedKL(4.0), losses.TwoSidedKL(4.0, 0.01)),
    (divergences.DecoupledKL(4.0), divergences.DecoupledKL(4.0, 0.01)),
    (losses.LogitMSE(), losses.LogitMSE(0.01)),
    (losses.LogitHuber(), losses.LogitHuber(0.01)),
]


@pytest.mark.parametrize(("left_open", "fixed"), OPEN_AND_FIXED, ids=lambda loss: repr(loss))
def test_the_temperature_is_the_teachers_unless_the_loss_has_its_own(left_open: PolicyLoss, fixed: PolicyLoss) -> None:
    student_BA = scores(8, 6)
    teacher_BA = scores(8, 6, seed=1, scale=0.01)
    expected_B = fixed.per_state(student_BA, teacher_BA, 1.0, 0.0)
    torch.testing.assert_close(left_open.per_state(student_BA, teacher_BA, 0.01, 0.0), expected_B)
    torch.testing.assert_close(fixed.per_state(student_BA, teacher_BA, 0.01, 0.0), expected_B)


def test_a_loss_plugs_into_the_loop_with_the_metrics_of_the_two_policies() -> None:
    """KL and entropy are of the tempered teacher, whatever the loss's own temperature is."""
    student = torch.nn.Linear(6, 6, bias=False)
    torch.nn.init.eye_(student.weight)
    obs = scores(8, 6).float()
    teacher_BA = scores(8, 6, seed=1, scale=0.01).float()
    rows_B = torch.arange(8)
    batch = Batch(obs, teacher_BA, rows_B, 0.01, Progress(0.0), rows_B)
    loss_B, metrics = losses.ForwardKL(0.02)(student, batch)
    torch.testing.assert_close(loss_B, kl_B(teacher_BA / 0.02, obs))
    torch.testing.assert_close(metrics["kl"], kl_B(teacher_BA / 0.01, obs))
    torch.testing.assert_close(metrics["teacher_entropy"], Categorical(logits=teacher_BA / 0.01).entropy())
    assert metrics["action_agreement"].tolist() == (obs.argmax(1) == teacher_BA.argmax(1)).float().tolist()


def test_a_field_may_change_over_a_run() -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    changing = losses.TwoSidedKL(Linear(4.0, 1.0))
    halfway_B = changing.per_state(student_BA, teacher_BA, 1.0, 0.5)
    torch.testing.assert_close(halfway_B, TwoSidedKL(2.5)(student_BA, teacher_BA))
    at_the_end_B = changing.per_state(student_BA, teacher_BA, 1.0, 1.0)
    torch.testing.assert_close(at_the_end_B, ForwardKL()(student_BA, teacher_BA))
    with pytest.raises(ValueError, match=r"hard must be in \[0, 1\], not 1\.02 in linear:0:2"):
        losses.SoftAndHard(hard=Linear(0.0, 2.0))  # before the run, not at its end
    with pytest.raises(ValueError, match="temperature must be at least"):
        losses.ForwardKL(Linear(1.0, 0.0))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize(
    "make",
    [ForwardKL, JensenShannon, TwoSidedKL, lambda t: DecoupledKL(teacher_temperature=t), StandardizedKL, LogitMSE,
     LogitHuber, SoftAndHard],
)  # fmt: skip
def test_a_temperature_that_is_not_positive_is_refused(make: Callable[[float], Any], temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be"):
        make(temperature)


def test_other_numbers_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher_share must lie in \(0, 1\), not 1\.0"):
        JensenShannon(teacher_share=1.0)
    with pytest.raises(ValueError, match="delta must be positive, not 0"):
        LogitHuber(delta=0.0)
    with pytest.raises(ValueError, match=r"hard must be in \[0, 1\], not -0\.1"):
        SoftAndHard(hard=-0.1)


def reference_kl_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """KL in float64 with none of the formulas under test."""
    return torch.where(log_p_BA.exp() > 0, log_p_BA.exp() * (log_p_BA - log_q_BA), 0.0).sum(dim=1)


def reference_log_policy(scores_BA: Tensor, temperature: float = 1.0) -> Tensor:
    tempered_BA = scores_BA.double() / temperature
    return tempered_BA - torch.logsumexp(tempered_BA, dim=1, keepdim=True)


def reference_forward_B(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    return reference_kl_B(reference_log_policy(t, temperature), reference_log_policy(s))


def reference_mixed_B(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    log_p, log_q = reference_log_policy(t, temperature), reference_log_policy(s)
    log_m = torch.stack([log_p + math.log(0.3), log_q + math.log(0.7)]).logsumexp(dim=0)
    return 0.3 * reference_kl_B(log_p, log_m) + 0.7 * reference_kl_B(log_q, log_m)


def reference_decoupled_B(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Alpha 1, beta 2, T 2, for one row."""
    best = int(t.argmax())
    rest = [a for a in range(6) if a != best]
    log_p, log_q = reference_log_policy(t, 2 * temperature), reference_log_policy(s, 2.0)
    two_p, two_q = (torch.stack([x[:, best], x[:, rest].logsumexp(dim=1)], dim=1) for x in (log_p, log_q))
    others = reference_log_policy(t[:, rest], 2 * temperature), reference_log_policy(s[:, rest], 2.0)
    return 4 * (reference_kl_B(two_p, two_q) + 2 * reference_kl_B(*others))


EXTREMES: dict[str, tuple[Callable[[float], Any], Callable[[Tensor, Tensor, float], Tensor]]] = {
    "forward": (ForwardKL, reference_forward_B),
    "reverse": (ReverseKL, lambda s, t, x: reference_kl_B(reference_log_policy(s), reference_log_policy(t, x))),
    "mixed": (lambda x: JensenShannon(x, teacher_share=0.3), reference_mixed_B),
    "two-sided": (lambda x: TwoSidedKL(2.0, x), lambda s, t, x: 4 * reference_forward_B(s / 2, t, 2 * x)),
    "decoupled": (lambda x: DecoupledKL(2.0, x, beta=2.0), reference_decoupled_B),
}
ROWS = st.one_of(
    *(st.lists(st.floats(-scale, scale, width=32), min_size=6, max_size=6) for scale in (1.0, 1e3, 1e6)),
    st.lists(st.sampled_from([0.0, 1.0, -1e6, 1e6]), min_size=6, max_size=6),  # ties
    st.floats(-1e6, 1e6, width=32).map(lambda x: [x] * 6),
)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", EXTREMES)
@settings(max_examples=60, deadline=None)
@given(student=ROWS, teacher=ROWS)
def test_float32_is_finite_and_right_at_extremes(
    name: str, temperature: float, student: list[float], teacher: list[float]
) -> None:
    """N01: loss and gradient against float64, for scores to 1e6, ties and rows of one number."""
    make, reference_B = EXTREMES[name]
    student_BA, teacher_BA = torch.tensor([student]).requires_grad_(), torch.tensor([teacher])
    (loss_B := make(temperature)(student_BA, teacher_BA)).sum().backward()
    exact_BA = student_BA.detach().double().requires_grad_()
    expected_B = reference_B(exact_BA, teacher_BA, temperature)
    expected_B.sum().backward()
    assert student_BA.grad is not None
    assert exact_BA.grad is not None
    assert loss_B.isfinite().all()
    torch.testing.assert_close(loss_B.detach().double(), expected_B.detach(), rtol=1e-5, atol=1e-5)
    scale = 1.0 + float(expected_B.detach())  # a gradient of a reverse KL is a difference of terms as large as it
    torch.testing.assert_close(student_BA.grad.double(), exact_BA.grad, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=50, deadline=None)
@given(student=ROWS, teacher=ROWS)
def test_standardised_float32_is_finite_and_right_at_extremes(student: list[float], teacher: list[float]) -> None:
    student_BA, teacher_BA = torch.tensor([student]).requires_grad_(), torch.tensor([teacher])
    (loss_B := StandardizedKL()(student_BA, teacher_BA)).sum().backward()
    exact_BA = student_BA.detach().double()
    deviation = [x.std(dim=1, unbiased=False, keepdim=True).clamp(min=1e-8) for x in (exact_BA, teacher_BA.double())]
    means = [x.mean(dim=1, keepdim=True) for x in (exact_BA, teacher_BA.double())]
    z_S, z_T = ((x - m) / d for x, m, d in zip((exact_BA, teacher_BA), means, deviation, strict=True))
    expected_B = 4 * reference_kl_B(reference_log_policy(z_T, 2.0), reference_log_policy(z_S, 2.0))
    torch.testing.assert_close(loss_B.detach().double(), expected_B, rtol=1e-5, atol=1e-5)
    assert student_BA.grad is not None
    slope_BA = 2 * (reference_log_policy(z_S, 2.0).exp() - reference_log_policy(z_T, 2.0).exp())
    along_BA = z_S * (z_S * slope_BA).mean(dim=1, keepdim=True) if float(deviation[0]) > 1e-8 else 0.0
    gradient_BA = (slope_BA - slope_BA.mean(dim=1, keepdim=True) - along_BA) / deviation[0]
    tolerance = 1e-5 / float(deviation[0])
    torch.testing.assert_close(student_BA.grad.double(), gradient_BA, rtol=1e-5, atol=tolerance)


def over_the_batch(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(unbiased=False)


def without_a_mask(s: Tensor, t: Tensor) -> Tensor:
    """The others' policies still have the best action in them."""
    best_kl_B = decoupled_B(s, t, 1.0, 0.0)
    return best_kl_B + kl_B(t, s)


def masked_as_published(s: Tensor, t: Tensor) -> Tensor:
    """The student's own best action left out instead of the teacher's."""
    rows = []
    for p, q in zip(t.softmax(1), s.softmax(1), strict=True):
        rest_p, rest_q = ([a for a in range(6) if a != int(x.argmax())] for x in (p, q))
        rows.append(kl_divergence(Categorical(probs=p[rest_p]), Categorical(probs=q[rest_q])))
    return decoupled_B(s, t, 1.0, 0.0) + torch.stack(rows)


ATTACKS: dict[str, tuple[Any, Formula]] = {
    "forward: other direction": (ForwardKL(), lambda s, t: kl_divergence_B(log_policy(s), log_policy(t))),
    "forward: summed over the batch": (ForwardKL(), lambda s, t: ForwardKL()(s, t).sum().expand(len(s))),
    "forward: cross-entropy": (ForwardKL(), lambda s, t: -(log_policy(t).exp() * log_policy(s)).sum(dim=-1)),
    "forward: both sides tempered": (ForwardKL(0.5), lambda s, t: ForwardKL()(s / 0.5, t / 0.5)),
    "forward: multiplied by the temperature": (ForwardKL(0.5), lambda s, t: ForwardKL()(s, t * 0.5)),
    "reverse: other direction": (ReverseKL(), ForwardKL()),
    "mixed: share of the other side": (JensenShannon(0.5, teacher_share=0.2), JensenShannon(0.5, teacher_share=0.8)),
    "mixed: against the other policy": (
        JensenShannon(),
        lambda s, t: 0.5 * ForwardKL()(s, t) + 0.5 * ReverseKL()(s, t),
    ),
    "two-sided: without T squared": (TwoSidedKL(4.0, 0.5), lambda s, t: TwoSidedKL(4.0, 0.5)(s, t) / 16),
    "two-sided: T once": (TwoSidedKL(4.0, 0.5), lambda s, t: TwoSidedKL(4.0, 0.5)(s, t) / 4),
    "two-sided: teacher alone": (TwoSidedKL(4.0, 0.5), lambda s, t: 16 * ForwardKL(2.0)(s, t)),
    "two-sided: student alone": (TwoSidedKL(4.0, 0.5), lambda s, t: 16 * ForwardKL(0.5)(s / 4.0, t)),
    "two-sided: student at the teacher's own": (TwoSidedKL(4.0, 0.5), lambda s, t: 16 * ForwardKL(2.0)(s / 2.0, t)),
    "soft and hard: weights exchanged": (SoftAndHard(0.5, hard=0.3), SoftAndHard(0.5, hard=0.7)),
    "soft and hard: the student's best action": (SoftAndHard(), lambda s, t: 0.9 * kl_B(t, s) + 0.1 * nll_B(s, s)),
    "decoupled: others with the best": (DecoupledKL(), without_a_mask),
    "decoupled: others without the student's best": (DecoupledKL(), masked_as_published),
    "decoupled: coupled again": (DecoupledKL(), TwoSidedKL()),
    "decoupled: without T squared": (
        DecoupledKL(4.0, 0.5, alpha=2.0, beta=8.0),
        lambda s, t: DecoupledKL(4.0, 0.5, alpha=2.0, beta=8.0)(s, t) / 16,
    ),
    "standardised: over the batch": (
        StandardizedKL(),
        lambda s, t: 4 * kl_B(over_the_batch(t) / 2.0, over_the_batch(s) / 2.0),
    ),
    "standardised: teacher alone": (StandardizedKL(), lambda s, t: TwoSidedKL(2.0)(s, standardize(t))),
    "standardised: without T squared": (StandardizedKL(), lambda s, t: StandardizedKL()(s, t) / 4),
    "mse: sum over the actions": (LogitMSE(), lambda s, t: (s - t).square().sum(dim=1)),
    "mse: the teacher divided": (LogitMSE(0.5), lambda s, t: (s - t / 0.5).square().mean(dim=1)),
    "huber: smooth L1": (
        LogitHuber(0.5, delta=0.3),
        lambda s, t: torch.nn.functional.smooth_l1_loss(s / 2, t, beta=0.3, reduction="none").mean(dim=1),
    ),
    "nll: the student's best action": (ActionNLL(), lambda s, t: nll_B(s, s)),
}
FORMULAS = dict(CASES)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_checks_notice_a_faulty_loss(name: str) -> None:
    """Faults that stand in published repositories, and their like; were one accepted, the tests would prove nothing."""
    loss, faulty = ATTACKS[name]
    with pytest.raises(AssertionError):
        check_formula(faulty, FORMULAS[loss])


@pytest.mark.parametrize("name", ["forward: summed over the batch", "standardised: over the batch"])
def test_the_rows_notice_a_batch(name: str) -> None:
    with pytest.raises(AssertionError):
        check_rows(ATTACKS[name][1])


@pytest.mark.parametrize(
    ("faulty", "agreement"),
    [
        (lambda s, t: -(log_policy(t).exp() * log_policy(s)).sum(dim=-1), 1.0),  # cross-entropy is not 0 there
        (lambda s, t: 16 * ForwardKL(4.0)(s, t), 1.0),  # the teacher softened alone: least elsewhere
        (lambda s, t: 16 * ForwardKL(1.0)(s / 4.0, t), 1.0),
    ],
)
def test_agreement_notices_the_wrong_side(faulty: Formula, agreement: float) -> None:
    student_BA = scores(32, 6)
    with pytest.raises(AssertionError):
        check_least_at(faulty, student_BA, agreement * student_BA)
