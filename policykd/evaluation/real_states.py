"""States that a policy really meets: for calibrating, validating and timing what was made of it."""

from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from policykd.agents.policy import Policy, greedy, sample
from policykd.envs.atari import make_atari
from policykd.evaluation.evaluate import PROTOCOLS, Protocol
from policykd.io.signals import check_interrupted

NUM_GAMES = 4
"""played at once under each protocol: the fewer, the further their states reach into a game"""


@torch.inference_mode()
def visited_states(policy: Policy, game: str, num_states: int, *, seed: int, temperature: float = 1.0) -> Tensor:
    """Returns stacks of frames that a policy visits, uint8 `(num_states, 4, 84, 84)`, in the order of their visit.

    The first half comes from no-op starts with sampled actions, the second from sticky actions with greedy play, as in
    `policykd.evaluation.evaluate`. Another seed gives other games. Four are played at once in each half: `num_states`
    reach
    `num_states / 8` steps into a game and are as alike as neighbours are. 10,000 are 1,250 steps, some 80 seconds, of
    eight games, and need not see how a long one ends.

    Args:
        policy: plays; on the CPU.
        game: its name.
        num_states: at least 1.
        seed: of starts, sticky and sampled actions.
        temperature: divides the scores before an action is drawn; 0.01 for Q-values.

    Raises:
        ValueError: fewer than 1 state, or no such game.
        FloatingPointError: scores that are not finite.
        KeyboardInterrupt: a signal has come.
    """
    if num_states < 1:
        raise ValueError(f"num_states must be at least 1, not {num_states}")
    states = torch.empty((num_states, 4, 84, 84), dtype=torch.uint8)
    middle = (num_states + 1) // 2
    for k, (protocol, part) in enumerate(zip(PROTOCOLS.values(), (states[:middle], states[middle:]), strict=True)):
        if len(part):
            # never the seed of collected games ([seed]) or of evaluated ones ([seed, 1])
            env_seed, action_seed = map(int, np.random.SeedSequence([seed, 2, k]).generate_state(2))
            generator = torch.Generator().manual_seed(action_seed)
            _play(policy, game, protocol, part, env_seed, generator, temperature)
    return states


def _play(
    policy: Policy,
    game: str,
    protocol: Protocol,
    states: Tensor,
    seed: int,
    generator: torch.Generator,
    temperature: float,
) -> None:
    """Fills `states` with what is visited under one protocol."""
    chances = {"noop_max": protocol.noop_max, "repeat_action_probability": protocol.repeat_action_probability}
    with closing(make_atari(game, min(NUM_GAMES, len(states)), seed, **chances)) as envs:  # type: ignore[arg-type]
        obs = envs.reset()
        for rows in states.split(envs.num_envs):
            check_interrupted()
            rows.copy_(obs[: len(rows)])
            scores_BA = policy(obs)
            if not scores_BA.isfinite().all():
                raise FloatingPointError(f"{game}: the policy's scores are NaN or infinite; it is broken, take another")
            obs = envs.step(
                greedy(scores_BA) if protocol.deterministic else sample(scores_BA / temperature, generator)
            ).obs
