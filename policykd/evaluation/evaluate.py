"""Evaluation of a policy on full episodes, as SB3's `evaluate_policy` does it, and the two protocols for Atari.

Suffixes name dimensions: B environments, A actions.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from policykd.agents.policy import Policy, as_policy, check_outputs, device_of, greedy, sample
from policykd.agents.student import Student
from policykd.envs.vector import as_vector_env
from policykd.io.signals import check_interrupted

MAX_STEPS = 27_000
"""agent steps at which ALE itself ends a game (108,000 frames); a longer episode elsewhere is taken to be endless"""

NUM_PERIODIC_EPISODES = 16

ProtocolName = Literal["noop_sampled", "sticky_greedy"]


@dataclass(frozen=True)
class Protocol:
    """Source of randomness in the games: without one, a greedy policy plays the same few games again and again."""

    noop_max: int
    """upper bound (exclusive) of the number of raw frames without action at the start"""
    repeat_action_probability: float
    """probability per frame that the last action is repeated"""
    deterministic: bool
    """take the best action instead of a sampled one"""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "noop_sampled": Protocol(noop_max=30, repeat_action_probability=0.0, deterministic=False),
    "sticky_greedy": Protocol(noop_max=0, repeat_action_probability=0.25, deterministic=True),
}
"""no-op starts with sampled actions (Mnih et al., 2015; SB3's zoo); sticky actions with greedy play (Machado et al.,
2018)"""


@dataclass(frozen=True)
class Evaluation:
    """Every episode of an evaluation."""

    returns: tuple[float, ...]
    """episodic returns, unclipped"""
    lengths: tuple[int, ...]
    """episode lengths, agent steps"""
    num_truncated: int = 0
    """number of episodes that a time limit ended"""
    unfinished: tuple[float, ...] = ()
    """rewards collected in games that were cut off at `max_steps`: not episodic returns, so in no statistic"""

    @property
    def num_unfinished(self) -> int:
        """Number of games that were cut off."""
        return len(self.unfinished)

    @property
    def mean_return(self) -> float:
        """Mean episodic return; NaN without a finished episode."""
        return float(np.mean(self.returns)) if self.returns else float("nan")


class RandomPolicy:
    """Takes every action with the same probability (when its actions are sampled)."""

    def __init__(self, num_actions: int) -> None:
        self.num_actions = num_actions

    def __call__(self, obs_BCHW: Tensor) -> Tensor:
        """Returns zeros, `(batch, num_actions)`."""
        return torch.zeros(len(obs_BCHW), self.num_actions)


@dataclass(frozen=True)
class TemperedPolicy:
    """A policy whose actions are sampled at a temperature that it does not carry itself."""

    policy: Policy
    temperature: float
    """divides the outputs before sampling"""

    def __call__(self, obs_BCHW: Tensor) -> Tensor:
        """Returns the policy's outputs, `(batch, num_actions)`."""
        return self.policy(obs_BCHW)


def sampling_temperature(policy: object) -> float:
    """Returns the temperature T at which actions are sampled from softmax(outputs / T).

    It is the policy's own `temperature` (0.01 for the Q-values of a DQN teacher, 1 for a student's logits), else 1.
    """
    return float(getattr(policy, "temperature", 1.0))


@torch.inference_mode()
def evaluate(
    policy: object,
    envs: object,
    num_episodes: int = 10,
    *,
    deterministic: bool = True,
    seed: int | torch.Generator = 0,
    max_steps: int = MAX_STEPS,
) -> Evaluation:
    """Plays full episodes and returns the result of each.

    Every environment plays a number of episodes that is fixed in advance, as in SB3's `evaluate_policy`: taking the
    first `num_episodes` that end would favour short ones. Modules are put into evaluation mode meanwhile.

    Args:
        policy: maps observations to logits or Q-values, or is an SB3 model. It is called on its own device; actions are
            sampled at its own `temperature` (see `sampling_temperature`).
        envs: a `VectorEnv`, a `gymnasium.vector.VectorEnv`, or an SB3 `VecEnv`. An environment is not stepped any more
            once it has played its share.
        num_episodes: at least 1.
        deterministic: take the best action instead of a sampled one.
        seed: seed or generator of the sampled actions.
        max_steps: agent steps after which a game is cut off, and with it the environment's share. Such games are
            `unfinished`; the remaining ones are the shorter ones, so their mean is biased.

    Raises:
        TypeError: `policy` is no policy, or `envs` is not a vector environment.
        ValueError: fewer than 1 episode, outputs of another shape than `(num_envs, num_actions)`, or environments that
            do not fit (`as_vector_env`).
        FloatingPointError: an output or a reward that is not finite; names the environment and its step.
        KeyboardInterrupt: a signal was received.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be at least 1, not {num_episodes}")
    policy = as_policy(policy)
    envs = as_vector_env(envs, warn=False)
    # A generator continues where an earlier evaluation left it.
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    temperature = sampling_temperature(policy)
    device = device_of(policy, default="cpu")
    # The number of episodes that each environment still has to play.
    shares_B = torch.tensor([(num_episodes + i) // envs.num_envs for i in range(envs.num_envs)])
    returns: list[float] = []
    lengths: list[int] = []
    unfinished: list[float] = []
    num_truncated = 0
    steps_B = torch.zeros(envs.num_envs, dtype=torch.long)
    rewards_B = torch.zeros(envs.num_envs)
    with _evaluation_mode(policy):
        obs = envs.reset()
        while shares_B.any():
            check_interrupted()  # games are also played in threads, where a signal raises nothing
            # A copy: a policy may write into its input, which some environments still need.
            outputs_BA = policy(obs.clone().to(device))
            outputs_BA = check_outputs(outputs_BA, envs.num_envs, envs.num_actions, "the policy").cpu()
            _check_finite("the policy's output", outputs_BA, steps_B)
            # Finished environments get -1 and are held, so that none of their games is played in vain.
            actions_B = greedy(outputs_BA) if deterministic else sample(outputs_BA / temperature, generator)
            step = envs.step(torch.where(shares_B > 0, actions_B, -1))
            _check_finite("the reward", step.rewards_B[:, None], steps_B)
            obs = step.obs
            steps_B += 1
            rewards_B += step.rewards_B
            for episode in step.episodes:
                shares_B[episode.env] -= 1
                steps_B[episode.env] = 0
                rewards_B[episode.env] = 0.0
                returns.append(episode.episodic_return)
                lengths.append(episode.length)
                num_truncated += episode.truncated
            # A game that never ends takes its environment's whole share with it: the next one would not end either.
            cut_off_B = (steps_B >= max_steps) & (shares_B > 0)
            unfinished += rewards_B[cut_off_B].tolist()
            shares_B[cut_off_B] = 0
    return Evaluation(tuple(returns), tuple(lengths), num_truncated, tuple(unfinished))


@dataclass(frozen=True, kw_only=True)
class AtariOptions:
    """Number of games at once and the processes that emulate them."""

    num_envs: int = 16
    """games played at once; other numbers are other games"""
    num_workers: int = 0
    """emulator processes, 0 for none but this one; the games are the same"""


def evaluate_on_atari(
    policy: Policy,
    game: str,
    protocol: ProtocolName,
    num_episodes: int,
    *,
    seed: int = 0,
    options: AtariOptions = AtariOptions(),
) -> Evaluation:
    """Returns full games under one of the `PROTOCOLS`; the actions of a `RandomPolicy` are always sampled.

    Raises:
        ValueError: an unknown game, or fewer than 1 episode.
        FloatingPointError: an output that is not finite.
    """
    from policykd.envs.atari import make_atari  # emulators and OpenCV, which other environments do without

    rules = PROTOCOLS[protocol]
    # Fewer games than environments would leave some of them without one.
    envs = make_atari(
        game,
        min(options.num_envs, num_episodes),
        derived_seed(seed, 1),
        noop_max=rules.noop_max,
        repeat_action_probability=rules.repeat_action_probability,
        num_workers=options.num_workers,
    )
    with closing(envs):
        # Greedy play of equal outputs would always be the first action, not random play.
        deterministic = rules.deterministic and not isinstance(policy, RandomPolicy)
        return evaluate(policy, envs, num_episodes, deterministic=deterministic, seed=seed)


def periodic_evaluation(
    student: Student, game: str, *, seed: int, num_episodes: int = NUM_PERIODIC_EPISODES, num_workers: int = 0
) -> Evaluation:
    """Returns the games that a run plays with its student every few rounds: no-op starts, sampled actions."""
    options = AtariOptions(num_workers=num_workers)
    return evaluate_on_atari(student, game, "noop_sampled", num_episodes, seed=seed, options=options)


def derived_seed(seed: int, stream: int) -> int:
    """Returns a seed of environments that is never the one of the collected states, which use `seed` itself.

    Stream 1 is evaluation, 2 the teacher check, 3 the evaluations that decide when a run ends.
    """
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])


@contextmanager
def _evaluation_mode(policy: object) -> Iterator[None]:
    """Switches a module to evaluation mode, and back at the end: dropout would sample, batch norm would learn."""
    module = policy if isinstance(policy, nn.Module) and policy.training else None
    if module:
        module.eval()
    try:
        yield
    finally:
        if module:
            module.train()


def _check_finite(what: str, values_BN: Tensor, steps_B: Tensor) -> None:
    if not values_BN.isfinite().all():
        env, column = (~values_BN.isfinite()).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{what} in environment {env} at step {int(steps_B[env])} of its game is {float(values_BN[env, column])},"
            " not finite; the games played so far are discarded"
        )
