"""Five properties for every loss, and the attacks that they must notice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from policykd.losses import ActionNLL, ForwardKL, Loss, ReverseKL, ScoreMSE, kl_divergence_B, log_policy

KLS: list[ForwardKL | ReverseKL] = [ForwardKL(), ReverseKL(), ForwardKL(0.01), ReverseKL(3.0)]
LOSSES: list[Loss] = [*KLS, ScoreMSE(), ActionNLL()]


def scores(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", KLS, ids=repr)
def test_zero_at_agreement(loss: ForwardKL | ReverseKL) -> None:
    """A student whose softmax is the tempered teacher's, up to a shift of its logits."""
    student_BA = scores(32, 6)
    teacher_BA = (loss.temperature or 1.0) * (student_BA + 7.0)
    torch.testing.assert_close(loss(student_BA, teacher_BA), torch.zeros(32, dtype=torch.float64))
    assert (loss(student_BA, 2.0 * teacher_BA) > 1e-3).all()


def test_mse_and_nll_at_agreement() -> None:
    teacher_BA = scores(32, 6)
    assert (ScoreMSE()(teacher_BA, teacher_BA) == 0).all()
    torch.testing.assert_close(ScoreMSE()(teacher_BA + 2.0, teacher_BA), torch.full((32,), 4.0, dtype=torch.float64))
    sure_BA = 100.0 * torch.nn.functional.one_hot(teacher_BA.argmax(dim=1), 6).double()
    torch.testing.assert_close(ActionNLL()(sure_BA, teacher_BA), torch.zeros(32, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_one_number_a_row_whatever_the_batch(loss: Loss) -> None:
    student_BA, teacher_BA = scores(32, 6), scores(32, 6, seed=1)
    loss_B = loss(student_BA, teacher_BA)
    assert loss_B.shape == (32,)
    for i in range(32):
        torch.testing.assert_close(loss(student_BA[i : i + 1], teacher_BA[i : i + 1]), loss_B[i : i + 1])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients(loss: Loss) -> None:
    teacher_BA = scores(4, 6, seed=1, scale=0.01)
    student_BA = scores(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher_BA), (student_BA,))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_against_torch_distributions(temperature: float) -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    p, q = Categorical(logits=teacher_BA / temperature), Categorical(logits=student_BA)
    torch.testing.assert_close(ForwardKL(temperature)(student_BA, teacher_BA), kl_divergence(p, q))
    torch.testing.assert_close(ReverseKL(temperature)(student_BA, teacher_BA), kl_divergence(q, p))
    hard_B = -q.log_prob(teacher_BA.argmax(dim=1))
    torch.testing.assert_close(ActionNLL()(student_BA, teacher_BA), hard_B)


@pytest.mark.parametrize("make", [ForwardKL, ReverseKL])
def test_the_temperature_divides_the_teacher_alone(make: type[ForwardKL] | type[ReverseKL]) -> None:
    """(Rusu et al., 2015).

    With Hinton's convention the student would be divided too and the loss scaled by T squared.
    """
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    torch.testing.assert_close(make(4.0)(student_BA, teacher_BA), make(1.0)(student_BA, teacher_BA / 4.0))


def test_a_cold_teacher_is_its_best_action() -> None:
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    torch.testing.assert_close(ForwardKL(1e-4)(student_BA, teacher_BA), ActionNLL()(student_BA, teacher_BA))


def reference_kl_B(log_p_BA: Tensor, log_q_BA: Tensor) -> Tensor:
    """KL in float64 with none of the formulas under test."""
    return torch.where(log_p_BA.exp() > 0, log_p_BA.exp() * (log_p_BA - log_q_BA), 0.0).sum(dim=1)


def reference_log_policy(scores_BA: Tensor, temperature: float) -> Tensor:
    tempered_BA = scores_BA.double() / temperature
    return tempered_BA - torch.logsumexp(tempered_BA, dim=1, keepdim=True)


ROWS = st.one_of(
    *(st.lists(st.floats(-scale, scale, width=32), min_size=6, max_size=6) for scale in (1.0, 1e3, 1e6)),
    st.lists(st.sampled_from([0.0, 1.0, -1e6, 1e6]), min_size=6, max_size=6),  # ties
    st.floats(-1e6, 1e6, width=32).map(lambda x: [x] * 6),
)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("make", [ForwardKL, ReverseKL])
@settings(max_examples=60, deadline=None)
@given(student=ROWS, teacher=ROWS)
def test_float32_is_finite_and_right_at_extremes(
    make: type[ForwardKL] | type[ReverseKL], temperature: float, student: list[float], teacher: list[float]
) -> None:
    """N01: loss and gradient against float64, for scores to 1e6, ties and rows of one number."""
    student_BA, teacher_BA = torch.tensor([student]).requires_grad_(), torch.tensor([teacher])
    (loss_B := make(temperature)(student_BA, teacher_BA)).sum().backward()
    exact_BA = student_BA.detach().double().requires_grad_()
    policies = (reference_log_policy(teacher_BA, temperature), reference_log_policy(exact_BA, 1.0))
    expected_B = reference_kl_B(*(policies if make is ForwardKL else policies[::-1]))
    expected_B.sum().backward()
    assert student_BA.grad is not None
    assert exact_BA.grad is not None
    assert loss_B.isfinite().all()
    torch.testing.assert_close(loss_B.detach().double(), expected_B.detach(), rtol=1e-5, atol=1e-5)
    scale = 1.0 + float(expected_B.detach())  # a gradient of a reverse KL is a difference of terms as large as it
    torch.testing.assert_close(student_BA.grad.double(), exact_BA.grad, rtol=1e-5, atol=1e-5 * scale)


def test_half_precision_is_widened_before_the_temperature() -> None:
    q_BA = torch.tensor([[10.0, 9.9375, 3.0]], dtype=torch.bfloat16)  # both are bf16 numbers; their hundredfold is not
    expected = torch.softmax(torch.tensor([[1000.0, 993.75, 300.0]]), dim=1)
    torch.testing.assert_close(log_policy(q_BA, 0.01).exp(), expected)
    huge_BA = torch.tensor([[1e38, 0.0]])
    assert ForwardKL(0.01)(torch.zeros(1, 2), huge_BA).isfinite().all()
    assert ReverseKL(0.01)(torch.zeros(1, 2), huge_BA).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        ForwardKL(temperature)


def attacked(name: str) -> Loss:
    """Returns a forward KL with a fault that has stood in a published repository."""
    faults: dict[str, Loss] = {
        "other direction": lambda s, t: kl_divergence_B(log_policy(s), log_policy(t)),
        "summed over the batch": lambda s, t: ForwardKL()(s, t).sum().expand(len(s)),
        "cross-entropy": lambda s, t: -(log_policy(t).exp() * log_policy(s)).sum(dim=-1),
        "both sides tempered": lambda s, t: ForwardKL()(s / 4.0, t / 4.0),
    }
    return faults[name]


@pytest.mark.parametrize("name", ["other direction", "summed over the batch", "cross-entropy", "both sides tempered"])
def test_the_properties_notice_a_faulty_loss(name: str) -> None:
    """Each attack breaks agreement with torch.distributions; were it accepted, the tests above would prove nothing."""
    student_BA, teacher_BA = scores(8, 6), scores(8, 6, seed=1)
    temperature = 4.0 if name == "both sides tempered" else 1.0
    expected_B = kl_divergence(Categorical(logits=teacher_BA / temperature), Categorical(logits=student_BA))
    assert not torch.allclose(attacked(name)(student_BA, teacher_BA), expected_B)
