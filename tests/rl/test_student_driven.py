"""Student-driven updates are the gradients they claim to be: every trajectory of a tiny MDP, in float64."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor

from policykd.agents.policy import log_policy
from policykd.envs.sb3_vec_env import SB3VecEnv
from policykd.losses import kl_divergence_B
from policykd.rl.sb3_distillation import (
    ExpectedEntropyRegularised,
    NDistill,
    OnPolicyDistillation,
    StudentDriven,
    StudentDrivenMethod,
    cross_entropy_B,
)
from tests.identity_env import IdentityEnv

S, A, HORIZON, GAMMA = 3, 2, 3, 0.9
DISCOUNT_T = GAMMA ** torch.arange(HORIZON, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(7)
START_S = torch.softmax(torch.randn(S, generator=GENERATOR, dtype=torch.float64), 0)
MOVE_SAS = torch.softmax(2 * torch.randn(S, A, S, generator=GENERATOR, dtype=torch.float64), -1)
REWARD_SA = torch.randn(S, A, generator=GENERATOR, dtype=torch.float64)
TEACHER_SA = log_policy(2 * torch.randn(S, A, generator=GENERATOR, dtype=torch.float64))
THETA_SA = torch.randn(S, A, generator=GENERATOR, dtype=torch.float64)
WITH_GRADIENT = [
    NDistill(),
    NDistill(reward_weight=0.7),
    ExpectedEntropyRegularised(),
    ExpectedEntropyRegularised(reward_weight=0.7),
    NDistill(reward_weight=0.7, entropy_weight=1.0),
    ExpectedEntropyRegularised(entropy_weight=1.0),
]


def distillation_reward_BT(cost_BT: Tensor, reward_BT: Tensor, *, reward_weight: float, gamma: float) -> Tensor:
    """Returns r_hat_t = reward_weight r_t - gamma cost_{t+1}, `(batch, time)`; no cost follows the last step.

    a_t does not affect the cost of s_t, so it is charged for that of the next state, discounted as in the objective.
    """
    next_cost_BT = torch.cat([cost_BT[:, 1:], torch.zeros_like(cost_BT[:, :1])], dim=1)
    return reward_weight * reward_BT - gamma * next_cost_BT


def returns_BT(reward_BT: Tensor, gamma: float) -> Tensor:
    """Returns R_t = sum_{k >= t} gamma^(k-t) reward_k, `(batch, time)`."""
    total_B, columns = torch.zeros_like(reward_BT[:, 0]), []
    for reward_B in reversed(reward_BT.unbind(dim=1)):
        total_B = reward_B + gamma * total_B
        columns.append(total_B)
    return torch.stack(columns[::-1], dim=1)


def surrogate_B(log_prob_BT: Tensor, loss_BT: Tensor, reward_BT: Tensor, gamma: float) -> Tensor:
    """Returns sum_t gamma^t (l(s_t) - log p_S(a_t | s_t) R_t), whose gradient is the method's estimator.

    R_t is the return of r_hat, held fixed (Czarnecki et al., 2019). What lies after the end of a trajectory is 0.
    """
    discount_T = gamma ** torch.arange(loss_BT.shape[1], dtype=loss_BT.dtype, device=loss_BT.device)
    return_BT = returns_BT(reward_BT.detach(), gamma)
    return (discount_T * (loss_BT - log_prob_BT * return_BT)).sum(dim=1)


def charged(method: StudentDrivenMethod, loss: Tensor) -> Tensor:
    return loss.detach() * method.charges_actions


@dataclass(frozen=True)
class Trajectories:
    """Every one there is: states and actions `(batch, time)`, and how likely each is, without a gradient."""

    states_BT: Tensor
    actions_BT: Tensor
    probability_B: Tensor
    log_prob_BT: Tensor
    loss_BT: Tensor
    reward_BT: Tensor


def log_student(theta_SA: Tensor) -> Tensor:
    return log_policy(theta_SA)


def every_trajectory(theta_SA: Tensor, method: StudentDrivenMethod, is_short: bool = False) -> Trajectories:
    """With `is_short` a trajectory ends where it comes into the last state, and what lies behind is 0."""
    spaces = [range(S)] * HORIZON + [range(A)] * HORIZON
    table = torch.tensor(list(itertools.product(*spaces)))
    states_BT, actions_BT = table[:, :HORIZON], table[:, HORIZON:]
    log_SA = log_student(theta_SA)
    log_prob_BT, loss_BT = log_SA[states_BT, actions_BT], method.loss_B(log_SA, TEACHER_SA)[states_BT]
    moved_BT = MOVE_SAS[states_BT[:, :-1], actions_BT[:, :-1], states_BT[:, 1:]]
    probability_B = START_S[states_BT[:, 0]] * moved_BT.prod(dim=1) * log_prob_BT.sum(dim=1).exp()
    lives_BT = torch.ones_like(loss_BT)
    if is_short:
        lives_BT = torch.cumprod((states_BT != S - 1).double(), dim=1)
    reward_BT = REWARD_SA[states_BT, actions_BT] * lives_BT
    return Trajectories(
        states_BT, actions_BT, probability_B.detach(), log_prob_BT * lives_BT, loss_BT * lives_BT, reward_BT
    )


def estimate(theta_SA: Tensor, method: StudentDrivenMethod, *, is_short: bool = False, shift: int = 0) -> Tensor:
    """Returns the expected gradient of the surrogate; `shift` moves r_hat to other actions."""
    every = every_trajectory(theta_SA, method, is_short)
    reward_BT = distillation_reward_BT(
        charged(method, every.loss_BT), every.reward_BT, reward_weight=method.reward_weight, gamma=GAMMA
    )
    if shift:
        reward_BT = torch.roll(reward_BT, shift, dims=1)
    surrogate = every.probability_B @ surrogate_B(every.log_prob_BT, every.loss_BT, reward_BT, GAMMA)
    (gradient,) = torch.autograd.grad(surrogate, theta_SA)
    return gradient


def objective(theta_SA: Tensor, method: StudentDrivenMethod, *, is_short: bool = False) -> Tensor:
    """Returns E sum_t gamma^t (l(s_t) - reward_weight r_t) by passing the distribution of states on: no sampling."""
    log_SA = log_student(theta_SA)
    paid_SA = method.loss_B(log_SA, TEACHER_SA)[:, None] - method.reward_weight * REWARD_SA
    lives_S = torch.ones(S, dtype=torch.float64)
    if is_short:
        lives_S[S - 1] = 0.0
    reached_S, total = START_S, torch.zeros((), dtype=torch.float64)
    for t in range(HORIZON):
        taken_SA = (reached_S * lives_S)[:, None] * log_SA.exp()
        total = total + GAMMA**t * (taken_SA * paid_SA).sum()
        reached_S = torch.einsum("sa,sak->k", taken_SA, MOVE_SAS)
    return total


def theta() -> Tensor:
    return THETA_SA.clone().requires_grad_()


def exact_gradient(method: StudentDrivenMethod, *, is_short: bool = False) -> Tensor:
    theta_SA = theta()
    (gradient,) = torch.autograd.grad(objective(theta_SA, method, is_short=is_short), theta_SA)
    return gradient


def jacobian(field: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the derivative of a field over the weights, by central differences: `(weights, weights)`."""
    columns = []
    for i in range(S * A):
        step = torch.zeros(S * A, dtype=torch.float64)
        step[i] = 1e-5
        ahead, behind = (THETA_SA + sign * step.view(S, A) for sign in (1, -1))
        difference = field(ahead.requires_grad_()) - field(behind.requires_grad_())
        columns.append(difference.flatten() / 2e-5)
    return torch.stack(columns, dim=1)


def test_the_trajectories_are_all_there_are() -> None:
    assert every_trajectory(theta(), NDistill()).probability_B.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("is_short", [False, True])
@pytest.mark.parametrize("method", WITH_GRADIENT, ids=repr)
def test_the_expected_update_is_the_gradient_of_the_objective(method: StudentDrivenMethod, is_short: bool) -> None:
    found = estimate(theta(), method, is_short=is_short)
    assert found.abs().max() > 0.05
    assert (found - exact_gradient(method, is_short=is_short)).abs().max() < 1e-8


def test_the_papers_sampled_reward_has_the_same_expectation() -> None:
    method, theta_SA = ExpectedEntropyRegularised(), theta()
    every = every_trajectory(theta_SA, method)
    next_log_BT = TEACHER_SA[every.states_BT, every.actions_BT][:, 1:]
    reward_BT = torch.cat([GAMMA * next_log_BT, torch.zeros(len(next_log_BT), 1, dtype=torch.float64)], dim=1)
    surrogate = every.probability_B @ surrogate_B(every.log_prob_BT, every.loss_BT, reward_BT, GAMMA)
    (gradient,) = torch.autograd.grad(surrogate, theta_SA, retain_graph=True)
    assert (gradient - exact_gradient(method)).abs().max() < 1e-8

    now_BT = TEACHER_SA[every.states_BT, every.actions_BT]  # one step early it counts each action twice
    surrogate = every.probability_B @ surrogate_B(every.log_prob_BT, every.loss_BT, now_BT, GAMMA)
    (early,) = torch.autograd.grad(surrogate, theta_SA)
    assert (early - exact_gradient(method)).abs().max() > 0.05


def test_on_policy_distillation_is_the_expected_gradient_and_no_objectives() -> None:
    method, theta_SA = OnPolicyDistillation(), theta()
    every = every_trajectory(theta_SA, method)
    discounted = (DISCOUNT_T * every.loss_BT).sum(dim=1)
    (expected,) = torch.autograd.grad(every.probability_B @ discounted, theta_SA)
    assert (estimate(theta(), method) - expected).abs().max() < 1e-12
    assert (expected - exact_gradient(method)).abs().max() > 0.01
    of_field = jacobian(lambda at: estimate(at, method))
    assert (of_field - of_field.T).abs().max() > 0.01  # a gradient's is symmetric
    for potential in WITH_GRADIENT:
        hessian = jacobian(lambda at, m=potential: estimate(at, m))  # type: ignore[misc]
        assert (hessian - hessian.T).abs().max() < 1e-7


@pytest.mark.parametrize("method", WITH_GRADIENT, ids=repr)
def test_broken_updates_are_noticed(method: StudentDrivenMethod) -> None:
    exact = exact_gradient(method)
    every = every_trajectory(theta_SA := theta(), method)
    cost_BT = charged(method, every.loss_BT)
    reward_BT = distillation_reward_BT(cost_BT, every.reward_BT, reward_weight=method.reward_weight, gamma=GAMMA)
    undiscounted_BT = distillation_reward_BT(cost_BT, every.reward_BT, reward_weight=method.reward_weight, gamma=1.0)
    attached_BT = returns_BT(
        distillation_reward_BT(every.loss_BT, every.reward_BT, reward_weight=method.reward_weight, gamma=GAMMA), GAMMA
    )
    attacks = {
        "no return": surrogate_B(every.log_prob_BT, every.loss_BT, 0 * reward_BT, GAMMA),
        "no loss": surrogate_B(every.log_prob_BT, every.loss_BT.detach(), reward_BT, GAMMA),
        "one step late": surrogate_B(every.log_prob_BT, every.loss_BT, reward_BT.roll(1, 1), GAMMA),
        "no discount of the next": surrogate_B(every.log_prob_BT, every.loss_BT, undiscounted_BT, GAMMA),
        "no discount at all": surrogate_B(every.log_prob_BT, every.loss_BT, undiscounted_BT, 1.0),
        "return not detached": (DISCOUNT_T * (every.loss_BT - every.log_prob_BT * attached_BT)).sum(dim=1),
        "the wrong sign": surrogate_B(every.log_prob_BT, every.loss_BT, -reward_BT, GAMMA),
    }
    for name, broken_B in attacks.items():
        (gradient,) = torch.autograd.grad(every.probability_B @ broken_B, theta_SA, retain_graph=True)
        assert (gradient - exact).abs().max() > 1e-3, name


def test_returns_are_hand_computed() -> None:
    reward_BT = torch.tensor([[1.0, 2.0, 4.0]])
    assert returns_BT(reward_BT, 0.5).tolist() == [[3.0, 4.0, 4.0]]
    assert distillation_reward_BT(reward_BT, 10 * reward_BT, reward_weight=2.0, gamma=0.5).tolist() == [[19, 38, 80]]


def test_cross_entropy_is_torchs_and_finite_where_a_policy_is_zero() -> None:
    scores_BA = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    p, q = log_policy(scores_BA), log_policy(-scores_BA)
    torch.testing.assert_close(
        cross_entropy_B(p, q), torch.nn.functional.cross_entropy(-scores_BA, p.exp(), reduction="none")
    )
    sure = log_policy(torch.tensor([[0.0, 1e38]]), 0.01)
    assert cross_entropy_B(sure, sure).item() == 0.0


def test_with_the_entropy_off_the_losses_are_kl_divergences() -> None:
    p, q = TEACHER_SA, log_policy(THETA_SA)
    torch.testing.assert_close(NDistill(entropy_weight=1.0).loss_B(q, p), kl_divergence_B(p, q))
    torch.testing.assert_close(ExpectedEntropyRegularised(entropy_weight=1.0).loss_B(q, p), kl_divergence_B(q, p))


def test_a_negative_reward_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="reward_weight must be at least 0"):
        NDistill(reward_weight=-1.0)


PLAYED_SA = torch.tensor([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.0]]) / 4
"""a policy of three actions whose trajectories, each as often as it is likely, are few"""
GOES_SA = torch.tensor([[1, 2, 0], [0, 2, 1], [2, 1, 0]])
GAIN_SA = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [2.0, 0.0, 1.0]])
LABELS_SA = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))


def every_likely_trajectory() -> tuple[Tensor, Tensor]:
    """Returns states and actions `(192, time)` of three steps: each as often as PLAYED_SA plays it from every start."""
    rows = []
    for start, *actions in itertools.product(range(3), repeat=1 + HORIZON):
        state, states, times = start, list[int](), 1.0
        for action in actions:
            states.append(state)
            times *= 4 * float(PLAYED_SA[state, action])
            state = int(GOES_SA[state, action])
        rows += [(states, actions)] * int(times)
    return torch.tensor([states for states, _ in rows]), torch.tensor([actions for _, actions in rows])


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("method", [*WITH_GRADIENT, OnPolicyDistillation(reward_weight=0.7)], ids=repr)
def test_what_a2c_descends_is_the_surrogate(method: StudentDrivenMethod, gamma: float) -> None:
    """Over all trajectories a critic, even a wrong one, adds nothing to the gradient, so what is left is exact."""
    states_BT, actions_BT = every_likely_trajectory()
    num_envs, weight = len(states_BT), 0.5
    how: dict[str, Any] = {"gamma": gamma, "gae_lambda": 1.0, "n_steps": HORIZON, "max_grad_norm": 1e9}
    how |= {"learning_rate": 0.0, "policy_kwargs": {"net_arch": []}, "seed": 0, "device": "cpu"}
    envs = SB3VecEnv(IdentityEnv(num_envs, 3), clip_rewards=False)
    model = StudentDriven(
        "MlpPolicy",
        envs,
        teacher=lambda obs_BO: obs_BO @ LABELS_SA,
        method=method,
        distillation_weight=weight,
        **how,
    )
    model._setup_learn(1)
    policy: Any = model.policy
    with torch.no_grad():
        policy.action_net.weight.copy_(PLAYED_SA.log().T)
        policy.action_net.bias.zero_()
        policy.value_net.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        for t in range(HORIZON):
            obs_BO, actions_B = torch.eye(3)[states_BT[:, t]], actions_BT[:, t]
            values_B1, log_prob_B, _ = policy.evaluate_actions(obs_BO, actions_B)
            gain_B = method.reward_weight * GAIN_SA[states_BT[:, t], actions_B]
            start_B = torch.full((num_envs,), t == 0)
            taken = (obs_BO.numpy(), actions_B[:, None].numpy(), gain_B.numpy(), start_B.numpy())
            model.rollout_buffer.add(*taken, values_B1, log_prob_B)
    model.train()

    theta_SA = PLAYED_SA.log().double().requires_grad_()
    log_SA = log_policy(theta_SA)
    log_prob_BT = log_SA[states_BT, actions_BT]
    loss_BT = weight * method.loss_B(log_SA, log_policy(LABELS_SA.double()))[states_BT]
    reward_BT = distillation_reward_BT(
        charged(method, loss_BT), GAIN_SA[states_BT, actions_BT], reward_weight=method.reward_weight, gamma=gamma
    )
    surrogate = (loss_BT - log_prob_BT * returns_BT(reward_BT, gamma)).mean()  # A2C's has no gamma^t
    if gamma == 1.0:
        torch.testing.assert_close(surrogate, surrogate_B(log_prob_BT, loss_BT, reward_BT, gamma).mean() / HORIZON)
    (expected_SA,) = torch.autograd.grad(surrogate, theta_SA)
    assert expected_SA.abs().max() > 0.01
    torch.testing.assert_close(policy.action_net.weight.grad.T.double(), expected_SA, rtol=1e-4, atol=1e-5)


def test_the_value_head_learns_the_return_of_whole_episodes_and_their_own_cost() -> None:
    num_envs, num_steps, gamma = 2, 64, 0.9
    method = ExpectedEntropyRegularised(0.5)
    how: dict[str, Any] = {"n_steps": num_steps, "gamma": gamma, "gae_lambda": 1.0, "learning_rate": 0.0}
    envs = make_vec_env("CartPole-v1", num_envs, seed=0)
    model = StudentDriven(
        "MlpPolicy", envs, teacher=lambda obs: obs[:, :2], method=method, seed=0, device="cpu", **how
    ).learn(num_envs * num_steps)
    buffer = model.rollout_buffer
    obs, returns = (torch.as_tensor(array) for array in (buffer.observations, buffer.returns))
    with torch.no_grad():
        student_log_NA = model.policy.get_distribution(obs).distribution.logits
        cost_ET = method.cost_B(student_log_NA, obs[:, :2].log_softmax(dim=1)).view(num_envs, -1)
    num_episodes = 0
    for env in range(num_envs):
        starts = np.flatnonzero(buffer.episode_starts[:, env]).tolist()
        for first, last in itertools.pairwise(starts):
            cost_BT = cost_ET[env : env + 1, first:last]
            r_hat_BT = distillation_reward_BT(cost_BT, torch.ones_like(cost_BT), reward_weight=0.5, gamma=gamma)
            found = returns.view(num_envs, -1)[env, first:last]
            torch.testing.assert_close(found, (returns_BT(r_hat_BT, gamma) - cost_BT)[0], rtol=1e-4, atol=1e-4)
            num_episodes += 1
    assert num_episodes > 2
