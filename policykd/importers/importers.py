"""Imports states that other tools recorded: SB3's replay buffers, Minari datasets, the DQN Replay Dataset.

Every reader returns a description of the states and an iterator over their rows, so that only one shard is in memory
(except for SB3's buffer, which is one pickle). Several streams follow one another.
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
from policykd.importers.recordings import CHUNK, NO_ACTION, STACK, Recording, frames_first, rows, states_info
from policykd.io.files import BadFile
from policykd.io.typed import UNREADABLE, Arrays, npy_header
from policykd.storage.dataset import Dataset, check_free, write_dataset
from policykd.storage.generations import Origin, StatesInfo, has_generations

_DQN_REPLAY = re.compile(r"\$store\$_observation_ckpt\.(\d+)\.gz")


def import_states(
    source: str | Path,
    folder: Path,
    *,
    game: str | None = None,
    trust_pickle: bool = False,
    num_states: int | None = None,
) -> Dataset:
    """Writes the states of another tool's recording as a dataset; continues an import that was interrupted.

    Args:
        source: SB3's `replay_buffer.pkl`, the folder of a Minari dataset, or a folder of the DQN Replay Dataset.
        folder: of the new dataset.
        game: what was played, where the source does not record it.
        trust_pickle: read a pickle, which executes the code in it.
        num_states: maximum number of states; all by default.

    Raises:
        BadFile: not such a source, a damaged or lossy one, or a pickle that is not trusted.
        ValueError: source not found, or of another game than `game`; the folder holds a dataset, or part of another
            import.
        KeyboardInterrupt: a signal has arrived; what is imported stays.
    """
    check_free(folder)
    if num_states is not None and num_states < 1:
        raise ValueError(f"--num-states: must be at least 1, not {num_states}")
    path = Path(source)
    game = canonical_name(game) if game else None
    info, parts = _read_sb3_buffer(path, game, trust_pickle) if path.suffix == ".pkl" else _read_folder(path, game)
    return write_dataset(folder, info, parts if num_states is None else _limited(parts, num_states))


def _read_folder(path: Path, game: str | None) -> tuple[StatesInfo, Iterator[Arrays]]:
    if not path.is_dir():
        raise ValueError(f"{path}: not found; give an SB3 replay buffer (.pkl), or the folder of a recording")
    if has_generations(path):
        raise BadFile(f"{path}: a dataset already; use it as it is")
    if any(_DQN_REPLAY.fullmatch(file.name) for file in path.iterdir()):
        return _read_dqn_replay(path, game)
    for data in (path / "data", path):
        if (data / "metadata.json").is_file():
            return read_minari(data, game)
    raise BadFile(
        f"{path}: neither an SB3 replay buffer (.pkl), nor a Minari dataset (data/metadata.json), nor a folder of the"
        " DQN Replay Dataset ($store$_observation_ckpt.N.gz); give one of them"
    )


def _read_sb3_buffer(path: Path, game: str | None, trust_pickle: bool) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Reads a `ReplayBuffer` that SB3's `save_replay_buffer` wrote, each stream in time order."""
    if not path.is_file():
        raise ValueError(f"{path}: not found, or not a file; give an SB3 replay buffer")
    if not trust_pickle:
        raise BadFile(f"{path}: a pickle can execute any code when it is read; if you made it, pass --trust-pickle")
    print(f"warning: {path} is a pickle: the code in it is executed now", file=sys.stderr)
    try:
        with path.open("rb") as file:
            buffer = pickle.load(file)
        obs = np.asarray(buffer.observations)
        actions = np.asarray(buffer.actions)
        rewards = np.asarray(buffer.rewards)
        dones = np.asarray(buffer.dones)
        num_actions = int(buffer.action_space.n)
        first_action = int(getattr(buffer.action_space, "start", 0))
        is_full = bool(buffer.full)
        order = np.arange(int(buffer.pos))
        if is_full:
            # With one array for both, the place to write next holds the newest next observation, not a state.
            oldest = int(buffer.pos) + bool(getattr(buffer, "optimize_memory_usage", False))
            order = np.arange(oldest, int(buffer.pos) + int(buffer.buffer_size)) % int(buffer.buffer_size)
        origin = Origin(f"SB3 replay buffer {path.name}, {obs.shape[1]} streams", "as the SB3 agent saw it", game)
        info = states_info(obs.shape[2:], obs.dtype, origin, num_actions)
    except Exception as error:  # a pickle may raise anything
        raise BadFile(
            f"{path}: not a ReplayBuffer of one observation array and discrete actions"
            f" ({type(error).__name__}: {error}); install what it needs, or save it with SB3's save_replay_buffer"
        ) from error

    def recordings() -> Iterator[Recording]:
        for env in range(obs.shape[1]):
            steps = order
            if is_full and info.obs_shape != frames_first(obs[:1, 0]).shape[1:]:
                # Single images whose first stacks the ring has overwritten in part: start at the next episode.
                steps = order[int(np.argmax(dones[order, env] > 0)) + 1 :]
            # In chunks: the stacks of a whole stream would take as much memory again as the buffer.
            for first in range(0, len(steps), CHUNK):
                steps_T = steps[first : first + CHUNK]
                starts_T = dones[steps_T - 1, env] > 0
                starts_T[0] |= first == 0
                actions_T = actions[steps_T, env].reshape(len(steps_T)) - first_action
                yield Recording(frames_first(obs[steps_T, env]), actions_T, rewards[steps_T, env], starts_T)

    return info, rows(recordings(), path)


def _read_dqn_replay(folder: Path, game: str | None) -> tuple[StatesInfo, Iterator[Arrays]]:
    """Reads a `replay_logs` folder of the DQN Replay Dataset (Agarwal et al., 2020), in time order.

    Where a checkpoint number is missing, no stack reaches over the gap. Dopamine writes three black frames before an
    episode; a stack begins with zeros anyway, so they are left out.
    """
    numbers = sorted(int(match[1]) for file in folder.iterdir() if (match := _DQN_REPLAY.fullmatch(file.name)))
    origin = Origin(
        f"DQN Replay Dataset {folder.name}, checkpoints {', '.join(map(str, numbers))}",
        "Dopamine's: grey, maximum of 2 frames, 84x84 by area, frame skip 4, sticky 0.25, no FIRE",
        game,
    )
    num_actions = make_atari(game, 1, seed=0).num_actions if game else None

    def recordings() -> Iterator[Recording]:
        after_end = True
        is_lost = False
        num_black = STACK - 1
        for number in numbers:
            # After a gap the next stacks are unknown: continue with the next episode.
            is_lost = is_lost or (number > 0 and number - 1 not in numbers)
            for frames, actions_T, rewards_T, terminals_T in _dqn_replay_chunks(folder, number):
                kept = list[int]()
                starts = list[bool]()
                is_black_T = ~np.asarray(frames.any(axis=(1, 2)))
                for t, (is_black, is_terminal) in enumerate(zip(is_black_T, terminals_T != 0, strict=True)):
                    if after_end and is_black and num_black:
                        num_black -= 1
                        continue
                    if not is_lost:
                        kept.append(t)
                        starts.append(after_end)
                    after_end = bool(is_terminal)
                    is_lost = is_lost and not is_terminal
                    num_black = STACK - 1
                if kept:
                    yield Recording(frames[kept], actions_T[kept], rewards_T[kept], np.array(starts))

    return StatesInfo((STACK, 84, 84), "uint8", origin, STACK, num_actions), rows(recordings(), folder)


def _dqn_replay_chunks(folder: Path, number: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields observations, actions, rewards and terminals; the files of actions and rewards are optional."""
    readers = list[Iterator[np.ndarray]]()
    is_present = list[bool]()
    for name, default in (("observation", None), ("action", NO_ACTION), ("reward", 0), ("terminal", None)):
        path = folder / f"$store$_{name}_ckpt.{number}.gz"
        is_present.append(default is None or path.exists())
        shape = (84, 84) if name == "observation" else ()
        readers.append(_npy_chunks(path, shape) if is_present[-1] else itertools.repeat(np.full(CHUNK, default)))
    # The files are read side by side, so they must end together.
    while True:
        chunks = [next(reader, np.empty(0)) for reader in readers]
        lengths = {len(chunk) for chunk in itertools.compress(chunks, is_present)}
        if len(lengths) > 1:
            raise BadFile(f"{folder}: the files of checkpoint {number} differ in length; download them again")
        if lengths == {0}:
            return
        yield tuple(chunk[: len(chunks[0])] for chunk in chunks)


def _npy_chunks(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields a gzipped `.npy` of 8-bit images or of numbers, `CHUNK` rows at a time."""
    try:
        if not path.is_file():  # opening a FIFO would wait forever
            raise ValueError("not a file")
        with gzip.open(path) as file:
            dtype, found = npy_header(file)
            if len(found) != 1 + len(shape) or found[1:] != shape or (shape and dtype != "uint8"):
                raise ValueError(f"expected {'uint8 ' if shape else ''}{('n', *shape)}, found {dtype} {found}")
            # The header may claim any number of rows: memory is allocated for one chunk at a time.
            for first in range(0, found[0], CHUNK):
                chunk = np.empty((min(CHUNK, found[0] - first), *shape), dtype)
                if file.readinto(chunk.data.cast("B")) != chunk.nbytes:
                    raise EOFError(f"it ends before row {first + len(chunk):,} of {found[0]:,}")
                yield chunk
            if file.read(1):
                raise ValueError(f"more than its {found[0]:,} rows")
    except (OSError, *UNREADABLE) as error:
        raise BadFile(f"{path}: not a checkpoint of the DQN Replay Dataset ({error}); download it again") from error


def _limited(parts: Iterator[Arrays], num_states: int) -> Iterator[Arrays]:
    """Yields rows up to the `num_states`-th state."""
    left = num_states
    for part in parts:
        is_context = part.get("context_only", np.zeros(len(part["frames"]), np.bool_))
        states = np.flatnonzero(~is_context)
        if len(states) >= left:
            yield {key: array[: states[left - 1] + 1] for key, array in part.items()}
            return
        left -= len(states)
        yield part
