"""What the actions of a game are called."""

import functools

import ale_py

from policykd.envs.emulators import rom_path


@functools.cache
def action_names(game: str) -> tuple[str, ...]:
    """Returns ALE's names of a game's actions, as policies number them: NOOP, FIRE, RIGHT, ... for Pong.

    Raises:
        ValueError: an unknown game, or one for two players.
    """
    ale = ale_py.ALEInterface()
    ale.loadROM(rom_path(game))
    return tuple(str(action.name) for action in ale.getMinimalActionSet())
