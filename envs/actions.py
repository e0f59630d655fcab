"""Names of the actions of Atari games."""

import functools

import ale_py

from policykd.envs.emulators import rom_path


@functools.cache
def action_names(game: str) -> tuple[str, ...]:
    """Returns ALE's names of a game's actions, in the order of a policy's outputs: NOOP, FIRE, RIGHT, ... for Pong.

    Raises:
        ValueError: an unknown game, or one for two players.
    """
    # The minimal action set, as Gymnasium and SB3 use it; all 18 actions would be the full one.
    ale = ale_py.ALEInterface()
    ale.loadROM(rom_path(game))
    return tuple(str(action.name) for action in ale.getMinimalActionSet())
