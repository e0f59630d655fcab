"""Observations that a policy really meets: for calibrating, validating and timing what is made from it."""

from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from policykd.agents.policy import Policy, greedy, sample
from policykd.envs.atari import make_atari
from policykd.evaluation.evaluate import PROTOCOLS, sampling_temperature

NUM_GAMES = 4
"""games played at once under each protocol; with fewer, the states reach further into a game"""


@torch.inference_mode()
def on_policy_states(policy: Policy, game: str, num_states: int, *, seed: int) -> Tensor:
    """Returns the observations of a policy that plays, uint8 `(num_states, 4, 84, 84)`, in the order of play.

    The first half comes from no-op starts with sampled actions, the second from sticky actions with greedy play, as in
    `policykd.evaluation.evaluate`. Four games are played at once in each half, so the states reach `num_states / 8`
    steps into a game, and neighbours are alike: 10,000 states are 1,250 steps, about 80 seconds, of eight games.

    The policy is on the CPU; its actions are sampled at its own temperature.

    Raises:
        ValueError: fewer than 1 state, or an unknown game.
        FloatingPointError: outputs that are not finite.
    """
    if num_states < 1:
        raise ValueError(f"num_states must be at least 1, not {num_states}")
    temperature = sampling_temperature(policy)
    states = torch.empty((num_states, 4, 84, 84), dtype=torch.uint8)
    halves = states.tensor_split([(num_states + 1) // 2])
    for k, (protocol, half) in enumerate(zip(PROTOCOLS.values(), halves, strict=True)):
        if not len(half):
            continue
        # Never the seed of the collected states ([seed]) or of an evaluation ([seed, 1]).
        env_seed, action_seed = map(int, np.random.SeedSequence([seed, 2, k]).generate_state(2))
        generator = torch.Generator().manual_seed(action_seed)
        envs = make_atari(
            game,
            min(NUM_GAMES, len(half)),
            env_seed,
            noop_max=protocol.noop_max,
            repeat_action_probability=protocol.repeat_action_probability,
        )
        with closing(envs):
            obs = envs.reset()
            for rows in half.split(envs.num_envs):
                rows.copy_(obs[: len(rows)])
                outputs_BA = policy(obs)
                if not outputs_BA.isfinite().all():
                    raise FloatingPointError(f"{game}: the policy's outputs are NaN or infinite; give another policy")
                if protocol.deterministic:
                    actions_B = greedy(outputs_BA)
                else:
                    actions_B = sample(outputs_BA / temperature, generator)
                obs = envs.step(actions_B).obs
    return states
