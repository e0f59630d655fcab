"""Reads states that others recorded: SB3's replay buffers, Minari datasets, the DQN Replay Dataset.

Every reader returns what the states are and an iterator over rows, so that no more than a shard is in memory (but for
SB3's buffer, which is one pickle). Streams are put one after the other.
"""

import gzip
import itertools
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.importers.minari import read_minari
from policykd.importers.recordings import CHUNK, NO_ACTION, STACK, Recording, frames_first, rows, stacked_shape
from policykd.io.files import BadFile
from policykd.storage.dataset import Dataset, check_free, write_dataset
from policykd.storage.generations import has_generations
from policykd.storage.manifest import Origin, StatesInfo
from policykd.storage.shards import UNREADABLE, Arrays, npy_header

_DQN_REPLAY = re.compile(r"\$store\$_observation_ckpt\.(\d+)\.gz")


def import_states(
    source: str | Path,
    folder: Path,
    *,
    game: str | None = None,
    trust_pickle: bool = False,
    num_states: int | None = None,
) -> Dataset:
    """Writes the states of another tool's recording as a dataset; goes on where the same import was cut.

    Args:
        source: SB3's `replay_buffer.pkl`, the folder of a Minari dataset, or a folder of the DQN Replay Dataset.
        folder: of the new dataset.
        game: what was played, where the source does not say it.
        trust_pickle: read a pickle, which executes the code in it.
        num_states: stop after so many; all by default.

    Raises:
        BadFile: not such a source, a damaged one, a lossy one, a pickle that is not trusted.
        ValueError: no such source; the folder holds a dataset, or part of another import.
        KeyboardInterrupt: a signal came; what is imported stays.
    """
    check_free(folder)
    about, parts = open_source(Path(source), game=canonical_name(game) if game else None, trust_pickle=trust_pickle)
    return write_dataset(folder, about, parts if num_states is None else _first(parts, num_states))


def open_source(path: Path, *, game: str | None, trust_pickle: bool) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Returns what a source holds, and its rows; see `import_states`."""
    if path.suffix == ".pkl" and path.exists():
        return read_sb3_buffer(path, game=game, trust_pickle=trust_pickle)
    if path.is_dir() and has_generations(path):
        raise BadFile(f"{path}: a dataset already; use it as it is")
    if any(_DQN_REPLAY.fullmatch(p.name) for p in (path.iterdir() if path.is_dir() else ())):
        return read_dqn_replay(path, game=game)
    for data in (path / "data", path):
        if (data / "metadata.json").is_file():
            return read_minari(data, game=game)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give an SB3 replay buffer, or the folder of a recording")
    raise BadFile(
        f"{path}: neither an SB3 replay buffer (.pkl), nor a Minari dataset (data/metadata.json), nor a folder of the"
        " DQN Replay Dataset ($store$_observation_ckpt.N.gz); give one of them"
    )


def read_sb3_buffer(path: Path, *, game: str | None, trust_pickle: bool) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Returns the states that a `ReplayBuffer` saved by SB3's `save_replay_buffer` holds, each stream in time order.

    Raises:
        BadFile: not trusted, not readable, or without the arrays of a `ReplayBuffer`.
    """
    if not trust_pickle:
        raise BadFile(
            f"{path}: a pickle, which executes what code it likes when it is read; if you made it, pass --trust-pickle"
        )
    print(f"warning: {path} is a pickle: whatever code is in it is executed now", file=sys.stderr)
    try:
        with path.open("rb") as file:
            buffer = pickle.load(file)
        obs, actions, rewards, dones = (
            np.asarray(getattr(buffer, name)) for name in ("observations", "actions", "rewards", "dones")
        )
        size, position, full = int(buffer.buffer_size), int(buffer.pos), bool(buffer.full)
        shares_next = bool(getattr(buffer, "optimize_memory_usage", False))
        num_actions, first_action = int(buffer.action_space.n), int(getattr(buffer.action_space, "start", 0))
        obs_shape, stack = stacked_shape(obs.shape[2:], obs.dtype)
    except Exception as error:  # a pickle may raise whatever its classes raise
        raise BadFile(
            f"{path}: not a ReplayBuffer of one observation array and discrete actions"
            f" ({type(error).__name__}: {error}); install what it needs, or save it with SB3's save_replay_buffer"
        ) from error
    order = np.arange(position)
    if full:  # with one array for both, the place to write next holds the newest next observation, not a state
        order = np.arange(position + shares_next, position + size) % size
    about = StatesInfo(
        obs_shape=obs_shape,
        stack=stack,
        dtype=obs.dtype.name,
        origin=Origin(f"SB3 replay buffer {path.name}, {obs.shape[1]} streams", "as the SB3 agent saw it", game),
        num_actions=num_actions,
    )

    def recordings() -> Iterator[Recording]:
        for env, first in itertools.product(range(obs.shape[1]), range(0, len(order), CHUNK)):
            steps = order[first : first + CHUNK]
            starts_T = dones[steps - 1, env] > 0
            if first == 0:
                starts_T[0] = True
            yield Recording(
                obs=frames_first(obs[steps, env]),
                actions_T=actions[steps, env].reshape(len(steps)) - first_action,
                rewards_T=rewards[steps, env],
                starts_T=starts_T,
                is_cut=full and first == 0,
            )

    return about, rows(recordings(), path)


def read_dqn_replay(folder: Path, *, game: str | None) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Returns the states of a `replay_logs` folder of the DQN Replay Dataset (Agarwal et al., 2020), in time order.

    Where a checkpoint number is missing, no stack reaches over the gap. Dopamine writes three black frames before an
    episode; they are the zeros that a stack begins with anyway, and are left out.

    Raises:
        BadFile: a file of another layout, truncated or damaged.
    """
    numbers = sorted(int(match[1]) for p in folder.iterdir() if (match := _DQN_REPLAY.fullmatch(p.name)))
    about = StatesInfo(
        obs_shape=(STACK, 84, 84),
        stack=STACK,
        dtype="uint8",
        origin=Origin(
            f"DQN Replay Dataset {folder.name}, checkpoints {', '.join(map(str, numbers))}",
            "Dopamine's: grey, maximum of 2 frames, 84x84 by area, frame skip 4, sticky 0.25, no FIRE",
            game,
        ),
        num_actions=make_atari(game, 1, seed=0).num_actions if game else None,
    )

    def recordings() -> Iterator[Recording]:
        after_end, num_black = True, STACK - 1
        for number in numbers:
            is_cut = number > 0 and number - 1 not in numbers
            after_end |= is_cut
            for frames, actions_T, rewards_T, terminals_T in _dqn_replay_chunks(folder, number):
                kept, starts = list[int](), list[bool]()
                seen_T = np.asarray(frames.any(axis=(1, 2)))
                for t, (seen, terminal) in enumerate(zip(seen_T, terminals_T != 0, strict=True)):
                    if after_end and not seen and num_black:
                        num_black -= 1
                        continue
                    kept.append(t)
                    starts.append(after_end)
                    after_end, num_black = bool(terminal), STACK - 1
                if kept:
                    yield Recording(frames[kept], actions_T[kept], rewards_T[kept], np.array(starts), is_cut)
                    is_cut = False

    return about, rows(recordings(), folder)


def _dqn_replay_chunks(folder: Path, number: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields observations, actions, rewards and terminals; the two in the middle may lack."""
    paths = {k: folder / f"$store$_{k}_ckpt.{number}.gz" for k in ("observation", "action", "reward", "terminal")}
    lacking = {k for k in ("action", "reward") if not paths[k].exists()}
    readers = [
        itertools.repeat(np.full(CHUNK, NO_ACTION if k == "action" else 0))
        if k in lacking
        else _npy_chunks(path, (84, 84) if k == "observation" else ())
        for k, path in paths.items()
    ]
    present = [k not in lacking for k in paths]
    while True:
        chunks = [next(reader, np.empty(0)) for reader in readers]
        lengths = {len(chunk) for chunk in itertools.compress(chunks, present)}
        if len(lengths) > 1:
            raise BadFile(f"{folder}: the files of checkpoint {number} differ in length; download them again")
        if lengths == {0}:
            return
        yield tuple(chunk[: len(chunks[0])] for chunk in chunks)


def _npy_chunks(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields a gzipped `.npy` of 8-bit images or of numbers, `CHUNK` rows at a time."""
    try:
        with gzip.open(path) as file:
            dtype, found = npy_header(file)
            if len(found) != 1 + len(shape) or found[1:] != shape or (shape and dtype != "uint8"):
                raise ValueError(f"expected {'uint8 ' if shape else ''}{('n', *shape)}, found {dtype} {found}")
            for first in range(0, found[0], CHUNK):
                chunk = np.empty((min(CHUNK, found[0] - first), *shape), dtype)
                if file.readinto(chunk.data.cast("B")) != chunk.nbytes:
                    raise EOFError(f"it ends before row {first + len(chunk):,} of {found[0]:,}")
                yield chunk
            if file.read(1):
                raise ValueError(f"more than its {found[0]:,} rows")
    except (OSError, *UNREADABLE) as error:
        raise BadFile(f"{path}: not a checkpoint of the DQN Replay Dataset ({error}); download it again") from error


def _first(parts: Iterator[Arrays], num_states: int) -> Iterator[Arrays]:
    left = num_states
    for part in parts:
        states = np.flatnonzero(~part.get("context_only", np.zeros(len(part["num_past_frames"]), np.bool_)))
        if len(states) >= left:
            yield {key: array[: states[left - 1] + 1] for key, array in part.items()}
            return
        left -= len(states)
        yield part
