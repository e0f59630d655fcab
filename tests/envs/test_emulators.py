"""One game's rules, where SB3's wrappers do not show them."""

from collections import Counter

import ale_py
import numpy as np
import pytest

from policykd.envs import emulators
from policykd.envs.emulators import Emulator, Rules, pack, rom_path, unpack


def emulator(game: str, *, sticky: float = 0.0) -> tuple[Emulator, np.ndarray]:
    screens = np.zeros((2, 210, 160), np.uint8)
    made = Emulator(Rules(game, 0, 0, sticky), env=0)
    made.reset(1, screens)
    return made, screens


def test_half_an_hour_ends_a_game(monkeypatch: pytest.MonkeyPatch) -> None:
    """N05: the frames of FIRE and of the action after it count."""
    assert emulators.MAX_FRAMES == 30 * 60 * 60
    monkeypatch.setattr(emulators, "MAX_FRAMES", 400)
    game, screens = emulator("Pong")
    outcomes = [game.step(0, screens) for _ in range(200)]
    ends = [(k, truncated, length) for k, (_, _, over, truncated, _, length) in enumerate(outcomes, start=1) if over]
    assert ends == [(98, True, 98), (196, True, 98)]


def test_sticky_actions_are_those_of_ale() -> None:
    """From one position the paddle moves for as many frames as RIGHT is not kept from: all four with chance 3/4."""
    sticky, screens = emulator("Breakout", sticky=0.25)
    state = sticky.state()
    ours, theirs = Counter[bytes](), Counter[bytes]()
    for seed in range(200):
        sticky.restore(state | {"random": np.random.default_rng(seed).bit_generator.state, "last_action": 0})
        sticky.step(2, screens)
        ours[screens[1].tobytes()] += 1
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 0)
    ale.setFloat("repeat_action_probability", 0.25)
    ale.loadROM(rom_path("Breakout"))
    ale.restoreState(ale_py.ALEState(unpack(state["ale"], (-1,)).tobytes()))
    position = ale.cloneState(include_rng=False)
    for _ in range(200):
        for _ in range(8):
            ale.act(ale_py.Action.NOOP)  # now it is the last action
        ale.restoreState(position)
        for _ in range(4):
            ale.act(ale_py.Action.RIGHT)
        theirs[ale.getScreen().tobytes()] += 1
    assert 3 <= len(ours) <= 5
    assert {screen for screen, _ in ours.most_common(3)} == {screen for screen, _ in theirs.most_common(3)}
    for screen, chance in zip((s for s, _ in theirs.most_common(3)), (3 / 4, 3 / 16, 3 / 64), strict=True):
        assert ours[screen] / 200 == pytest.approx(chance, abs=0.1)
        assert theirs[screen] / 200 == pytest.approx(chance, abs=0.1)


def test_an_array_survives_json() -> None:
    array = np.arange(256, dtype=np.uint8).reshape(4, 64)
    assert (unpack(pack(array), (4, 64)) == array).all()
    with pytest.raises(ValueError, match="damaged"):
        unpack(pack(array)[:40], (4, 64))
