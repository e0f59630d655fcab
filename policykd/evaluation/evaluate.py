"""Judges a policy by whole games."""

from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from policykd.agents.policy import Policy, greedy, sample
from policykd.envs.atari import make_atari
from policykd.envs.vector import VectorEnv
from policykd.io.signals import check_interrupted

MAX_STEPS = 27_000
"""agent steps in which ALE itself ends a game; a game elsewhere that goes on for longer is taken to have no end"""

ProtocolName = Literal["noop_sampled", "sticky_greedy"]


@dataclass(frozen=True)
class Protocol:
    """How games differ from each other; without either chance a greedy policy plays the same few games for ever."""

    noop_max: int
    """raw frames without action at the start, drawn below this"""
    repeat_action_probability: float
    """chance a frame that the last action is repeated"""
    deterministic: bool
    """the best action instead of one drawn from the policy"""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "noop_sampled": Protocol(noop_max=30, repeat_action_probability=0.0, deterministic=False),
    "sticky_greedy": Protocol(noop_max=0, repeat_action_probability=0.25, deterministic=True),
}
"""no-op starts with sampled actions (Mnih et al., 2015; SB3's zoo), sticky actions with greedy play (Machado et al.,
2018)"""


@dataclass(frozen=True)
class Evaluation:
    """Every game of an evaluation."""

    returns: list[float]
    """episodic, unclipped"""
    lengths: list[int]
    """agent steps"""
    num_truncated: int
    """how many a time limit ended"""
    unfinished: list[float] = field(default_factory=list)
    """what games that were cut off at `max_steps` had brought by then: not episodic returns, so in no statistic"""


class RandomPolicy:
    """Takes every action with the same chance (when its actions are sampled)."""

    def __init__(self, num_actions: int) -> None:
        self.num_actions = num_actions

    def __call__(self, obs_BCHW: Tensor) -> Tensor:
        """Returns zeros, `(batch, num_actions)`."""
        return torch.zeros(len(obs_BCHW), self.num_actions)


@torch.inference_mode()
def evaluate(
    policy: Policy,
    envs: VectorEnv,
    num_episodes: int,
    *,
    deterministic: bool,
    generator: torch.Generator,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    max_steps: int = MAX_STEPS,
) -> Evaluation:
    """Plays whole games and returns each one's result.

    Every environment plays a number of games that is fixed beforehand, as in SB3's `evaluate_policy`: taking the first
    `num_episodes` that end would favour short ones.

    Args:
        policy: scores observations.
        envs: games; an environment stands still once it has played its share.
        num_episodes: at least 1.
        deterministic: take the best action instead of a drawn one.
        generator: draws the actions.
        temperature: divides the scores before drawing.
        device: where the policy lives.
        max_steps: agent steps after which a game is cut off, and with it the environment's share; such games are
            `unfinished`, and those that are left are the shorter ones, so a mean over them says little.

    Raises:
        FloatingPointError: a score or a reward that is not finite, with the environment and its step.
        KeyboardInterrupt: a signal has come.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be at least 1, not {num_episodes}")
    shares_B = torch.tensor([(num_episodes + i) // envs.num_envs for i in range(envs.num_envs)])
    obs = envs.reset()
    returns, lengths, num_truncated, unfinished = list[float](), list[int](), 0, list[float]()
    steps_B, rewards_B = torch.zeros(envs.num_envs, dtype=torch.long), torch.zeros(envs.num_envs)
    while shares_B.any():
        check_interrupted()
        scores_BA = policy(obs.to(device)).cpu()
        _check_finite("the policy's scores", scores_BA, steps_B)
        actions_B = greedy(scores_BA) if deterministic else sample(scores_BA / temperature, generator)
        step = envs.step(torch.where(shares_B > 0, actions_B, -1))
        _check_finite("the reward", step.rewards_B[:, None], steps_B)
        obs = step.obs
        steps_B += 1
        rewards_B += step.rewards_B
        for episode in step.episodes:
            shares_B[episode.env] -= 1
            steps_B[episode.env], rewards_B[episode.env] = 0, 0.0
            returns.append(episode.episodic_return)
            lengths.append(episode.length)
            num_truncated += episode.truncated
        cut_B = (steps_B >= max_steps) & (shares_B > 0)
        unfinished += rewards_B[cut_B].tolist()
        shares_B[cut_B] = 0
    return Evaluation(returns, lengths, num_truncated, unfinished)


def evaluate_on_atari(
    policy: Policy,
    game: str,
    protocol: ProtocolName,
    num_episodes: int,
    *,
    seed: int,
    num_envs: int = 16,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Evaluation:
    """Returns whole games of one of the `PROTOCOLS`; a `RandomPolicy` is always sampled.

    `num_workers` processes emulate, 0 is this one; the games are the same.
    """
    how = PROTOCOLS[protocol]
    envs = make_atari(
        game,
        min(num_envs, num_episodes),
        int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]),  # never the seed of the collected games
        noop_max=how.noop_max,
        repeat_action_probability=how.repeat_action_probability,
        num_workers=num_workers,
    )
    with closing(envs):
        return evaluate(
            policy,
            envs,
            num_episodes,
            deterministic=how.deterministic and not isinstance(policy, RandomPolicy),
            generator=torch.Generator().manual_seed(seed),
            temperature=temperature,
            device=device,
        )


def _check_finite(what: str, values_BN: Tensor, steps_B: Tensor) -> None:
    if not values_BN.isfinite().all():
        env, column = (~values_BN.isfinite()).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{what} in environment {env} at step {int(steps_B[env])} of its game: {float(values_BN[env, column])}, not"
            " finite; what was played so far counts for nothing"
        )
