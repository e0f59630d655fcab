"""Names of actions: ALE's, in the order in which policies score them."""

import pytest

from policykd.envs.atari import make_atari
from policykd.envs.emulators import action_names


def test_pong_and_breakout() -> None:
    assert action_names("Pong") == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    assert action_names("BreakoutNoFrameskip-v4") == ("NOOP", "FIRE", "RIGHT", "LEFT")


def test_there_are_as_many_as_a_policy_scores() -> None:
    assert len(action_names("Seaquest")) == make_atari("Seaquest", 1, 0).num_actions == 18


def test_an_unknown_game_is_named() -> None:
    with pytest.raises(ValueError, match="unknown game 'Pnog'"):
        action_names("Pnog")
