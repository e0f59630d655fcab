"""Recordings of other tools, made by those tools, come back bit for bit."""

import gzip
import io
import json
import os
import pickle
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import VecFrameStack

from policykd.cli.main import execute
from policykd.envs.atari import make_atari
from policykd.importers.importers import _read_dqn_replay, import_states
from policykd.importers.minari import MAIN_FILE, export_to_minari
from policykd.io.files import BadFile
from policykd.io.signals import handle_signals
from policykd.replay import Replay
from policykd.storage.dataset import load_dataset, open_dataset, save_dataset, write_dataset
from policykd.storage.generations import Origin, TeacherRef

gym.register_envs(ale_py)


@pytest.fixture(autouse=True)
def _chunks_end_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("importers", "minari"):
        monkeypatch.setattr(f"policykd.importers.{module}.CHUNK", 33)


def states(replay: Replay) -> torch.Tensor:
    """Returns every observation that is a state."""
    rows_B = torch.arange(len(replay))
    return replay.gather(rows_B[~torch.isin(rows_B, replay.context_only_rows)])


def column(folder: Path, key: str) -> np.ndarray:
    """Returns an array of all rows that are states."""
    shards = [arrays for _, arrays in open_dataset(folder).generation.read_shards()]
    return np.concatenate([s[key][~s["context_only"]] if "context_only" in s else s[key] for s in shards])


def play_dqn(game: str, num_envs: int, num_steps: int, **settings: Any) -> DQN:
    """Returns a DQN whose buffer holds random play through SB3's own wrappers."""
    env = VecFrameStack(make_atari_env(f"{game}NoFrameskip-v4", n_envs=num_envs, seed=0), 4)
    policy = {"features_extractor_kwargs": {"features_dim": 8}}
    agent = DQN("CnnPolicy", env, learning_starts=10**6, seed=0, policy_kwargs=policy, device="cpu", **settings)
    return agent.learn(num_envs * num_steps)


@pytest.mark.parametrize(
    ("game", "num_envs", "num_steps", "settings"),
    [
        ("Pong", 1, 100, {"buffer_size": 200}),
        ("Breakout", 2, 200, {"buffer_size": 260}),
        (
            "Breakout",
            2,
            200,
            {
                "buffer_size": 260,
                "optimize_memory_usage": True,
                "replay_buffer_kwargs": {"handle_timeout_termination": False},
            },
        ),
    ],
    ids=["with room", "ring", "ring, one array"],
)
def test_sb3s_replay_buffer(
    game: str,
    num_envs: int,
    num_steps: int,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    agent = play_dqn(game, num_envs, num_steps, **settings)
    agent.save_replay_buffer(tmp_path / "replay_buffer.pkl")
    dataset = import_states(tmp_path / "replay_buffer.pkl", tmp_path / "d", game=game, trust_pickle=True)
    assert "the code in it is executed" in capsys.readouterr().err

    buffer = agent.replay_buffer
    assert buffer is not None
    order = np.arange(buffer.pos)
    if buffer.full:
        order = np.concatenate([np.arange(buffer.pos + ("optimize_memory_usage" in settings), 130), order])
        assert buffer.dones[order].sum() >= 4
    replay = load_dataset(tmp_path / "d")
    assert (states(replay).numpy() == buffer.observations[order].swapaxes(0, 1).reshape(-1, 4, 84, 84)).all()
    assert (column(tmp_path / "d", "actions") == buffer.actions[order, :, 0].T.reshape(-1)).all()
    assert (column(tmp_path / "d", "rewards") == buffer.rewards[order].T.reshape(-1)).all()
    starts = np.concatenate([np.ones((1, num_envs)), buffer.dones[order[:-1]]])
    assert (column(tmp_path / "d", "starts") == starts.T.reshape(-1)).all()
    assert dataset.num_states == num_envs * len(order)
    assert dataset.num_rows <= dataset.num_states + 3 * num_envs


def test_sb3s_buffer_with_the_frames_last(tmp_path: Path) -> None:
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=1, seed=0), 4)
    buffer = ReplayBuffer(60, Box(0, 255, (84, 84, 4), np.uint8), Discrete(6), "cpu")
    obs = env.reset()
    for t in range(50):
        action = np.array([t % 6])
        new, rewards, dones, infos = env.step(action)
        buffer.add(np.asarray(obs), np.asarray(new), action, rewards, dones, infos)
        obs = np.asarray(new).copy()
    save_to_pkl(tmp_path / "b.pkl", buffer)
    import_states(tmp_path / "b.pkl", tmp_path / "d", trust_pickle=True)
    replay = load_dataset(tmp_path / "d")
    assert (states(replay).numpy() == np.moveaxis(buffer.observations[:50, 0], 3, 1)).all()
    assert (len(replay), len(replay.context_only_rows)) == (50, 0)


def test_sb3s_buffer_of_vectors(tmp_path: Path) -> None:
    agent = DQN("MlpPolicy", "CartPole-v1", learning_starts=10**6, buffer_size=64, seed=0, device="cpu").learn(100)
    agent.save_replay_buffer(tmp_path / "b.pkl")
    import_states(tmp_path / "b.pkl", tmp_path / "d", trust_pickle=True)
    replay = load_dataset(tmp_path / "d")
    assert agent.replay_buffer is not None
    assert (states(replay).numpy() == np.roll(agent.replay_buffer.observations[:, 0], -36, axis=0)).all()


class Payload:
    """Pickles to code that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_a_pickle_is_not_executed_unless_it_is_trusted(tmp_path: Path) -> None:
    marker, file = tmp_path / "executed", tmp_path / "replay_buffer.pkl"
    file.write_bytes(pickle.dumps(Payload(marker)))
    pickle.loads(file.read_bytes())
    assert marker.exists()
    marker.unlink()
    with pytest.raises(BadFile, match="if you made it, pass --trust-pickle"):
        import_states(file, tmp_path / "d")
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"replay_buffer\.pkl: not a ReplayBuffer"):
        import_states(file, tmp_path / "d", trust_pickle=True)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", pickle.dumps({"observations": 1})])
def test_a_pickle_of_something_else_says_so(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.pkl: not a ReplayBuffer"):
        import_states(tmp_path / "b.pkl", tmp_path / "d", trust_pickle=True)


def test_colours_are_no_stack(tmp_path: Path) -> None:
    buffer = ReplayBuffer(200, Box(0, 255, (84, 84, 3), np.uint8), Discrete(6), "cpu")
    buffer.observations[:] = np.random.default_rng(0).integers(1, 255, buffer.observations.shape)
    buffer.full = True
    save_to_pkl(tmp_path / "b.pkl", buffer)
    with pytest.raises(ValueError, match=r"b\.pkl: its observations are not stacks"):
        import_states(tmp_path / "b.pkl", tmp_path / "d", trust_pickle=True)
    assert not (tmp_path / "d" / "manifest-000001.json").exists()


# Minari


def preprocessed(shape: str) -> gym.Env[Any, Any]:
    if shape == "vectors":
        return gym.make("CartPole-v1")
    env = gym.wrappers.AtariPreprocessing(gym.make("ALE/Breakout-v5", frameskip=1), terminal_on_life_loss=True)
    return gym.wrappers.FrameStackObservation(env, 4) if shape == "stacks" else env


def record(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Path, np.ndarray]:
    """Returns a dataset that minari made of three episodes, the last one cut, and the observations that it holds."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = preprocessed(shape)
    env.action_space.seed(0)
    episodes, seen = [], []
    for number in range(3):
        observations, steps, ended = [env.reset(seed=number)[0]], list[tuple[Any, ...]](), False
        while not ended and (number < 2 or len(steps) < 9):
            action = env.action_space.sample()
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            ended = terminated or truncated
            steps.append((action, reward, terminated, truncated or (number == 2 and len(steps) == 8)))
        actions, rewards, terminations, truncations = (list(column) for column in zip(*steps, strict=True))
        episodes.append(EpisodeBuffer(None, None, None, observations, actions, rewards, terminations, truncations))
        seen += observations
    about: dict[str, Any] = dict.fromkeys(
        ("algorithm_name", "author", "author_email", "description", "code_permalink"), "x"
    )
    minari.create_dataset_from_buffers("recorded-v0", episodes, env=env, eval_env="CartPole-v1", **about, **settings)
    return tmp_path / "recorded-v0", np.stack([np.asarray(o) for o in seen])


@pytest.mark.parametrize("shape", ["vectors", "frames", "stacks"])
def test_minari(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gymnasium's stacks begin with copies of the first frame, where SB3's begin with zeros."""
    source, seen = record(shape, tmp_path, monkeypatch, jpeg_encoding=False)
    dataset = import_states(source, tmp_path / "d")
    assert (dataset.info.origin.game, dataset.info.num_actions) == (
        (None, 2) if shape == "vectors" else ("Breakout", 4)
    )
    replay = load_dataset(tmp_path / "d")
    found = states(replay).numpy()
    assert ((found[:, -1] if shape == "frames" else found) == seen).all()
    starts_T = column(tmp_path / "d", "starts")
    assert starts_T.sum() == 3
    if shape == "frames":
        assert not found[starts_T][:, :-1].any()
    assert (column(tmp_path / "d", "actions") == -1).sum() == 3


def test_a_lossy_minari_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minari

    source, seen = record("frames", tmp_path, monkeypatch)
    stored = np.concatenate([e.observations for e in minari.load_dataset("recorded-v0").iterate_episodes()])
    assert (stored != seen).any()
    with pytest.raises(ValueError, match=r"recorded-v0.*JPEG-coded: lossy.*jpeg_encoding=False"):
        import_states(source, tmp_path / "d")


def test_a_minari_dataset_of_another_game_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = record("stacks", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="expected states of Pong, found Breakout"):
        import_states(source, tmp_path / "d", game="Pong")
    assert not (tmp_path / "d").exists()
    assert import_states(source, tmp_path / "d", game="Breakout").info.origin.game == "Breakout"


def test_a_damaged_minari_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = record("stacks", tmp_path, monkeypatch)
    file = source / "data" / MAIN_FILE
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"x" * 1000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{MAIN_FILE}: invalid") as caught:
            import_states(source, tmp_path / "d")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "d" / "manifest-000001.json").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"total_episodes": float("inf")}, "expected value"),
        ({"action_space": '{"type": "Discrete", "n": -3}'}, "action_space.n: "),
        ({"action_space": '{"type": "Discrete", "n": 2, "start": Infinity}'}, "action_space.start: "),
        ({"observation_space": '{"shape": [99999999], "dtype": "uint8"}'}, "observation_space.shape.0: "),
        ({"env_spec": "[]"}, "env_spec"),
    ],
)
def test_minari_metadata_that_cannot_be(
    changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = record("vectors", tmp_path, monkeypatch)
    path = source / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"metadata.json: invalid \({reason}.*; give another") as caught:
        import_states(source, tmp_path / "d")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["link", "external", "shape bomb", "scalar"])
def test_minari_files_that_reach_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import h5py

    source, _ = record("vectors", tmp_path, monkeypatch)
    (tmp_path / "secret").write_bytes(bytes(16 * 100))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["observations"] = np.zeros((3, 4), np.float32)
    with h5py.File(source / "data" / MAIN_FILE, "a") as file:
        episode: Any = file["episode_0"]
        num_obs = len(episode["observations"])
        del episode["observations"]
        if kind == "link":
            episode["observations"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "observations")
        elif kind == "external":
            secret = [(str(tmp_path / "secret"), 0, 16 * num_obs)]
            episode.create_dataset("observations", (num_obs, 4), np.float32, external=secret)
        elif kind == "scalar":
            episode["observations"] = np.float32(1)
        else:
            episode.create_dataset("observations", (10**12, 4), np.float32, chunks=(1024, 4))
        assert episode["observations"].shape == () or episode["observations"].shape[1] == 4
    with pytest.raises(ValueError, match="episode_0"):
        import_states(source, tmp_path / "d")


def test_export_to_minari_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams of Breakout: episodes in Minari, where they end a step early, and the same stacks again."""
    import minari

    envs, generator = make_atari("Breakout", 2, seed=0), torch.Generator().manual_seed(0)
    obs, starts_B = envs.reset(), torch.ones(2, dtype=torch.bool)
    replay, seen, starts = Replay(240, 2, 4, (4, 84, 84), stack=4, dtype=torch.uint8), [], []
    for _ in range(120):
        replay.add(obs, starts_B, torch.randn(2, 4, generator=generator))
        seen.append(obs)
        starts.append(starts_B)
        step = envs.step(torch.randint(4, (2,), generator=generator))
        obs, starts_B = step.obs, step.starts_B
    save_dataset(replay, tmp_path / "d", Origin("x", game="Breakout", teacher=TeacherRef("PPO", "ab")))
    num_episodes = export_to_minari(tmp_path / "d", tmp_path / "exported-v0")
    assert num_episodes == int(torch.stack(starts).sum()) > 4

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    exported = minari.load_dataset("exported-v0")
    assert (exported.total_episodes, exported.total_steps) == (num_episodes, 240 - num_episodes)
    episodes = list(exported.iterate_episodes())
    by_stream = torch.stack(seen).transpose(0, 1).reshape(240, 4, 84, 84)
    scores = replay.teacher_NA.view(120, 2, 4).transpose(0, 1).reshape(240, 4).numpy()
    assert (np.concatenate([e.observations for e in episodes]) == by_stream.numpy()).all()
    assert (np.concatenate([e.infos["scores"] for e in episodes]) == scores).all()
    assert all((e.actions == e.infos["scores"][:-1].argmax(axis=1)).all() for e in episodes)
    assert exported.sample_episodes(2)
    assert sum(p.stat().st_size for p in (tmp_path / "exported-v0" / "data").iterdir()) < 0.1 * by_stream.nbytes

    import_states(tmp_path / "exported-v0", tmp_path / "again", game="Breakout")
    again = load_dataset(tmp_path / "again")
    assert (states(again) == by_stream).all()
    with pytest.raises(ValueError, match="exists already"):
        export_to_minari(tmp_path / "d", tmp_path / "exported-v0")


# The DQN Replay Dataset


def write_store(folder: Path, name: str, number: int, values: np.ndarray) -> None:
    with gzip.open(folder / f"$store$_{name}_ckpt.{number}.gz", "wb", compresslevel=1) as file:
        np.save(file, values)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A `replay_logs` folder as Dopamine writes it, and the stacks and actions of its states: checkpoint 2 is lost."""
    envs, generator = make_atari("Breakout", 1, seed=0), torch.Generator().manual_seed(0)
    obs, start = envs.reset()[0].numpy(), True
    rows: list[tuple[np.ndarray, int, float, int]] = []
    stacks: list[np.ndarray | None] = []
    for _ in range(300):
        action = torch.randint(4, (1,), generator=generator)
        step = envs.step(action)
        if start:  # Dopamine pads with black frames
            rows += [(np.zeros((84, 84), np.uint8), 0, 0.0, 0)] * 3
            stacks += [None] * 3
        rows.append((obs[-1], int(action), float(step.rewards_B), int(step.starts_B)))
        stacks.append(obs)
        obs, start = step.obs[0].numpy(), bool(step.starts_B)
    folder = tmp_path_factory.mktemp("replay_logs")
    bounds = [0, 100, 201, 260, len(rows)]
    for number in (0, 1, 3):
        part = rows[bounds[number] : bounds[number + 1]]
        frames, actions, rewards, terminals = (np.array(values) for values in zip(*part, strict=True))
        write_store(folder, "observation", number, frames)
        write_store(folder, "action", number, actions.astype(np.int32))
        write_store(folder, "reward", number, rewards.astype(np.float32))
        write_store(folder, "terminal", number, terminals.astype(np.uint8))
    # The past of what follows the gap is in checkpoint 2, so the next state is the first one of a new episode.
    after = range(260, len(rows))
    first_known = next(k for k in after if stacks[k - 1] is None)
    kept = [k for k in [*range(201), *range(first_known, len(rows))] if stacks[k] is not None]
    return folder, np.stack([s for k in kept if (s := stacks[k]) is not None]), np.array([rows[k][1] for k in kept])


def test_the_dqn_replay_dataset(logged: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, stacks, actions = logged
    dataset = import_states(folder, tmp_path / "d", game="BreakoutNoFrameskip-v4")
    replay = load_dataset(tmp_path / "d")
    assert (states(replay).numpy() == stacks).all()
    assert (column(tmp_path / "d", "actions") == actions).all()
    assert column(tmp_path / "d", "starts").sum() > 4
    assert dataset.info.origin.source.endswith("checkpoints 0, 1, 3")
    assert import_states(folder, tmp_path / "few", num_states=50).num_states == 50
    assert (states(load_dataset(tmp_path / "few")).numpy() == stacks[:50]).all()


def test_a_signal_keeps_what_is_imported_and_the_same_import_goes_on(
    logged: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C04, D02."""
    monkeypatch.setattr("policykd.importers.importers.write_dataset", partial(write_dataset, rows_per_shard=40))
    import_states(logged[0], tmp_path / "whole", game="Breakout")

    def read_then_stop(*args: Any, **settings: Any) -> tuple[Any, Iterator[Any]]:
        about, parts = _read_dqn_replay(*args, **settings)

        def signalled() -> Iterator[Any]:
            for number, part in enumerate(parts):
                if number == 5:
                    signal.raise_signal(signal.SIGTERM)
                yield part

        return about, signalled()

    with monkeypatch.context() as patch:
        patch.setattr("policykd.importers.importers._read_dqn_replay", read_then_stop)
        with handle_signals(), pytest.raises(KeyboardInterrupt, match=r"^\d+ states are imported; run the same import"):
            import_states(logged[0], tmp_path / "d", game="Breakout")
    cut = open_dataset(tmp_path / "d")
    assert not cut.generation.manifest.is_complete
    assert 0 < cut.num_rows < len(logged[1])
    with pytest.raises(BadFile, match="was interrupted"):
        export_to_minari(tmp_path / "d", tmp_path / "m")
    import_states(logged[0], tmp_path / "d", game="Breakout")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "d"))
    assert a == b


def damaged(kind: str, folder: Path) -> str:
    """Returns the name of the file that was damaged."""
    frames = np.zeros((20, 84, 84), np.uint8)
    names = {"other length": "terminal", "missing": "terminal", "FIFO": "terminal"}
    file = folder / f"$store$_{names.get(kind, 'observation')}_ckpt.0.gz"
    write_store(folder, "observation", 0, np.zeros((20, 42, 42), np.uint8) if kind == "other shape" else frames)
    write_store(folder, "terminal", 0, np.zeros(19 if kind == "other length" else 20, np.uint8))
    content = file.read_bytes()
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 84, 84)})
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(folder / "executed")] * 3), allow_pickle=True)
    changed = {
        "truncated": content[:-20],
        "flipped": content[:-6] + bytes([content[-6] ^ 1]) + content[-5:],
        "claims more": gzip.compress(claim.getvalue() + frames.tobytes()),
        "objects": gzip.compress(objects.getvalue()),
        "not gzip": b"<html>",
    }
    if kind in ("missing", "FIFO"):
        file.unlink()
        if kind == "FIFO":
            os.mkfifo(file)
    else:
        file.write_bytes(changed.get(kind, content))
    return "checkpoint 0 differ in length" if kind == "other length" else file.name


@pytest.mark.parametrize(
    "kind",
    ["truncated", "flipped", "claims more", "objects", "not gzip", "other shape", "other length", "missing", "FIFO"],
)
def test_a_damaged_store_is_named(kind: str, tmp_path: Path) -> None:
    name = damaged(kind, tmp_path)
    with pytest.raises(ValueError, match="download") as caught:
        import_states(tmp_path, tmp_path / "d")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "d" / "manifest-000001.json").exists()
    assert not (tmp_path / "executed").exists()


def test_the_command_imports_and_exports(
    logged: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, stacks, _ = logged
    execute("states", ["import", str(folder), str(tmp_path / "d"), "--game", "Breakout"])
    assert f"{len(stacks):,} states of Breakout" in capsys.readouterr().out
    execute("states", ["export", str(tmp_path / "d"), str(tmp_path / "breakout-v0")])
    assert "episodes" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"num.states"):
        execute("states", ["import", str(folder), str(tmp_path / "e"), "--num-states", "0"])


def test_what_is_no_recording_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: not found; give an SB3 replay buffer"):
        import_states(tmp_path / "none", tmp_path / "d")
    with pytest.raises(ValueError, match="neither an SB3 replay buffer"):
        import_states(tmp_path, tmp_path / "d")
