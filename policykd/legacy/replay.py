"""Visited states with their soft targets: each frame stored once, stacks gathered when a batch is drawn.

Suffixes name dimensions: B environments or a batch, S stack, N stored states, A actions.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

BATCHES_A_DRAW = 256


class Replay:
    """A growing array of states in the order of their visit, in `num_envs` interleaved streams.

    State n belongs to environment n mod `num_envs`; its stack is made of the newest frames of n, n - num_envs, ... back
    to where its game (or life) began, and zeros before. A frame takes its own bytes, plus one for how far back the
    stack goes.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        num_actions: int,
        obs_shape: tuple[int, ...],
        *,
        stack: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity, self.num_envs, self.obs_shape, self.stack = capacity, num_envs, obs_shape, stack
        frame_shape = obs_shape[1:] if stack > 1 else obs_shape
        self.frames = torch.zeros((1 + capacity, *frame_shape), dtype=dtype, device=device)
        """row 0 is the zero frame before a game began, row 1 + n is state n's newest"""
        self.pasts_N = torch.zeros(capacity, dtype=torch.uint8, device=device)
        """how many earlier frames of the same game state n's stack holds"""
        self.scores_NA = torch.zeros((capacity, num_actions), device=device)
        """the teacher's raw scores: never probabilities, never divided by a temperature; nan: not labelled yet"""
        self.history = torch.zeros(0, dtype=torch.int64)
        """rows, ascending, that are no states: only stacks of later ones hold their frames, and `sample` skips them"""
        self.num_given = 0
        """the first rows, which a dataset keeps: checkpoints leave them out"""
        self.num_held_out = 0
        """the last rows, which `sample` leaves alone: what an offline student is measured on"""
        self.size = 0
        self._back_S = num_envs * torch.arange(stack - 1, -1, -1, device=device)

    def __len__(self) -> int:
        return self.size

    @property
    def num_states(self) -> int:
        """How many rows are states."""
        return self.size - len(self.history)

    def add(self, obs: Tensor, starts_B: Tensor, scores_BA: Tensor, valid_B: Tensor | None = None) -> None:
        """Appends one state of every environment.

        Args:
            obs: `(num_envs, *obs_shape)`; of a stack only the newest frame is kept, the others are here already.
            starts_B: where a stack begins anew; must be so everywhere at the first call.
            scores_BA: the teacher's raw scores, `(num_envs, num_actions)`.
            valid_B: false where the scores are no numbers: such a row is `history`, no state; all true by default.
        """
        n, new = self.size, slice(self.size, self.size + self.num_envs)
        if new.stop > self.capacity:
            raise ValueError(f"replay is full: {self.capacity} states")
        self.frames[1 + n : 1 + n + self.num_envs] = (obs[:, -1] if self.stack > 1 else obs).to(self.frames.device)
        if n:
            pasts_B = (self.pasts_N[n - self.num_envs : n] + 1).clamp_(max=self.stack - 1)
            pasts_B.masked_fill_(starts_B.to(pasts_B.device), 0)
            self.pasts_N[new] = pasts_B
        self.scores_NA[new] = scores_BA
        if valid_B is not None and not valid_B.all():
            self.history = torch.cat([self.history, n + (~valid_B).nonzero().squeeze(1)])
        self.size = new.stop

    def gather(self, rows_B: Tensor) -> Tensor:
        """Returns the observations of the states `rows_B`, `(batch, *obs_shape)`."""
        if self.stack == 1:
            return self.frames.index_select(0, rows_B + 1)
        reach_B = self.num_envs * self.pasts_N.index_select(0, rows_B)
        frames_BS = rows_B.unsqueeze(1) + 1 - self._back_S
        frames_BS = frames_BS.masked_fill_(self._back_S > reach_B.unsqueeze(1), 0)
        flat = self.frames.view(len(self.frames), -1).index_select(0, frames_BS.view(-1))
        return flat.view(len(rows_B), *self.obs_shape)

    def batches(
        self, num: int, batch_size: int, end: int, generator: torch.Generator, *, first: int = 0, stored: float = 0.0
    ) -> Iterator[Tensor]:
        """Yields `num` uniform batches of states, with replacement: rows for `gather`, `(batch,)`.

        Many batches are drawn and moved to the device at once, so that no update waits for a copy.

        Args:
            num: of batches.
            batch_size: states in each.
            end: the row behind the last that is drawn.
            generator: draws.
            first: the first row that is drawn.
            stored: share of each batch that is drawn from the rows that a dataset gave, whatever `first` says.
        """
        num_stored = round(stored * batch_size)
        order_B = torch.randperm(batch_size, generator=torch.Generator().manual_seed(0))
        for begun in range(0, num, BATCHES_A_DRAW):
            u = min(BATCHES_A_DRAW, num - begun)
            rows_UB = self._draw((u, batch_size - num_stored), first, end, generator)
            if num_stored:
                rows_UB = torch.cat([self._draw((u, num_stored), 0, self.num_given, generator), rows_UB], dim=1)
                rows_UB = rows_UB[:, order_B]  # or a thread's part of a batch would have one kind alone
            if self.frames.is_cuda:  # only then is the copy one that nobody waits for
                rows_UB = rows_UB.pin_memory()
            yield from rows_UB.to(self.frames.device, non_blocking=True)

    def _draw(self, shape: tuple[int, int], first: int, end: int, generator: torch.Generator) -> Tensor:
        """Returns states between two rows, drawn uniformly."""
        history = self.history[(self.history >= first) & (self.history < end)] - first
        rows_UB = torch.randint(end - first - len(history), shape, generator=generator)
        if len(history):  # the k-th state lies behind the rows of history before it
            rows_UB += torch.searchsorted(history - torch.arange(len(history)), rows_UB, right=True)
        return rows_UB + first if first else rows_UB

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns one of the `batches` of all states but those held out.

        Returns:
            observations `(batch, *obs_shape)`, scores `(batch, num_actions)`.
        """
        rows_B = next(self.batches(1, batch_size, self.size - self.num_held_out, generator))
        return self.gather(rows_B), self.scores_NA.index_select(0, rows_B)

    def arrays(self, first: int, end: int | None = None) -> dict[str, np.ndarray]:
        """Returns the rows from `first` up to `end` (all that there are) as arrays, for a shard on disk."""
        end = self.size if end is None else end
        arrays = {
            "frames": self.frames[1 + first : 1 + end].cpu().numpy(),
            "pasts": self.pasts_N[first:end].cpu().numpy(),
            "scores": self.scores_NA[first:end].cpu().numpy(),
        }
        if len(self.history):
            arrays["history"] = torch.isin(torch.arange(first, end), self.history).numpy()
        return arrays

    def extend(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends the rows of a shard that `arrays` returned; without `scores` they wait for a label."""
        first, end = self.size, self.size + len(arrays["pasts"])
        if end > self.capacity:
            raise ValueError(f"the shard ends at state {end}, the replay holds {self.capacity}")
        self.frames[1 + first : 1 + end] = torch.from_numpy(arrays["frames"])
        self.pasts_N[first:end] = torch.from_numpy(arrays["pasts"])
        if "scores" in arrays:
            self.scores_NA[first:end] = torch.from_numpy(arrays["scores"])
        else:
            self.scores_NA[first:end] = torch.nan
        if "history" in arrays:
            self.history = torch.cat([self.history, first + torch.from_numpy(np.flatnonzero(arrays["history"]))])
        self.size = end
