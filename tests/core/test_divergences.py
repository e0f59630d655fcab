"""The formulas that losses and weights are made of, against formulas written another way."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from policykd.agents.policy import log_policy
from policykd.losses import jensen_shannon_B, kl_divergence_B
from policykd.methods.divergences import best_or_other, drop_action, standardize


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_half_precision_is_widened_before_the_temperature() -> None:
    q_BA = torch.tensor([[10.0, 9.9375, 3.0]], dtype=torch.bfloat16)  # both are bf16 numbers; their hundredfold is not
    expected = torch.softmax(torch.tensor([[1000.0, 993.75, 300.0]]), dim=1)
    torch.testing.assert_close(log_policy(q_BA, 0.01).exp(), expected)
    assert standardize(q_BA).dtype == torch.float32
    assert log_policy(torch.tensor([[1e38, 0.0]]), 0.01).isfinite().all()


def test_the_kl_is_in_nats_and_not_symmetric() -> None:
    log_p_BA, log_q_BA = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(kl_divergence_B(log_p_BA, log_q_BA)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl_divergence_B(log_q_BA, log_p_BA)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2.0))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_entropy_of_the_mixture_less_that_of_its_parts(share: float) -> None:
    p, q = Categorical(logits=scores(8, 6)), Categorical(logits=scores(8, 6, seed=1))
    mixture = Categorical(probs=share * p.probs + (1 - share) * q.probs)
    expected_B = mixture.entropy() - share * p.entropy() - (1 - share) * q.entropy()
    torch.testing.assert_close(jensen_shannon_B(p.logits, q.logits, share), expected_B)


def test_jensen_shannon_is_bounded_where_the_kls_are_not() -> None:
    """Policies without a common action: log 2, and a gradient that is finite."""
    sure_BA = torch.tensor([[1e6, 0.0], [1e6, 0.0]], requires_grad=True)
    other_BA = log_policy(torch.tensor([[0.0, 1e6], [1e6, 0.0]]))
    js_B = jensen_shannon_B(log_policy(sure_BA), other_BA)
    torch.testing.assert_close(js_B.detach(), torch.tensor([math.log(2.0), 0.0]))
    js_B.sum().backward()
    assert sure_BA.grad is not None
    assert sure_BA.grad.isfinite().all()
    assert kl_divergence_B(log_policy(sure_BA), other_BA)[0].item() == pytest.approx(1e6)


def test_dropping_one_action() -> None:
    scores_BA = torch.arange(12.0).reshape(3, 4)
    expected = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0], [8.0, 9.0, 10.0]])
    assert torch.equal(drop_action(scores_BA, torch.tensor([0, 2, 3])), expected)


def test_best_or_other_is_right_where_one_minus_p_underflows() -> None:
    """1 - p is 1.1e-13, which float32 has, and 1 - 1.1e-13 is 1, so that log(1 - p) would be minus infinity."""
    log_two_B2 = best_or_other(log_policy(torch.tensor([[30.0, 0.0, -1.0]])), torch.tensor([0]))
    torch.testing.assert_close(log_two_B2, torch.tensor([[0.0, -30.0 + math.log1p(math.exp(-1.0))]]))
    log_p_BA = log_policy(scores(8, 6))
    two_B2 = best_or_other(log_p_BA, torch.full((8,), 2)).exp()
    torch.testing.assert_close(two_B2, torch.stack([log_p_BA[:, 2].exp(), 1.0 - log_p_BA[:, 2].exp()], dim=1))


def test_the_kl_is_the_sum_of_its_two_decoupled_parts() -> None:
    """(Zhao et al., 2022, equation 7): KL = TCKD + (1 - p_t) NCKD, row by row, whichever action is the target."""
    teacher_BA, student_BA, target_B = scores(8, 6), scores(8, 6, seed=1), torch.arange(8) % 6
    log_p_BA, log_q_BA = log_policy(teacher_BA), log_policy(student_BA)
    target_B2 = best_or_other(log_p_BA, target_B)
    others = log_policy(drop_action(teacher_BA, target_B)), log_policy(drop_action(student_BA, target_B))
    rebuilt_B = kl_divergence_B(target_B2, best_or_other(log_q_BA, target_B))
    rebuilt_B = rebuilt_B + target_B2[:, 1].exp() * kl_divergence_B(*others)
    expected_B = kl_divergence(Categorical(logits=teacher_BA), Categorical(logits=student_BA))
    torch.testing.assert_close(rebuilt_B, expected_B)


@pytest.mark.parametrize("scale", [1e-5, 0.01, 1.0, 1e6, 1e37])
def test_standardised_scores_have_mean_zero_and_deviation_one_in_each_row(scale: float) -> None:
    z_BA = standardize(scale * scores(8, 6).float())
    torch.testing.assert_close(z_BA.mean(dim=1), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(z_BA.std(dim=1, unbiased=False), torch.ones(8))
    torch.testing.assert_close(z_BA, standardize(scores(8, 6).float()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, 1e38])
def test_a_row_of_one_number_is_standardised_to_zeros_with_a_finite_gradient(value: float) -> None:
    scores_BA = torch.full((2, 6), value, requires_grad=True)
    z_BA = standardize(scores_BA)
    assert torch.equal(z_BA, torch.zeros(2, 6))
    z_BA[:, 0].sum().backward()
    assert scores_BA.grad is not None
    assert scores_BA.grad.isfinite().all()
    assert (scores_BA.grad[:, 0] > 0).all()  # and it can leave that point
