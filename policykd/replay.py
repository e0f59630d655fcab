"""Replay buffer of labelled states: each frame is stored once, and stacks are gathered when a batch is drawn.

Shape suffixes: B environments or a batch, S stack, N stored states, A actions, U updates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BATCHES_PER_DRAW = 256
"""batches whose rows are drawn and moved to the device at once, so that no update waits for a copy"""


@dataclass(frozen=True)
class DrawRange:
    """The states that batches are drawn from."""

    first: int
    """first row that is drawn"""
    end: int
    """row after the last that is drawn"""
    offline_fraction: float = 0.0
    """share of each batch that is drawn from the preloaded rows, in addition to the range"""


class Replay:
    """A growing array of states in the order of their collection, in `num_envs` interleaved streams.

    State n belongs to environment n mod `num_envs`. Its stack consists of the newest frames of states n, n - num_envs,
    ... back to where its episode (or life) began, and zeros before. A frame takes its own bytes, plus one for the
    length of the stack.
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
    ) -> None:
        self.capacity = capacity
        self.num_envs = num_envs
        self.obs_shape = obs_shape
        self.stack = stack
        frame_shape = obs_shape[1:] if stack > 1 else obs_shape
        self.frames = torch.zeros((1 + capacity, *frame_shape), dtype=dtype)
        """row 0 is the zero frame before an episode began, row 1 + n is state n's newest"""
        self.num_past_frames_N = torch.zeros(capacity, dtype=torch.uint8)
        """number of earlier frames of the same episode in state n's stack"""
        self.teacher_NA = torch.zeros((capacity, num_actions))
        """raw teacher outputs: never probabilities, never divided by a temperature; nan where not labelled yet"""
        self.context_only_rows = torch.zeros(0, dtype=torch.int64)
        """rows, ascending, that are not states: only later states' stacks use their frames, and no batch draws them"""
        self.num_preloaded = 0
        """number of first rows that came from a dataset, which keeps them: checkpoints leave them out"""
        self.num_held_out = 0
        """number of last rows that no batch draws: an offline student is measured on them"""
        self.size = 0
        self._offsets_S = num_envs * torch.arange(stack - 1, -1, -1)

    def __len__(self) -> int:
        return self.size

    @property
    def device(self) -> torch.device:
        """Where the frames are."""
        return self.frames.device

    @property
    def num_states(self) -> int:
        """Number of rows that are states."""
        return self.size - len(self.context_only_rows)

    def to(self, device: torch.device | str) -> "Replay":
        """Moves the buffer to a device and returns it."""
        self.frames = self.frames.to(device)
        self.num_past_frames_N = self.num_past_frames_N.to(device)
        self.teacher_NA = self.teacher_NA.to(device)
        self._offsets_S = self._offsets_S.to(device)
        return self

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` states in total; what is stored stays."""
        num_new = capacity - self.capacity
        if num_new <= 0:
            return
        self.frames = torch.cat([self.frames, self.frames.new_zeros((num_new, *self.frames.shape[1:]))])
        self.num_past_frames_N = torch.cat([self.num_past_frames_N, self.num_past_frames_N.new_zeros(num_new)])
        self.teacher_NA = torch.cat([self.teacher_NA, self.teacher_NA.new_zeros((num_new, self.teacher_NA.shape[1]))])
        self.capacity = capacity

    def add(self, obs: Tensor, episode_starts_B: Tensor, teacher_BA: Tensor, valid_B: Tensor | None = None) -> None:
        """Appends one state per environment.

        Args:
            obs: observations, `(num_envs, *obs_shape)`; of a stack only the newest frame is stored.
            episode_starts_B: true where a stack starts from scratch; must be true everywhere at the first call.
            teacher_BA: raw teacher outputs, `(num_envs, num_actions)`.
            valid_B: false where the teacher's outputs are not finite: the row only serves as context; default all true.

        Raises:
            ValueError: the buffer is full.
        """
        n = self.size
        new = slice(n, n + self.num_envs)
        if new.stop > self.capacity:
            raise ValueError(f"replay is full: {self.capacity} states")
        newest = obs[:, -1] if self.stack > 1 else obs
        self.frames[1 + n : 1 + n + self.num_envs] = newest.to(self.device)
        # A stack grows by one frame per step and restarts with its episode; the first states have no past.
        if n:
            past_B = (self.num_past_frames_N[n - self.num_envs : n] + 1).clamp_(max=self.stack - 1)
            past_B.masked_fill_(episode_starts_B.to(past_B.device), 0)
            self.num_past_frames_N[new] = past_B
        self.teacher_NA[new] = teacher_BA
        if valid_B is not None and not valid_B.all():
            self.context_only_rows = torch.cat([self.context_only_rows, n + (~valid_B).nonzero().squeeze(1)])
        self.size = new.stop

    def gather(self, rows_B: Tensor) -> Tensor:
        """Returns the observations of the states `rows_B`, `(batch, *obs_shape)`."""
        if self.stack == 1:
            return self.frames.index_select(0, rows_B + 1)
        # Frame 0 is all zeros: it stands in for every frame from before the episode began.
        reach_B = self.num_envs * self.num_past_frames_N.index_select(0, rows_B)
        frames_BS = rows_B.unsqueeze(1) + 1 - self._offsets_S
        frames_BS = frames_BS.masked_fill_(self._offsets_S > reach_B.unsqueeze(1), 0)
        flat = self.frames.view(len(self.frames), -1).index_select(0, frames_BS.view(-1))
        return flat.view(len(rows_B), *self.obs_shape)

    def states_from(self, first: int) -> Tensor:
        """Returns the rows from `first` on that are states, int64 `(num,)`, on the buffer's device."""
        rows = torch.arange(first, self.size)
        return rows[~torch.isin(rows, self.context_only_rows)].to(self.device)

    def batches(self, num: int, batch_size: int, drawn: DrawRange, generator: torch.Generator) -> Iterator[Tensor]:
        """Yields `num` batches of rows for `gather`, int64 `(batch_size,)`: uniform, with replacement."""
        # A fixed number of stored states per batch: their share has no variance.
        num_offline = round(drawn.offline_fraction * batch_size)
        # A fixed shuffle of each batch: without it a thread's part would hold stored or live states alone.
        order_B = torch.randperm(batch_size, generator=torch.Generator().manual_seed(0))
        # Many batches per draw: one copy to the device for all of them.
        for begun in range(0, num, BATCHES_PER_DRAW):
            u = min(BATCHES_PER_DRAW, num - begun)
            rows_UB = self._draw((u, batch_size - num_offline), drawn.first, drawn.end, generator)
            if num_offline:
                offline_UB = self._draw((u, num_offline), 0, self.num_preloaded, generator)
                rows_UB = torch.cat([offline_UB, rows_UB], dim=1)[:, order_B]
            yield from to_device(rows_UB, self.device)

    def _draw(self, shape: tuple[int, int], first: int, end: int, generator: torch.Generator) -> Tensor:
        """Returns rows of states in [first, end), drawn uniformly."""
        # Uniform over the states: drawn among their ranks, then moved behind the rows that are skipped.
        skipped = self.context_only_rows
        skipped = skipped[(skipped >= first) & (skipped < end)] - first
        rows_UB = torch.randint(end - first - len(skipped), shape, generator=generator)
        if len(skipped):  # the k-th state lies after the skipped rows before it
            rows_UB += torch.searchsorted(skipped - torch.arange(len(skipped)), rows_UB, right=True)
        return rows_UB + first if first else rows_UB

    def arrays(self, first: int, end: int | None = None) -> dict[str, np.ndarray]:
        """Returns the rows [first, end) as arrays for a shard on disk; `end` defaults to all rows."""
        end = self.size if end is None else end
        arrays = {
            "frames": self.frames[1 + first : 1 + end].cpu().numpy(),
            "num_past_frames": self.num_past_frames_N[first:end].cpu().numpy(),
            "teacher": self.teacher_NA[first:end].cpu().numpy(),
        }
        if len(self.context_only_rows):
            arrays["context_only"] = torch.isin(torch.arange(first, end), self.context_only_rows).numpy()
        return arrays

    def extend(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends the rows of a shard from `arrays`; without `teacher` they are marked as not labelled.

        Raises:
            ValueError: the buffer is too small.
        """
        first = self.size
        end = first + len(arrays["num_past_frames"])
        if end > self.capacity:
            raise ValueError(f"the shard ends at state {end}, the replay holds {self.capacity}")
        self.frames[1 + first : 1 + end] = torch.from_numpy(arrays["frames"])
        self.num_past_frames_N[first:end] = torch.from_numpy(arrays["num_past_frames"])
        if "teacher" in arrays:
            self.teacher_NA[first:end] = torch.from_numpy(arrays["teacher"])
        else:
            self.teacher_NA[first:end] = torch.nan
        if "context_only" in arrays:
            context_only = first + torch.from_numpy(np.flatnonzero(arrays["context_only"]))
            self.context_only_rows = torch.cat([self.context_only_rows, context_only])
        self.size = end


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a CPU tensor on a device; a copy to CUDA is one that nobody waits for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
