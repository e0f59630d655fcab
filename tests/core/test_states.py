import pytest
import torch
from torch import Tensor

from policykd.schedules import Linear
from policykd.states import MixedStates, StateSource, StudentStates, TeacherStates

ALWAYS_0 = torch.tensor([[50.0, 0.0, 0.0]]).expand(2000, 3)


def always_2(obs: Tensor) -> Tensor:
    return torch.tensor([[0.0, 0.0, 50.0]]).expand(len(obs), 3)


def share_of_student(states: StateSource, progress: float) -> float:
    generator = torch.Generator().manual_seed(0)
    actions_B = states(torch.zeros(2000, 1), ALWAYS_0, always_2, progress, generator)
    assert set(actions_B.tolist()) <= {0, 2}
    return float((actions_B == 2).float().mean())


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_who_plays(progress: float) -> None:
    assert share_of_student(TeacherStates(), progress) == TeacherStates().student_fraction(progress) == 0.0
    assert share_of_student(StudentStates(), progress) == StudentStates().student_fraction(progress) == 1.0


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.1, 0.2), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_a_mixture_hands_over(progress: float, share: float) -> None:
    states = MixedStates(student=Linear(0.0, 1.0, 0.5))
    assert states.student_fraction(progress) == pytest.approx(share)
    assert share_of_student(states, progress) == pytest.approx(share, abs=0.04)


def test_actions_are_drawn_from_the_policy_by_the_generator_alone() -> None:
    teacher_BA = torch.tensor([0.7, 0.2, 0.1]).log().expand(20_000, 3)
    first, second = (
        TeacherStates()(torch.zeros(1), teacher_BA, always_2, 0.0, torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert (first == second).all()
    shares = torch.bincount(first, minlength=3) / len(first)
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0.0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        MixedStates(student=share)


@pytest.mark.parametrize("states", [TeacherStates(epsilon=0.3), StudentStates(epsilon=0.3), MixedStates(epsilon=0.3)])
def test_noise_takes_any_action_in_its_share(states: StateSource) -> None:
    """(Rusu et al., 2015): whoever plays, epsilon of the steps are drawn from all three actions alike."""
    actions_B = states(torch.zeros(2000, 1), ALWAYS_0, always_2, 0.0, torch.Generator().manual_seed(0))
    assert float((actions_B == 1).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_noise_follows_a_schedule() -> None:
    states = TeacherStates(epsilon=Linear(1.0, 0.0))
    shares = [
        float(
            (states(torch.zeros(2000, 1), ALWAYS_0, always_2, p, torch.Generator().manual_seed(0)) != 0).float().mean()
        )
        for p in (0.0, 0.5, 1.0)
    ]
    assert shares == pytest.approx([2 / 3, 1 / 3, 0.0], abs=0.03)


def test_no_noise_draws_no_number() -> None:
    """A run without noise is bit for bit what it was before there was any."""
    generator, plain = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    TeacherStates()(torch.zeros(2000, 1), ALWAYS_0, always_2, 0.0, generator)
    ALWAYS_0.softmax(dim=1).multinomial(1, generator=plain)
    assert (generator.get_state() == plain.get_state()).all()
