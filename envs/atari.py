"""Atari exactly as Stable-Baselines3 trains on it, on ALE's threads: whole games, unclipped rewards.

The emulators step at 210x160 RGB in C++ (frame skip 4, maximum of the last two frames); grayscale and the 84x84 area
resize are OpenCV's, as in SB3's WarpFrame, so the pixels are bit-equal to those a teacher was trained on. ALE's own
84x84 grayscale is not: it takes the maximum after the grayscale.

Each emulator is a vector of one with a thread of its own, so that one game can press FIRE or reset while the others
stand still. Only its first game is seeded: SB3's later ones start from what the emulator's memory holds after the game
before, and BeamRider plays differently if it is cleared. A position is thus restored by taking all actions since
`reset` again; with `independent_games`, for runs of millions of steps, only those since the game began.
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
        self,
        game: str,
        num_envs: int,
        seed: int,
        *,
        noop_max: int,
        repeat_action_probability: float,
        life_loss_ends: bool,
        independent_games: bool,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        if not 0.0 <= repeat_action_probability <= 1.0:
            raise ValueError(f"repeat_action_probability must lie in [0, 1], not {repeat_action_probability}")
        self.game, self.num_envs, self.seed = canonical_name(game), num_envs, seed
        self.life_loss_ends, self.independent_games = life_loss_ends, independent_games
        self.obs_shape: tuple[int, ...] = (STACK, 84, 84)
        self.stack = STACK
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
        self._screens = [np.zeros((210, 160, 3), np.uint8)] * num_envs
        self._lives = [0] * num_envs
        self._returns = [0.0] * num_envs
        self._lengths = [0] * num_envs
        self._num_resets = 0
        self._num_games = [0] * num_envs
        self._actions: list[list[int]] = [[] for _ in range(num_envs)]

    def reset(self) -> Tensor:
        """Starts a new game everywhere and returns the first observations, uint8 `(num_envs, 4, 84, 84)`."""
        self._num_resets += 1
        self._num_games = [0] * self.num_envs
        for i in range(self.num_envs):
            self._new_game(i)
        return torch.from_numpy(self._stacks.copy())

    def step(self, actions_B: Tensor) -> Step:
        """Takes one action (4 frames) in every game.

        Args:
            actions_B: `(num_envs,)`, integers below `num_actions`; where negative, the game stands still.
        """
        actions = [(i, action) for i, action in enumerate(actions_B.tolist()) if action >= 0]
        for i, action in actions:
            self._send(i, action)
        rewards = np.zeros(self.num_envs, np.float32)
        starts = np.zeros(self.num_envs, np.bool_)
        episodes = []
        for i, action in actions:  # while one frame is shrunk here, the other emulators are still at work
            rewards[i], starts[i], episode = self._finish_step(i, action)
            if not starts[i]:
                self._shift_stack(i)
            if episode:
                episodes.append(episode)
        return Step(
            torch.from_numpy(self._stacks.copy()), torch.from_numpy(rewards), torch.from_numpy(starts), episodes
        )

    def screens(self) -> np.ndarray:
        """Returns what a person would see, RGB uint8 `(num_envs, 210, 160, 3)`."""
        return np.stack(self._screens)

    def state(self) -> dict[str, Any]:
        """Returns the position in every game: all actions since it, or the last `reset`, was seeded."""
        actions = [list(a) for a in self._actions]
        return {"num_resets": self._num_resets, "num_games": list(self._num_games), "actions": actions}

    def restore(self, state: dict[str, Any]) -> Tensor:
        """Plays every game up to its position again, about 2,000 steps a second.

        Returns:
            uint8 `(num_envs, 4, 84, 84)`.

        Raises:
            ValueError: the state is of another number of environments.
        """
        if len(state["actions"]) != self.num_envs:
            raise ValueError(f"the state has {len(state['actions'])} environments, these are {self.num_envs}")
        self._num_resets = state["num_resets"]
        for i in range(self.num_envs):
            self._num_games[i] = state["num_games"][i] - 1 if self.independent_games else 0
            self._new_game(i)
        for k in range(max(map(len, state["actions"]))):
            row = [
                (i, actions[k], k >= len(actions) - STACK)
                for i, actions in enumerate(state["actions"])
                if k < len(actions)
            ]
            for i, action, _ in row:
                self._send(i, action)
            for i, action, seen in row:
                _, starts, _ = self._finish_step(i, action)
                if seen and not starts:
                    self._shift_stack(i)
        return torch.from_numpy(self._stacks.copy())

    def _finish_step(self, i: int, action: int) -> tuple[float, bool, Episode | None]:
        """Returns the reward, whether a new stack was begun (lost life or game over), and the game that ended."""
        self._actions[i].append(action)
        self._lengths[i] += 1
        lives_before = self._lives[i]
        reward, over, truncated = self._receive(i)
        life_lost = self.life_loss_ends and 0 < self._lives[i] < lives_before
        if life_lost and not over:
            self._send(i, NOOP)  # SB3 steps out of a lost life without action, which may end the game
            _, over, truncated = self._receive(i)
        if not (over or life_lost):
            return reward, False, None
        episode = Episode(i, self._returns[i], self._lengths[i], truncated) if over else None
        if over:
            self._new_game(i)
        else:
            self._press_fire(i)
            self._start_stack(i)
        return reward, True, episode

    def _new_game(self, i: int) -> None:
        seed = None
        if self.independent_games or not self._num_games[i]:
            number = [self._num_games[i]] if self.independent_games else []
            words = np.random.SeedSequence([self.seed, i, self._num_resets, *number]).generate_state(1)
            seed, self._actions[i] = (words >> 1).astype(np.int32), []
        self._num_games[i] += 1
        self._reset_emulator(i, seed)
        self._press_fire(i)
        self._start_stack(i)

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

    def _shift_stack(self, i: int) -> None:
        self._stacks[i, :-1] = self._stacks[i, 1:]
        self._stacks[i, -1] = _shrink(self._screens[i])

    def _start_stack(self, i: int) -> None:
        self._stacks[i] = 0
        self._stacks[i, -1] = _shrink(self._screens[i])

    def _reset_emulator(self, i: int, seed: np.ndarray | None = None) -> None:
        obs, info = self._emulators[i].reset(seed=seed)
        self._returns[i], self._lengths[i] = 0.0, 0
        self._screens[i] = obs[0, 0]
        self._lives[i] = int(info["lives"][0])

    def _send(self, i: int, action: int) -> None:
        self._emulators[i].ale.send([action], [1.0])  # type: ignore[arg-type]  # takes lists too

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
    independent_games: bool = False,
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
        independent_games: seed every game anew, so that it depends on the seed, its number and its actions alone.

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
        independent_games=independent_games,
    )


def _shrink(screen: np.ndarray) -> np.ndarray:
    """Returns SB3's WarpFrame of an RGB screen, uint8 `(84, 84)`."""
    return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
