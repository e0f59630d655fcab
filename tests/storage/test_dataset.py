"""A dataset gives back exactly the states that were saved, or one line that says why not."""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from policykd.agents.student import make_student
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.vector import VectorEnv
from policykd.io.files import BadFile, lock_folder
from policykd.io.typed import Arrays
from policykd.loop import DistillConfig
from policykd.replay import Replay
from policykd.storage.checkpoints import save_checkpoint
from policykd.storage.dataset import label, load_dataset, open_dataset, save_dataset, write_dataset
from policykd.storage.generations import Origin, StatesInfo, TeacherRef
from policykd.train_state import make_train_state
from tests.identity_env import IdentityEnv

REF = TeacherRef("PPO", "ab" * 32)
INFO = StatesInfo(obs_shape=(2,), dtype="float32", origin=Origin("a test"), num_actions=2)


class Stub(torch.nn.Module):
    """A teacher's network that only has a shape."""

    def __init__(self, num_actions: int, obs_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.obs_shape = obs_shape


def stub(num_actions: int = 2, obs_shape: tuple[int, ...] = (2,), sha256: str = REF.sha256) -> Teacher:
    return Teacher(Stub(num_actions, obs_shape), "PPO", Path(), sha256)


def load(folder: Path, **settings: int) -> Replay:
    return load_dataset(folder, stub(), **settings)  # type: ignore[arg-type]


def collect(envs: VectorEnv, num_steps: int) -> tuple[Replay, Tensor]:
    """Returns a replay of random play, and the observations that it saw."""
    obs = envs.reset()
    starts_B = torch.ones(envs.num_envs, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    shape = (num_steps * envs.num_envs, envs.num_envs, envs.num_actions, envs.obs_shape)
    replay, seen = Replay(*shape, stack=envs.stack, dtype=obs.dtype), []
    for _ in range(num_steps):
        replay.add(obs, starts_B, torch.randn(envs.num_envs, envs.num_actions, generator=generator))
        seen.append(obs)
        step = envs.step(torch.randint(envs.num_actions, (envs.num_envs,), generator=generator))
        obs, starts_B = step.obs, step.starts_B
    return replay, torch.cat(seen)


def points(num_rows: int, first: int = 0) -> Arrays:
    frames = np.arange(first, first + num_rows, dtype=np.float32).repeat(2).reshape(num_rows, 2)
    return {"frames": frames, "num_past_frames": np.zeros(num_rows, np.uint8)}


def rewrite_manifests(folder: Path, **changes: object) -> None:
    """Changes fields of all manifests, and seals them again as an attacker would."""
    for path in folder.glob("manifest-*"):
        manifest = {**json.loads(path.read_bytes()), **changes}
        del manifest["sha256"]
        lines = b"\n" + json.dumps(manifest, indent=1).encode()[1:]
        path.write_bytes(b'{"sha256": "%s",' % hashlib.sha256(lines).hexdigest().encode() + lines)


@pytest.fixture(scope="module")
def breakout() -> tuple[Replay, Tensor]:
    return collect(make_atari("Breakout", 4, seed=0), 80)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two shards of 30 and 10 points."""
    write_dataset(tmp_path / "small", INFO, [points(40)], rows_per_shard=30)
    return tmp_path / "small"


def test_a_replay_of_breakout_comes_back_bit_for_bit(breakout: tuple[Replay, Tensor], tmp_path: Path) -> None:
    replay, seen = breakout
    save_dataset(replay, tmp_path / "d", Origin("random play", "SB3's", "Breakout", REF))
    kept, unlabelled = (
        load_dataset(tmp_path / "d", stub(4, (4, 84, 84), sha256), game="ALE/Breakout-v5")
        for sha256 in (REF.sha256, "another")
    )
    assert (kept.gather(torch.arange(len(seen))) == seen).all()
    assert (kept.teacher_NA == replay.teacher_NA).all()
    assert unlabelled.teacher_NA.isnan().all()
    assert sum(p.stat().st_size for p in (tmp_path / "d").iterdir()) < 600 * len(seen)


def test_vectors_come_back(tmp_path: Path) -> None:
    replay, seen = collect(GymnasiumEnvs("CartPole-v1", 3, 0), 50)
    save_dataset(replay, tmp_path, Origin("random play"))
    assert (load_dataset(tmp_path, stub(2, (4,))).gather(torch.arange(150)) == seen).all()


def test_label_fills_in_only_what_is_missing(breakout: tuple[Replay, Tensor], tmp_path: Path) -> None:
    save_dataset(breakout[0], tmp_path, Origin("random play", game="Breakout"))
    replay = load_dataset(tmp_path, stub(4, (4, 84, 84)))
    teacher = make_student("1%", 4)
    assert label(replay, teacher) == len(breakout[1])
    with torch.inference_mode():
        torch.testing.assert_close(replay.teacher_NA, teacher(breakout[1]), rtol=0, atol=1e-5)
    assert label(replay, teacher) == 0
    with pytest.raises(FloatingPointError, match="not finite"):
        label(load_dataset(tmp_path, stub(4, (4, 84, 84))), lambda obs: teacher(obs) / 0)


def test_rows_that_only_complete_stacks_are_never_labelled(tmp_path: Path) -> None:
    context_only = np.arange(20) % 10 < 4
    write_dataset(tmp_path / "d", INFO, [{**points(20), "context_only": context_only}])
    replay = load(tmp_path / "d")
    assert label(replay, torch.sin) == 12
    assert (replay.teacher_NA.isnan().any(dim=1).numpy() == context_only).all()
    save_dataset(replay, tmp_path / "labelled", Origin("x", teacher=REF))
    assert label(load(tmp_path / "labelled"), torch.sin) == 0


@pytest.mark.parametrize(
    ("first", "last", "counts"), [(0, 8, "0 states to train on and 2"), (8, 10, "8 .* and 0 held")]
)
def test_a_part_without_states_is_refused(first: int, last: int, counts: str, tmp_path: Path) -> None:
    context_only = (np.arange(10) >= first) & (np.arange(10) < last)
    write_dataset(tmp_path / "d", INFO, [{**points(10), "context_only": context_only}])
    assert load(tmp_path / "d").num_states == 10 - (last - first)
    with pytest.raises(ValueError, match=rf"d: {counts}.*; import more states") as caught:
        load(tmp_path / "d", num_held_out=2)
    assert "\n" not in str(caught.value)


def test_more_rows_than_memory_are_refused_before_it_is_allocated(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"small: 40 rows take [\d.]+ GB of memory, .*has [\d.]+; .*--num-states"):
        load(small)


@pytest.mark.parametrize("is_atari", [False, True])
def test_a_runs_checkpoints_are_a_dataset(is_atari: bool, tmp_path: Path) -> None:
    envs: VectorEnv = make_atari("Breakout", 4, 0) if is_atari else IdentityEnv(4, 4, 0)
    student = make_student("1%", 4) if is_atari else make_student((8,), 4, (4,))
    state = make_train_state(student, envs, DistillConfig(rounds=2, states_per_round=80))
    state.replay, seen = collect(envs, 40)
    origin = Origin("a run", game="Breakout" if is_atari else None, teacher=REF if is_atari else None)
    save_checkpoint(state, tmp_path / "checkpoints", origin)
    for path in (tmp_path, tmp_path / "checkpoints"):
        found = load_dataset(path, stub(4, envs.obs_shape), game="Breakout")
        assert (found.gather(torch.arange(160)) == seen).all()
        assert (found.num_envs, bool(found.teacher_NA.isnan().any())) == (4, not is_atari)
    state.replay.num_preloaded = len(state.replay)
    save_checkpoint(state, tmp_path / "offline")
    with pytest.raises(ValueError, match="holds no states of its own"):
        open_dataset(tmp_path / "offline")
    if is_atari:
        assert (found.teacher_NA == state.replay.teacher_NA).all()
        with pytest.raises(ValueError, match=r"expected game Pong, found Breakout"):
            load_dataset(tmp_path, stub(4, (4, 84, 84)), game="Pong")


def test_another_shape_or_number_of_actions_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"small: expected observations \(4, 84, 84\), found \(2,\)"):
        load_dataset(small, stub(2, (4, 84, 84)))
    with pytest.raises(ValueError, match=r"small: expected 6 actions, found 2"):
        load_dataset(small, stub(6))
    with pytest.raises(ValueError, match=r"cannot hold out 40 of 40 rows"):
        load(small, num_held_out=40)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "longer", "missing", "a folder"])
def test_a_damaged_shard_is_named(kind: str, small: Path) -> None:
    shard = small / "states-000002.npz"
    content = shard.read_bytes()
    changed = {"flipped": content[:-9] + bytes([content[-9] ^ 4]) + content[-8:], "truncated": content[:-9]}
    shard.unlink()
    if kind == "a folder":
        shard.mkdir()
    elif kind != "missing":
        shard.write_bytes(changed.get(kind, content + b"0"))
    with pytest.raises(BadFile, match=r"states-000002\.npz") as caught:
        load(small)
    assert "\n" not in str(caught.value)


def claims(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    """Returns a .npy whose header claims a shape that no numbers follow."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


PAST = {"num_past_frames": saved(np.zeros(10, np.uint8))}
FORGED = {
    "a bomb": ({"frames": claims((10**9, 2)), "num_past_frames": claims((10**9,), "|u1")}, "found float32 (1000000000"),
    "a wide bomb": ({"frames": claims((10, 10**9)), **PAST}, "found float32 (10, 1000000000)"),
    "fewer numbers": ({"frames": claims((10, 2)), **PAST}, "not a shard"),
    "objects": ({"frames": saved(np.array([print] * 10)), **PAST}, "not plain numbers"),
    "no past": ({"frames": saved(np.zeros((10, 2), np.float32))}, "array 'num_past_frames' not found"),
    "another type": (
        {"frames": saved(np.zeros((10, 2), np.float32)), **PAST, "teacher": saved(np.zeros((10, 2)))},
        "teacher: expected float32 (10, 2), found float64",
    ),
    "an unknown array": ({"frames": saved(np.zeros((10, 2), np.float32)), **PAST, "x": claims((9,))}, "unknown array"),
    "a long reach": (
        {"frames": saved(np.zeros((10, 2), np.float32)), "num_past_frames": saved(np.ones(10, np.uint8))},
        "reaches back before its stream",
    ),
    "nan": ({"frames": saved(np.full((10, 2), np.nan, np.float32)), **PAST}, "NaN"),
    "not a zip": (None, "not a shard"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_shard_with_the_right_hash_is_refused(kind: str, small: Path) -> None:
    members, reason = FORGED[kind]
    file = io.BytesIO(b"" if members else b"not a zip" * 100)
    if members:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
    (small / "states-000002.npz").write_bytes(file.getvalue())
    shards = json.loads((small / "manifest-000003.json").read_text())["shards"]
    entry = {"sha256": hashlib.sha256(file.getvalue()).hexdigest(), "num_bytes": len(file.getvalue())}
    rewrite_manifests(small, shards={**shards, "states-000002.npz": {**shards["states-000002.npz"], **entry}})
    with pytest.raises(ValueError, match=r"states-000002\.npz") as caught:
        load(small)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_past", "is_right"),
    [
        ([0, 0, 1, 1, 0, 2, 1, 2], True),
        ([1, 0], False),
        ([0, 1], False),
        ([0, 0, 2, 1], False),
        ([0, 0, 1, 1, 2, 2, 3, 2], False),
    ],
)
def test_stacks_that_reach_into_another_stream_are_refused(num_past: list[int], is_right: bool, tmp_path: Path) -> None:
    info = StatesInfo(obs_shape=(3, 1, 1), dtype="uint8", origin=Origin("x"), stack=3, num_envs=2)
    frames = np.arange(len(num_past), dtype=np.uint8).reshape(-1, 1, 1)
    parts = [{"frames": frames, "num_past_frames": np.array(num_past, np.uint8)}]
    write_dataset(tmp_path, info, parts, rows_per_shard=3)
    if is_right:
        assert len(load_dataset(tmp_path, stub(2, (3, 1, 1)))) == len(num_past)
        return
    with pytest.raises(ValueError, match=r"states-00000\d\.npz: a stack reaches back"):
        load_dataset(tmp_path, stub(2, (3, 1, 1)))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("obs_shape", [-2], "obs_shape.0"),
        ("obs_shape", [65536, 65536], "do not fit into"),
        ("dtype", "object", "dtype"),
        ("stack", 4, "a stack of 4 frames does not make"),
        ("num_envs", None, "num_envs"),
        ("origin", {"source": "x", "teacher": {"sha256": 3}}, "origin.teacher"),
    ],
)
def test_an_invalid_description_is_refused(key: str, value: object, reason: str, small: Path) -> None:
    states = json.loads((small / "manifest-000003.json").read_text())["states"]
    rewrite_manifests(small, states={**states, key: value})
    with pytest.raises(BadFile, match="small") as caught:
        load(small)
    assert reason in str(caught.value)


def test_a_damaged_manifest_falls_back_to_the_previous_one(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "manifest-000003.json").write_text("[" * 100_000)
    with pytest.raises(BadFile, match=r"small: an import that .*after 40 states"):  # the last one only completes it
        load(small)
    assert re.fullmatch(
        r"warning: \S+manifest-000003.json: damaged .*continuing from row 40.*\n", capsys.readouterr().err
    )


def cut(num_parts: int) -> Iterator[Arrays]:
    """Yields parts of 25 points, then ends as an import that is interrupted."""
    for first in range(0, 25 * num_parts, 25):
        yield points(25, first)
    raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("num_parts", range(6))
def test_an_interrupted_import_continues_to_the_same_bytes(num_parts: int, tmp_path: Path) -> None:
    """D02: no shard that was committed is lost, or written again."""
    write_dataset(tmp_path / "whole", INFO, [points(130)], rows_per_shard=40)
    folder = tmp_path / "d"
    num_shards = 25 * num_parts // 40
    with pytest.raises(KeyboardInterrupt, match=f"^{40 * num_shards} states are imported; run the same import again"):
        write_dataset(folder, INFO, cut(num_parts), rows_per_shard=40)
    if num_shards:
        dataset = open_dataset(folder)
        assert (dataset.num_rows, len(dataset.shards)) == (40 * num_shards, num_shards)
        with pytest.raises(BadFile, match=rf"d: an import .* after {40 * num_shards} states; run the same import"):
            load(folder)
    else:
        assert not folder.exists()

    (tmp_path / "d").mkdir(exist_ok=True)
    (folder / f"states-{num_shards + 1:06d}.npz").write_bytes(b"written, and not yet in a manifest")
    (folder / ".manifest-000001.json.999999.policykd.tmp").write_bytes(b"cut by a kill")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("states-*")}
    write_dataset(folder, INFO, [points(70), points(60, 70)], rows_per_shard=40)
    assert contents(folder) == contents(tmp_path / "whole")
    assert [p.stat().st_mtime_ns == before[p] for p in sorted(before)] == [True] * num_shards + [False]
    with pytest.raises(ValueError, match="holds a dataset already"):
        write_dataset(folder, INFO, [points(10)])


def test_an_interrupted_import_of_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    """The first half of one source and the second of another would be a dataset that nobody collected."""
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", INFO, cut(4), rows_per_shard=20)
    before = contents(tmp_path / "d")
    extra = {**points(130), "context_only": np.zeros(130, np.bool_)}
    for changed in ([points(130, 1)], [points(30)], [extra]):
        with pytest.raises(ValueError, match="holds part of another import; use another folder, or remove it first"):
            write_dataset(tmp_path / "d", INFO, changed, rows_per_shard=20)
    assert contents(tmp_path / "d") == before


def test_a_damaged_shard_of_an_interrupted_import_is_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D04."""
    whole = write_dataset(tmp_path / "whole", INFO, [points(130)], rows_per_shard=20)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", INFO, cut(4), rows_per_shard=20)
    (tmp_path / "d" / "states-000003.npz").write_bytes(b"damaged")
    assert write_dataset(tmp_path / "d", INFO, [points(130)], rows_per_shard=20).sha256 == whole.sha256
    assert re.fullmatch(r"warning: \S+states-000003.npz: .*are imported again\n", capsys.readouterr().err)
    assert len(load(tmp_path / "d")) == 130


def test_one_process_imports_into_a_folder(tmp_path: Path) -> None:
    """C08."""
    with lock_folder(tmp_path), pytest.raises(OSError, match=f"locked by process {os.getpid()}"):
        write_dataset(tmp_path, INFO, [points(50)])


def test_a_reader_sees_the_first_rows(tmp_path: Path) -> None:
    """D03."""
    seen = set[int]()
    with ThreadPoolExecutor(1) as writer:
        parts = (points(5, first) for first in range(0, 200, 5))
        writing = writer.submit(write_dataset, tmp_path, INFO, parts, rows_per_shard=10)
        while not writing.done():
            if list(tmp_path.glob("manifest-*")):
                dataset = open_dataset(tmp_path)
                frames = np.concatenate([arrays["frames"] for _, arrays in dataset.generation.read_shards()])
                assert (frames[:, 0] == np.arange(dataset.num_rows)).all()
                seen.add(dataset.num_rows)
    assert all(num_rows % 10 == 0 for num_rows in seen)
    assert len(load(tmp_path)) == 200


def test_shards_bound_the_memory_and_the_manifest_counts(tmp_path: Path) -> None:
    context_only = np.arange(25) < 3
    parts = ({**points(25, 25 * k), "context_only": context_only} for k in range(4))
    dataset = write_dataset(tmp_path / "d", INFO, parts, rows_per_shard=10)
    assert (dataset.num_rows, dataset.num_states, len(dataset.shards)) == (100, 88, 10)
    assert load(tmp_path / "d").context_only_rows.tolist() == [25 * k + i for k in range(4) for i in range(3)]
    with pytest.raises(ValueError, match="a test: holds no states"):
        write_dataset(tmp_path / "empty", INFO, [])
