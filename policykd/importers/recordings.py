"""Turns recorded observations into rows of a dataset, every frame once.

A stack that is the one before it, shifted by one frame, costs its newest frame. One that is not (an episode begins, a
ring buffer has lost what came before) costs the frames that it holds besides zeros: those are rows of `history`, which
no one draws, so that every stack comes back bit for bit whatever padded it.

Suffixes name dimensions: T time, S stack.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policykd.io.files import BadFile
from policykd.io.signals import check_interrupted
from policykd.storage.shards import Arrays

STACK = 4
"""frames that single images are stacked to, as SB3 does on Atari"""
NO_ACTION = -1
CHUNK = 1024
"""observations that are read at once"""


@dataclass(frozen=True)
class Recording:
    """A piece of what was recorded, in time order."""

    obs: np.ndarray
    """vectors `(time, size)`, images `(time, height, width)`, or stacks `(time, stack, height, width)`"""
    actions_T: np.ndarray
    """taken there; `NO_ACTION` where none was"""
    rewards_T: np.ndarray
    starts_T: np.ndarray
    """bool: first of an episode, or of what is left of one"""
    is_cut: bool = False
    """whether frames are missing before the first observation, without an episode that begins there"""


def frames_first(obs: np.ndarray) -> np.ndarray:
    """Returns a batch of image stacks with the frames along axis 1; single images without that axis; others as is."""
    if obs.ndim != 4:
        return obs
    if obs.shape[3] < obs.shape[1]:
        obs = np.moveaxis(obs, 3, 1)
    return obs[:, 0] if obs.shape[1] == 1 else obs


def stacked_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], int]:
    """Returns the shape of an observation, and how many frames it holds, for recorded ones of `shape`.

    Raises:
        BadFile: neither vectors nor 8-bit images.
    """
    shape = frames_first(np.empty((0, *shape), dtype)).shape[1:]
    if len(shape) == 1 and dtype in (np.float32, np.float64, np.uint8):
        return shape, 1
    if len(shape) in (2, 3) and dtype == np.uint8:
        return (STACK, *shape[-2:]) if len(shape) == 2 else shape, STACK if len(shape) == 2 else shape[0]
    raise BadFile(f"observations are {dtype} {shape}, not vectors of floats or stacked 8-bit grey images")


def rows(recordings: Iterable[Recording], source: Path) -> Iterator[Arrays]:
    """Yields what was recorded as rows: `Replay.extend` takes them, `gather` gives the observations back.

    Raises:
        BadFile: images with several channels that are not frames of a stack.
    """
    of_ndim: dict[int, Callable[[Recording], Arrays]] = {2: _Vectors(), 3: _Images(), 4: _Stacks(source)}
    for recording in recordings:
        check_interrupted()
        if len(recording.obs):
            yield of_ndim[recording.obs.ndim](recording)


class _Vectors:
    def __call__(self, r: Recording) -> Arrays:
        pasts_T = np.zeros(len(r.obs), np.uint8)
        return {"frames": r.obs, "num_past_frames": pasts_T, **_steps(r, r.starts_T, np.arange(len(r.obs)))}


class _Images:
    """Single images, stacked as SB3 does: zeros before an episode's first."""

    def __init__(self) -> None:
        self._past, self._num_unseen, self._start = 0, 0, True

    def __call__(self, r: Recording) -> Arrays:
        pasts_T, history_T = np.zeros(len(r.obs), np.uint8), np.zeros(len(r.obs), np.bool_)
        starts_T = np.zeros(len(r.obs), np.bool_)
        for t, start in enumerate(r.starts_T.tolist()):
            if start:
                cut = r.is_cut and t == 0
                self._past, self._num_unseen, self._start = -1, STACK - 1 if cut else 0, True
            pasts_T[t] = self._past = min(self._past + 1, STACK - 1)
            history_T[t] = self._num_unseen > 0
            starts_T[t] = self._start and not history_T[t]
            self._start &= bool(history_T[t])
            self._num_unseen -= 1
        return {
            "frames": r.obs,
            "num_past_frames": pasts_T,
            "context_only": history_T,
            **_steps(r, starts_T, np.arange(len(r.obs))),
        }


class _Stacks:
    """Stacks as they were recorded, whatever they begin with."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._last: np.ndarray | None = None
        self._past, self._num_states, self._num_history = 0, 0, 0

    def __call__(self, r: Recording) -> Arrays:
        obs, num_before = r.obs, r.obs.shape[1] - 1
        shifted_T = np.zeros(len(obs), np.bool_)
        shifted_T[1:] = (obs[1:, :-1] == obs[:-1, 1:]).all(axis=(1, 2, 3))
        shifted_T[0] = self._last is not None and bool((obs[0, :-1] == self._last[1:]).all())
        self._last = obs[-1].copy()

        seen_TS = np.asarray(obs[:, :-1].any(axis=(2, 3)))
        leading_T = np.where(seen_TS.any(axis=1), num_before - seen_TS.argmax(axis=1), 0)
        leading_T[shifted_T] = 0
        rows_T = np.cumsum(1 + leading_T) - 1
        self._num_states, self._num_history = self._num_states + len(obs), self._num_history + int(leading_T.sum())
        if self._num_history > max(64, self._num_states):
            raise BadFile(
                f"{self._source}: its observations are not stacks of the last frames in the order of time, only"
                " such are stored; record it anew with SB3's wrappers"
            )

        num_rows = int(rows_T[-1]) + 1
        frames, pasts = np.empty((num_rows, *obs.shape[2:]), obs.dtype), np.empty(num_rows, np.uint8)
        history = np.ones(num_rows, np.bool_)
        frames[rows_T], history[rows_T] = obs[:, -1], False
        for t, row in enumerate(rows_T.tolist()):
            if not shifted_T[t]:
                self._past = int(leading_T[t])
                first = row - self._past
                frames[first:row], pasts[first:row] = obs[t, num_before - self._past : -1], np.arange(self._past)
            else:
                self._past = min(self._past + 1, num_before)
            pasts[row] = self._past
        return {"frames": frames, "num_past_frames": pasts, "context_only": history, **_steps(r, r.starts_T, rows_T)}


def _steps(r: Recording, starts_T: np.ndarray, rows_T: np.ndarray) -> Arrays:
    num_rows = int(rows_T[-1]) + 1
    steps = {
        "actions": np.full(num_rows, NO_ACTION, np.int32),
        "rewards": np.zeros(num_rows, np.float32),
        "starts": np.zeros(num_rows, np.bool_),
    }
    for name, values in (("actions", r.actions_T), ("rewards", r.rewards_T), ("starts", starts_T)):
        steps[name][rows_T] = values
    return steps
