"""Atari exactly as Stable-Baselines3 trains on it: full games, unclipped rewards, in this process or in several.

Pixels, FIRE presses, lost lives and ends are bit-equal to those of SB3's `make_atari_env`. `emulators` has the rules of
a game, `screens` the way from an emulator's screens to frames.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policykd.envs import EnvState
from policykd.envs.emulators import OUTCOME, Rules, pack, rom_path, unpack
from policykd.envs.games import canonical_name
from policykd.envs.vector import Episode, Step
from policykd.envs.workers import InProcessWorker, SubprocessWorker

STACK = 4


class AtariEnvs:
    """`num_envs` games of one kind; see `make_atari`."""

    def __init__(self, rules: Rules, num_envs: int, num_workers: int) -> None:
        """Shares the games among `num_workers` processes; with 0 they are played in this one."""
        self.num_envs = num_envs
        self.obs_shape: tuple[int, ...] = (STACK, 84, 84)
        self.stack = STACK
        self._num_resets = 0
        self._stacks = np.zeros((num_envs, STACK, 84, 84), np.uint8)
        self._frames = np.zeros((num_envs, 84, 84), np.uint8)
        self._outcomes = np.zeros(num_envs, OUTCOME)
        # Neighbouring games share a worker, which writes its results to its own rows of these arrays.
        num_shares = min(max(num_workers, 1), num_envs)
        self._shares = [slice(*s) for s in pairwise(num_envs * k // num_shares for k in range(num_shares + 1))]
        kind = SubprocessWorker if num_workers else InProcessWorker
        self._workers: list[InProcessWorker | SubprocessWorker] = [
            kind(rules, range(s.start, s.stop), self._outcomes[s], self._frames[s]) for s in self._shares
        ]
        self.num_actions: int = self._ask_all("num_actions")[0]

    def reset(self) -> Tensor:
        """Starts a new game everywhere and returns the first observations, uint8 `(num_envs, 4, 84, 84)`."""
        # The number of the series is part of the seed: a second reset gives other games.
        self._num_resets += 1
        self._ask_all("reset", self._num_resets)
        self._stacks = np.zeros_like(self._stacks)
        self._stacks[:, -1] = self._frames
        return torch.from_numpy(self._stacks)

    def step(self, actions_B: Tensor) -> Step:
        """Takes one action (4 frames) in every game, integers `(num_envs,)`; where negative, the game is held.

        Raises:
            OSError: a worker has ended.
        """
        actions = actions_B.tolist()
        is_held_B = np.array(actions) < 0
        for worker, share in zip(self._workers, self._shares, strict=True):
            worker.send("step", actions[share])
        for worker in self._workers:
            worker.receive()
        outcomes = self._outcomes.copy()
        # New arrays, as those of earlier steps are in the hands of the caller.
        stacks = np.empty_like(self._stacks)
        stacks[:, :-1] = self._stacks[:, 1:]
        stacks[:, -1] = self._frames
        # SB3 clears the stack where an episode, or a life, starts.
        stacks[outcomes["starts"], :-1] = 0
        stacks[is_held_B] = self._stacks[is_held_B]
        self._stacks = stacks
        episodes = [
            Episode(i, float(o["episodic_return"]), int(o["length"]), bool(o["truncated"]))
            for i, o in enumerate(outcomes)
            if o["over"]
        ]
        rewards_B = torch.from_numpy(outcomes["reward"].copy())
        starts_B = torch.from_numpy(outcomes["starts"].copy())
        return Step(torch.from_numpy(stacks), rewards_B, starts_B, episodes)

    def screens(self) -> np.ndarray:
        """Returns what a person would see, RGB uint8 `(num_envs, 210, 160, 3)`; a few games have more rows."""
        sizes = [s.stop - s.start for s in self._shares]
        answers = zip(self._ask_all("rgb"), sizes, strict=True)
        return np.concatenate([unpack(rgb, (num_games, -1, 160, 3)) for rgb, num_games in answers])

    def state(self) -> EnvState:
        """Returns the position in every game, about 10 kB each."""
        games = [state for states in self._ask_all("state") for state in states]
        return {"num_resets": self._num_resets, "stacks": pack(self._stacks), "games": games}

    def restore(self, state: EnvState) -> Tensor:
        """Returns the observations of a position, whatever number of workers it was taken with.

        Raises:
            ValueError: the state is of another game or number of environments.
        """
        # Everything is checked before the first emulator changes.
        if len(state["games"]) != self.num_envs:
            raise ValueError(f"the state has {len(state['games'])} environments, these are {self.num_envs}")
        stacks = unpack(state["stacks"], self._stacks.shape)
        for worker, share in zip(self._workers, self._shares, strict=True):
            worker.send("restore", state["games"][share])
        for worker in self._workers:
            worker.receive()
        self._num_resets = state["num_resets"]
        self._stacks = stacks.copy()
        return torch.from_numpy(self._stacks)

    def close(self) -> None:
        """Ends the workers; so does the end of this process or of the last reference."""
        for worker in self._workers:
            worker.close()

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        for worker in self._workers:
            worker.send(method, *arguments)
        return [worker.receive() for worker in self._workers]


def make_atari(
    game: str,
    num_envs: int,
    seed: int,
    *,
    noop_max: int = 30,
    repeat_action_probability: float = 0.0,
    num_workers: int = 0,
) -> AtariEnvs:
    """Returns `num_envs` games with the pixels, FIRE presses and lost lives of SB3's `make_atari_env`, bit for bit.

    As in SB3's training, a lost life starts a new stack and presses FIRE; returns and lengths are those of whole games.

    Args:
        game: `Pong`, `PongNoFrameskip-v4` and `ALE/Pong-v5` all name the same game.
        num_envs: number of games played at once.
        seed: seed of no-op starts and sticky actions.
        noop_max: each game starts after 0 to `noop_max` - 1 raw frames without action (Mnih et al., 2015); 0 for none.
        repeat_action_probability: probability per frame that the last action is repeated (Machado et al., 2018).
        num_workers: number of processes that share the games; 0 plays them in this one. The results are the same.

    Raises:
        ValueError: an unknown game, one for two players, or a number out of range.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    if num_workers < 0 or noop_max < 0:
        raise ValueError(f"num_workers and noop_max must be at least 0, not {num_workers} and {noop_max}")
    if not 0.0 <= repeat_action_probability <= 1.0:
        raise ValueError(f"repeat_action_probability must lie in [0, 1], not {repeat_action_probability}")
    rom_path(game)  # before any process is started
    rules = Rules(canonical_name(game), seed, noop_max, repeat_action_probability)
    return AtariEnvs(rules, num_envs, num_workers)
