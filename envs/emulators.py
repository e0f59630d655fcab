"""Games on ALE's emulators under the rules of Stable-Baselines3's wrappers, without torch: full games, raw rewards.

Only the first game of an emulator starts on a memory that the seed fills: later ones start, as in SB3, on what the game
before left there, and BeamRider plays differently if it is cleared. A position is ALE's own copy of its state. It lacks
the last action, so sticky actions are drawn here. It also lacks whether a frame is half done, as the first one after a
start of Qbert is, so an emulator plays a few frames before it takes over a state.
"""

import base64
import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ale_py
import numpy as np
from ale_py import roms

from policykd.envs import EnvState
from policykd.envs.games import canonical_name, rom_id
from policykd.envs.screens import Screens

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)

NOOP = 0
FIRE_ACTIONS = (1, 2)
"""actions that SB3's FireResetEnv takes at the start of a game that has FIRE"""
FRAME_SKIP = 4
MAX_FRAMES = 108_000
"""half an hour, after which a game is cut off, as in Gymnasium"""
NEVER = [False] * FRAME_SKIP

OUTCOME = np.dtype(
    [
        ("reward", np.float32),
        ("starts", np.bool_),
        ("over", np.bool_),
        ("truncated", np.bool_),
        ("episodic_return", np.float64),
        ("length", np.int64),
    ]
)
"""result of a step in one game: `starts` marks the end of a life or game, `over` that of a whole game"""


@dataclass(frozen=True)
class Rules:
    """Rules of the games; see `make_atari`."""

    game: str
    seed: int
    noop_max: int
    repeat_action_probability: float


def rom_path(game: str) -> Path:
    """Returns the path of a game's ROM.

    Raises:
        ValueError: an unknown game, or one for two players.
    """
    path = roms.get_rom_path(rom_id(game))
    assert path is not None
    if ale_py.ALEInterface.isSupportedROM(path) is None:
        raise ValueError(f"{canonical_name(game)} needs two players: choose another game")
    return path


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


def pack(array: np.ndarray) -> str:
    """Returns the bytes of a uint8 array as text for JSON."""
    return base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()


def unpack(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the uint8 array of a `shape` from the text of `pack`.

    Raises:
        ValueError: damaged, or of another shape.
    """
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), np.uint8).reshape(shape)
    except (TypeError, zlib.error) as error:
        raise ValueError(f"the state is damaged: {error}") from error


class Emulator:
    """One environment: one game after another."""

    def __init__(self, rules: Rules, env: int) -> None:
        """Loads the game; `env` is the index of the environment, in whichever process it is."""
        self.rules = rules
        self.env = env
        self._ale = ale_py.ALEInterface()
        # Sticky actions are drawn here, from a generator that a position can hold.
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.setInt("max_num_frames_per_episode", MAX_FRAMES)
        self._loaded_for = 0
        self._load(1)
        self._actions = [int(a.value) for a in self._ale.getMinimalActionSet()]
        self._presses_fire = ale_py.Action.FIRE.value in self._actions
        self.num_actions = len(self._actions)
        self.height = self._ale.getScreenDims()[0]
        self._num_resets = 0
        self._num_games = 0
        self._random = np.random.default_rng(0)
        self._last_action = NOOP
        self._return = 0.0
        self._length = 0
        self._lives = 0

    def reset(self, num_resets: int, screens: np.ndarray) -> None:
        """Starts the first game of the `num_resets`th series, on a memory that the seed fills."""
        # Loading takes milliseconds and was already done by the constructor for the first series.
        if self._loaded_for != num_resets:
            self._load(num_resets)
        self._loaded_for = 0
        self._num_resets = num_resets
        self._num_games = 0
        self._start_game(screens)

    def step(self, action: int, screens: np.ndarray) -> tuple[float, bool, bool, bool, float, int]:
        """Returns the `OUTCOME` of an action (4 frames), and writes the last two screens to `screens`."""
        self._length += 1
        reward, life_lost, over = self._step_life(action, screens)
        truncated = over and self._ale.game_truncated()
        outcome = (reward, over or life_lost, over, truncated, self._return, self._length)
        if over:
            self._start_game(screens)
        elif life_lost:
            self._press_fire(screens)
        return outcome

    def state(self) -> EnvState:
        """Returns the position."""
        return {
            "ale": pack(np.frombuffer(self._ale.cloneState(include_rng=True).serialize(), np.uint8)),
            "random": self._random.bit_generator.state,
            "num_resets": self._num_resets,
            "num_games": self._num_games,
            "last_action": self._last_action,
            "return": self._return,
            "length": self._length,
        }

    def restore(self, state: EnvState) -> None:
        """Returns to a position.

        Raises:
            ValueError: not a position of this game.
        """
        saved = unpack(state["ale"], (-1,)).tobytes()
        self._loaded_for = 0
        # A state does not record whether a frame is half done; after these frames none is.
        for _ in range(2 * FRAME_SKIP):
            self._ale.act(NOOP)
        try:
            self._ale.restoreState(ale_py.ALEState(saved))
            self._random.bit_generator.state = state["random"]
        except (SystemError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"the state is not one of {self.rules.game}: {error}") from error
        self._num_resets = state["num_resets"]
        self._num_games = state["num_games"]
        self._last_action = state["last_action"]
        self._return = state["return"]
        self._length = state["length"]
        self._lives = self._ale.lives()

    def _load(self, num_resets: int) -> None:
        words = np.random.SeedSequence([self.rules.seed, self.env, num_resets]).generate_state(1)
        self._ale.setInt("random_seed", int(words[0] >> 1))
        self._ale.loadROM(rom_path(self.rules.game))
        self._loaded_for = num_resets

    def _start_game(self, screens: np.ndarray) -> None:
        # Each game has a generator of its own, so it does not depend on how long the ones before it lasted.
        self._random = np.random.default_rng([self.rules.seed, self.env, self._num_resets, self._num_games])
        self._num_games += 1
        self._start_emulator(screens)
        self._press_fire(screens)

    def _start_emulator(self, screens: np.ndarray) -> None:
        self._ale.reset_game()
        for _ in range(self._random.integers(self.rules.noop_max) if self.rules.noop_max else 0):
            self._ale.act(NOOP)
            if self._ale.game_over():  # as SB3's NoopResetEnv
                self._ale.reset_game()
        self._last_action = NOOP
        self._return = 0.0
        self._length = 0
        self._lives = self._ale.lives()
        self._ale.getScreen(screens[0])
        screens[1] = screens[0]

    def _press_fire(self, screens: np.ndarray) -> None:
        for action in FIRE_ACTIONS if self._presses_fire else ():
            # A game that ends on these frames starts over, as in FireResetEnv.
            if self._step_life(action, screens)[2]:
                self._start_emulator(screens)

    def _step_life(self, action: int, screens: np.ndarray) -> tuple[float, bool, bool]:
        """Returns the reward of an action, whether it lost a life, and whether it ended the game."""
        lives_before = self._lives
        reward, over = self._step_frames(action, screens)
        life_lost = 0 < self._lives < lives_before
        if life_lost and not over:
            # SB3's EpisodicLifeEnv steps out of a lost life without action, which may end the game.
            _, over = self._step_frames(NOOP, screens)
        return reward, life_lost, over

    def _step_frames(self, action: int, screens: np.ndarray) -> tuple[float, bool]:
        """Returns the reward of an action over 4 frames, and whether the game ended."""
        ale = self._ale
        probability = self.rules.repeat_action_probability
        wanted = self._actions[action]
        repeats = (self._random.random(FRAME_SKIP) < probability).tolist() if probability else NEVER
        reward = 0
        over = False
        for frame in range(FRAME_SKIP):
            if not repeats[frame]:
                self._last_action = wanted
            reward += ale.act(self._last_action)
            if over := ale.game_over():
                break
            # Only the last two screens are seen: their maximum removes flicker (MaxAndSkipEnv).
            if frame >= FRAME_SKIP - 2:
                ale.getScreen(screens[frame - FRAME_SKIP])
        self._lives = ale.lives()
        self._return += reward
        return float(reward), over


class Emulators:
    """Several games stepped one after another in this process; its methods are the requests of `AtariEnvs`."""

    def __init__(self, rules: Rules, envs: Sequence[int], outcomes: np.ndarray, frames: np.ndarray) -> None:
        """Plays environments `envs`; the results of a step are written to rows of `outcomes` and `frames`."""
        self._emulators = [Emulator(rules, env) for env in envs]
        self._outcomes = outcomes
        self._screens = Screens(frames, self._emulators[0].height)

    def num_actions(self) -> int:
        """Returns the number of actions of the game."""
        return self._emulators[0].num_actions

    def reset(self, num_resets: int) -> None:
        """Starts a new game everywhere."""
        for emulator, screens in zip(self._emulators, self._screens.next, strict=True):
            emulator.reset(num_resets, screens)
        self._screens.draw()

    def step(self, actions: list[int]) -> None:
        """Takes one action in every game; where it is negative, nothing happens."""
        for i, (emulator, action) in enumerate(zip(self._emulators, actions, strict=True)):
            if action < 0:  # the game is held
                self._screens.keep(i)
                self._outcomes[i] = 0
            else:
                self._outcomes[i] = emulator.step(action, self._screens.next[i])
        self._screens.draw()

    def state(self) -> list[EnvState]:
        """Returns the position in every game."""
        screens = map(pack, self._screens.drawn)
        return [e.state() | {"screens": s} for e, s in zip(self._emulators, screens, strict=True)]

    def restore(self, states: list[EnvState]) -> None:
        """Returns to a position in every game."""
        for emulator, state, screens in zip(self._emulators, states, self._screens.next, strict=True):
            emulator.restore(state)
            screens[:] = unpack(state["screens"], screens.shape)
        self._screens.draw()

    def rgb(self) -> str:
        """Returns what a person would see, packed."""
        return pack(self._screens.rgb())
