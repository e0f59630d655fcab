"""One function for every environment that a policy can be evaluated or distilled in."""

from typing import Any

import gymnasium as gym

from policykd.envs.atari import AtariEnvs, make_atari
from policykd.envs.games import rom_id
from policykd.envs.gymnasium_envs import GymnasiumEnvs


def make_env(env_id: str, num_envs: int = 1, seed: int = 0, **options: Any) -> AtariEnvs | GymnasiumEnvs:
    """Returns a vector of environments whose positions can be saved, so that a run on them can be resumed.

    Args:
        env_id: an Atari game, by any of its names (`Pong`, `PongNoFrameskip-v4`, `ALE/Pong-v5`), with the preprocessing
            of SB3's `make_atari_env`; or the id of a registered Gymnasium environment, such as `CartPole-v1`.
        num_envs: number of environments that are stepped together.
        seed: seed of the episodes.
        options: keywords of `make_atari`, or of `gymnasium.make`.

    Raises:
        ValueError: an unknown id, or an environment without discrete actions and array observations.
    """
    # A name without a version, such as Blackjack, is never registered and so always means the Atari game.
    if not _is_other_gymnasium_env(env_id):
        try:
            rom_id(env_id)
        except ValueError as error:
            raise ValueError(
                f"unknown environment {env_id!r}: not a registered Gymnasium id, and not an Atari game"
                f" ({str(error).partition(': ')[2]})"
            ) from error
        return make_atari(env_id, num_envs, seed, **options)
    return GymnasiumEnvs(env_id, num_envs, seed, **options)


def _is_other_gymnasium_env(env_id: str) -> bool:
    """Returns whether an id is registered with Gymnasium by somebody else than ALE, as `Blackjack-v1` is."""
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError):  # ImportError: `module:id` whose module is missing
        return False
    return not str(spec.entry_point).startswith("ale_py")
