"""Atari exactly as Stable-Baselines3 trains on it, on ALE's threads: whole games, unclipped rewards.

The emulators step at 210x160 RGB in C++ (frame skip 4, maximum of the last two frames); grayscale and the 84x84 area
resize are OpenCV's, as in SB3's WarpFrame, so the pixels are bit-equal to those a teacher was trained on. ALE's own 84x84
grayscale is not: it takes the maximum after the grayscale.

Each emulator is a vector of one with a thread of its own, so that one game can press FIRE or reset while the others stand
still, and each game is a pure function of (seed, env, number of the game, actions): that is how a position is restored.
"""

from typing import Any

import ale_py
import cv2
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from torch import Tensor

from policykd.envs.games import canonical_name, rom_id
from policykd.envs.vector import Episode, Step

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)

NOOP, FIRE, SECOND = 0, 1, 2
FRAME_SKIP = 4
STACK = 4


class AtariEnvs:
    """`num_envs` games of one kind; see `make_atari`."""

    def __init__(
        self, game: str, num_envs: int, seed: int, *, noop_max: int, repeat_action_probability: float, life_loss_ends: bool
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if not 0.0 <= repeat_action_probability <= 1.0:
            raise ValueError(f"repeat_action_probability must lie in [0, 1], not {repeat_action_probability}")
        self.game, self.num_envs, self.seed = canonical_name(game), num_envs, seed
        self.life_loss_ends = life_loss_ends
        self.obs_shape, self.stack = (STACK, 84, 84), STACK
        self._emulators = [
            AtariVectorEnv(
                rom_id(game),
                num_envs=1,
                num_threads=1,
                frameskip=FRAME_SKIP,
                repeat_action_probability=repeat_action_probability,
                noop_max=noop_max,
                grayscale=False,
                stack_num=1,
                img_height=210,
                img_width=160,
                use_fire_reset=False,
                reward_clipping=False,
            )
            for _ in range(num_envs)
        ]
        self.num_actions = int(self._emulators[0].single_action_space.n)  # type: ignore[attr-defined]
        self._presses_fire = ale_py.Action.FIRE in self._emulators[0].ale.get_action_set()
        self._stacks = np.zeros((num_envs, STACK, 84, 84), np.uint8)
        self._screens = np.zeros((num_envs, 210, 160, 3), np.uint8)
        self._lives = [0] * num_envs
        self._returns = [0.0] * num_envs
        self._game_numbers = [-1] * num_envs
        self._actions: list[list[int]] = [[] for _ in range(num_envs)]

    def reset(self) -> Tensor:
        """Starts a new game everywhere and returns the first observations, uint8 `(num_envs, 4, 84, 84)`."""
        for i in range(self.num_envs):
            self._new_game(i)
        return torch.from_numpy(self._stacks.copy())

    def step(self, actions_B: Tensor) -> Step:
        """Takes one action (4 frames) in every game.

        Args:
            actions_B: `(num_envs,)`, integers below `num_actions`.
        """
        actions = actions_B.tolist()
        for i, action in enumerate(actions):
            self._send(i, action)
        self._stacks[:, :-1] = self._stacks[:, 1:]
        rewards = np.zeros(self.num_envs, np.float32)
        starts = np.zeros(self.num_envs, np.bool_)
        episodes = []
        for i, action in enumerate(actions):  # while one frame is shrunk here, the other emulators are still at work
            self._actions[i].append(action)
            lives_before = self._lives[i]
            rewards[i], over, truncated = self._receive(i)
            if over:
                episodes.append(Episode(i, self._returns[i], len(self._actions[i]), truncated))
                self._new_game(i)
            elif self.life_loss_ends and 0 < self._lives[i] < lives_before:
                episodes += self._next_life(i)
            else:
                self._stacks[i, -1] = _shrink(self._screens[i])
                continue
            starts[i] = True
        return Step(
            torch.from_numpy(self._stacks.copy()), torch.from_numpy(rewards), torch.from_numpy(starts), episodes
        )

    def screens(self) -> np.ndarray:
        """Returns what a person would see, RGB uint8 `(num_envs, 210, 160, 3)`."""
        return self._screens.copy()

    def state(self) -> dict[str, Any]:
        """Returns the position in every game: which game it is, and the actions since its reset."""
        return {"games": list(self._game_numbers), "actions": [list(a) for a in self._actions]}

    def restore(self, state: dict[str, Any]) -> Tensor:
        """Plays every game up to its position again and returns the observations, uint8 `(num_envs, 4, 84, 84)`."""
        if len(state["games"]) != self.num_envs:
            raise ValueError(f"the state has {len(state['games'])} games, these are {self.num_envs} environments")
        for i, (number, actions) in enumerate(zip(state["games"], state["actions"], strict=True)):
            self._game_numbers[i] = number - 1
            self._new_game(i)
            for k, action in enumerate(actions):
                self._send(i, action)
                self._actions[i].append(action)
                lives_before = self._lives[i]
                self._receive(i)
                if self.life_loss_ends and 0 < self._lives[i] < lives_before:
                    self._next_life(i)
                elif k >= len(actions) - STACK:
                    self._stacks[i, :-1] = self._stacks[i, 1:]
                    self._stacks[i, -1] = _shrink(self._screens[i])
        return torch.from_numpy(self._stacks.copy())

    def _new_game(self, i: int) -> None:
        self._game_numbers[i] += 1
        self._actions[i], self._returns[i] = [], 0.0
        self._reset_emulator(i)
        self._press_fire(i)
        self._start_stack(i)

    def _next_life(self, i: int) -> list[Episode]:
        """Goes on after a lost life as SB3's wrappers do, and returns the game if that ended it."""
        self._send(i, NOOP)
        _, over, truncated = self._receive(i)
        if over:
            episode = Episode(i, self._returns[i], len(self._actions[i]), truncated)
            self._new_game(i)
            return [episode]
        self._press_fire(i)
        self._start_stack(i)
        return []

    def _press_fire(self, i: int) -> None:
        for action in (FIRE, SECOND) if self._presses_fire else ():
            lives_before = self._lives[i]
            self._send(i, action)
            if self._receive(i)[1]:
                self._reset_emulator(i)
            elif self.life_loss_ends and 0 < self._lives[i] < lives_before:
                self._send(i, NOOP)
                if self._receive(i)[1]:
                    self._reset_emulator(i)

    def _start_stack(self, i: int) -> None:
        self._stacks[i] = 0
        self._stacks[i, -1] = _shrink(self._screens[i])

    def _reset_emulator(self, i: int) -> None:
        words = np.random.SeedSequence([self.seed, i, self._game_numbers[i]]).generate_state(1)
        obs, info = self._emulators[i].reset(seed=(words >> 1).astype(np.int32))
        self._screens[i] = obs[0, 0]
        self._lives[i] = int(info["lives"][0])

    def _send(self, i: int, action: int) -> None:
        self._emulators[i].ale.send([action], [1.0])

    def _receive(self, i: int) -> tuple[float, bool, bool]:
        obs, rewards, terminated, truncated, info = self._emulators[i].recv()
        self._screens[i] = obs[0, 0]
        self._lives[i] = int(info["lives"][0])
        reward = float(rewards[0])
        self._returns[i] += reward
        return reward, bool(terminated[0] or truncated[0]), bool(truncated[0])


def make_atari(
    game: str,
    num_envs: int,
    seed: int,
    *,
    noop_max: int = 30,
    repeat_action_probability: float = 0.0,
    life_loss_ends: bool = True,
) -> AtariEnvs:
    """Returns `num_envs` games with the pixels, FIRE presses and lost lives of SB3's `make_atari_env`, bit for bit.

    Args:
        game: `Pong`, `PongNoFrameskip-v4` and `ALE/Pong-v5` all mean the same game.
        num_envs: how many games are played at once, each on a thread of its own.
        seed: decides the no-op starts and the sticky actions.
        noop_max: each game starts after 0 to `noop_max` - 1 raw frames without action (Mnih et al., 2015); 0 for none.
        repeat_action_probability: chance a frame that the emulator repeats the last action (Machado et al., 2018).
        life_loss_ends: after a lost life start a new stack and press FIRE, as SB3 does in training; a game's return and
            length always count the whole game.

    Raises:
        ValueError: an unknown game, or a number out of range.
    """
    return AtariEnvs(
        game,
        num_envs,
        seed,
        noop_max=noop_max,
        repeat_action_probability=repeat_action_probability,
        life_loss_ends=life_loss_ends,
    )


def _shrink(screen: np.ndarray) -> np.ndarray:
    """Returns SB3's WarpFrame of an RGB screen, uint8 `(84, 84)`."""
    return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
