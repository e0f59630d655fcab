"""Recorded observations as the rows of a dataset, each frame stored once.

A stack that is the previous one shifted by a frame costs its newest frame. Any other (an episode begins, a ring buffer
has lost what came before) costs the frames that it shows: rows that only complete stacks and are never drawn, so that
every stack comes back bit for bit, whatever it was padded with.

Shape suffixes: T time, S stack.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policykd.io.files import BadFile
from policykd.io.typed import Arrays
from policykd.storage.generations import DType, Origin, StatesInfo

STACK = 4
"""frames that single images are stacked to, as SB3 does on Atari"""
NO_ACTION = -1
CHUNK = 1024
"""observations that are read at once"""


@dataclass(frozen=True)
class Recording:
    """Consecutive recorded steps."""

    obs: np.ndarray
    """vectors `(time, size)`, images `(time, height, width)`, or stacks `(time, stack, height, width)`"""
    actions_T: np.ndarray
    """`NO_ACTION` where none was taken"""
    rewards_T: np.ndarray
    starts_T: np.ndarray
    """bool: first step of an episode, or of what is left of one"""


def frames_first(obs: np.ndarray) -> np.ndarray:
    """Returns a batch of image stacks with the frames along axis 1; single images without that axis; others as is."""
    if obs.ndim != 4:
        return obs
    # The frames may also be along the last axis; there are always fewer of them than rows of pixels.
    if obs.shape[3] < obs.shape[1]:
        obs = np.moveaxis(obs, 3, 1)
    return obs[:, 0] if obs.shape[1] == 1 else obs


def states_info(shape: tuple[int, ...], dtype: np.dtype, origin: Origin, num_actions: int) -> StatesInfo:
    """Returns the description of recorded observations of `shape`; images of one frame will be stacked.

    Raises:
        BadFile: neither vectors nor 8-bit images.
    """
    shape = frames_first(np.empty((0, *shape), dtype)).shape[1:]
    dtypes: dict[str, DType] = {"uint8": "uint8", "float32": "float32", "float64": "float64"}
    if len(shape) == 1 and dtype.name in dtypes:
        return StatesInfo(shape, dtypes[dtype.name], origin, num_actions=num_actions)
    if len(shape) == 2 and dtype == np.uint8:
        return StatesInfo((STACK, *shape), "uint8", origin, STACK, num_actions)
    if len(shape) == 3 and dtype == np.uint8:
        return StatesInfo(shape, "uint8", origin, shape[0], num_actions)
    raise BadFile(f"observations are {dtype} {shape}, not vectors of floats or stacked 8-bit grey images")


def rows(recordings: Iterator[Recording], source: Path) -> Iterator[Arrays]:
    """Yields recordings as rows for `Replay.extend`, whose `gather` then returns the recorded observations.

    Raises:
        BadFile: images with several channels that are not the last frames.
    """
    recordings = (recording for recording in recordings if len(recording.obs))
    first = next(recordings, None)
    if first is not None:
        convert = _rows_of_stacks if first.obs.ndim == 4 else _rows_of_frames
        yield from convert(itertools.chain([first], recordings), source)


def _rows_of_frames(recordings: Iterable[Recording], source: Path) -> Iterator[Arrays]:
    """Stacks single images as SB3 does, with zeros before the first one of an episode; vectors are not stacked."""
    num_since_start = 0
    for r in recordings:
        max_past = STACK - 1 if r.obs.ndim == 3 else 0
        num_past_T = np.zeros(len(r.obs), np.uint8)
        for t, is_start in enumerate(r.starts_T.tolist()):
            num_since_start = 0 if is_start else num_since_start + 1
            num_past_T[t] = min(num_since_start, max_past)
        yield {"frames": r.obs, "num_past_frames": num_past_T, **_steps(r, np.arange(len(r.obs)))}


def _rows_of_stacks(recordings: Iterable[Recording], source: Path) -> Iterator[Arrays]:
    """Keeps stacks as they were recorded, whatever they are padded with."""
    previous: np.ndarray | None = None
    num_past = 0
    num_rows = 0
    num_states = 0
    for r in recordings:
        frames = list[np.ndarray]()
        num_past_frames = list[int]()
        rows_of_states = list[int]()
        for stack in r.obs:
            num_before = len(stack) - 1
            if previous is not None and np.array_equal(stack[:-1], previous[1:]):
                num_past = min(num_past + 1, num_before)
            else:
                # Not the previous stack shifted by a frame: all frames but the zeros of its padding become rows.
                is_padding_S = ~stack[:-1].any(axis=(1, 2))
                num_past = num_before - int(np.argmin([*is_padding_S, False]))
                frames += list(stack[num_before - num_past : -1])
                num_past_frames += range(num_past)
            rows_of_states.append(len(frames))
            frames.append(stack[-1])
            num_past_frames.append(num_past)
            previous = stack
        num_rows += len(frames)
        num_states += len(r.obs)
        # Colour channels look like a stack, but one is never the previous one shifted: all channels would become rows.
        if num_rows - num_states > max(64, num_states):
            raise BadFile(
                f"{source}: its observations are not stacks of the last frames in time order, only such are stored;"
                " record again with SB3's wrappers"
            )
        rows_T = np.array(rows_of_states)
        context_only = np.ones(len(frames), np.bool_)
        context_only[rows_T] = False
        yield {
            "frames": np.stack(frames),
            "num_past_frames": np.array(num_past_frames, np.uint8),
            "context_only": context_only,
            **_steps(r, rows_T),
        }


def _steps(r: Recording, rows_T: np.ndarray) -> Arrays:
    """Returns actions, rewards and starts at the rows of their states."""
    num_rows = int(rows_T[-1]) + 1
    steps = {
        "actions": np.full(num_rows, NO_ACTION, np.int32),
        "rewards": np.zeros(num_rows, np.float32),
        "starts": np.zeros(num_rows, np.bool_),
    }
    for name, values in (("actions", r.actions_T), ("rewards", r.rewards_T), ("starts", r.starts_T)):
        steps[name][rows_T] = values
    return steps
