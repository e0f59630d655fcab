"""A dataset gives back the very states that were put in, or one line that says why not."""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from policykd.agents.student import make_student
from policykd.agents.teacher import load_teacher
from policykd.envs.atari import make_atari
from policykd.envs.gymnasium_envs import GymnasiumEnvs
from policykd.envs.identity import IdentityEnv
from policykd.envs.vector import VectorEnv
from policykd.io.files import BadFile
from policykd.legacy.loop import distill
from policykd.legacy.losses import ForwardKL
from policykd.legacy.replay import Replay
from policykd.legacy.schedules import WarmupCosine
from policykd.legacy.states import MixedStates
from policykd.legacy.train_state import make_learner
from policykd.runs.folder import lock
from policykd.storage.checkpoints import save_checkpoint
from policykd.storage.dataset import label, load_dataset, save_dataset, write_dataset
from policykd.storage.manifest import MANIFEST, About, open_dataset
from policykd.storage.shards import Arrays

TEACHER = {"algorithm": "PPO", "sha256": "ab" * 32}
ABOUT = About(obs_shape=(2,), stack=1, dtype="float32", source="a test", preprocessing="none", num_actions=2)


def visit(envs: VectorEnv, num_steps: int) -> tuple[Replay, Tensor]:
    """Returns a replay of random play, and the observations that it saw."""
    obs, starts_B, generator = (
        envs.reset(),
        torch.ones(envs.num_envs, dtype=torch.bool),
        torch.Generator().manual_seed(0),
    )
    capacity = num_steps * envs.num_envs
    replay = Replay(capacity, envs.num_envs, envs.num_actions, envs.obs_shape, stack=envs.stack, dtype=obs.dtype)
    seen = []
    for _ in range(num_steps):
        replay.add(obs, starts_B, torch.randn(envs.num_envs, envs.num_actions, generator=generator))
        seen.append(obs)
        step = envs.step(torch.randint(envs.num_actions, (envs.num_envs,), generator=generator))
        obs, starts_B = step.obs, step.starts_B
    return replay, torch.cat(seen)


def points(num_rows: int, first: int = 0) -> Arrays:
    frames = np.arange(first, first + num_rows, dtype=np.float32).repeat(2).reshape(num_rows, 2)
    return {"frames": frames, "pasts": np.zeros(num_rows, np.uint8)}


@pytest.fixture(scope="module")
def breakout() -> tuple[Replay, Tensor]:
    return visit(make_atari("Breakout", 4, seed=0), 80)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two shards of 30 and 10 points."""
    write_dataset(tmp_path / "small", ABOUT, [points(40)], rows_per_shard=30)
    return tmp_path / "small"


def load(folder: Path) -> Replay:
    return load_dataset(folder, num_actions=2, obs_shape=(2,))


def test_a_replay_of_breakout_comes_back_bit_for_bit(breakout: tuple[Replay, Tensor], tmp_path: Path) -> None:
    replay, seen = breakout
    save_dataset(
        replay, tmp_path / "d", source="random play", preprocessing="SB3's", game="ALE/Breakout-v5", teacher=TEACHER
    )
    kept, unlabelled = (
        load_dataset(tmp_path / "d", num_actions=4, obs_shape=(4, 84, 84), game="Breakout", teacher_sha256=sha256)
        for sha256 in (TEACHER["sha256"], "another")
    )
    rows_B = torch.arange(len(seen))
    assert (kept.gather(rows_B) == seen).all()
    assert (kept.scores_NA == replay.scores_NA).all()
    assert unlabelled.scores_NA.isnan().all()
    assert sum(p.stat().st_size for p in (tmp_path / "d").iterdir()) < 600 * len(seen)


def test_vectors_come_back(tmp_path: Path) -> None:
    replay, seen = visit(GymnasiumEnvs("CartPole-v1", 3, 0), 50)
    save_dataset(replay, tmp_path, source="random play", preprocessing="none")
    again = load_dataset(tmp_path, num_actions=2, obs_shape=(4,), num_held_out=30)
    assert (again.gather(torch.arange(150)) == seen).all()
    assert again.num_held_out == 30


def test_label_scores_only_what_has_no_scores(breakout: tuple[Replay, Tensor], tmp_path: Path) -> None:
    save_dataset(breakout[0], tmp_path, source="random play", preprocessing="SB3's", game="Breakout")
    replay = load_dataset(tmp_path, num_actions=4, obs_shape=(4, 84, 84))
    teacher = make_student("1%", 4)
    assert label(replay, teacher, batch_size=100) == len(breakout[1])
    with torch.inference_mode():
        torch.testing.assert_close(replay.scores_NA, teacher(breakout[1]), rtol=0, atol=1e-5)
    assert label(replay, teacher) == 0
    with pytest.raises(FloatingPointError, match="not finite"):
        label(load_dataset(tmp_path, num_actions=4, obs_shape=(4, 84, 84)), lambda obs: teacher(obs) / 0)


def test_what_is_no_state_is_never_labelled(tmp_path: Path) -> None:
    history = np.arange(20) % 10 < 4
    write_dataset(tmp_path / "d", ABOUT, [{**points(20), "history": history}])
    replay = load(tmp_path / "d")
    assert label(replay, torch.sin) == 12
    assert (replay.scores_NA.isnan().any(dim=1).numpy() == history).all()
    assert label(replay, torch.sin) == 0
    save_dataset(replay, tmp_path / "labelled", source="x", preprocessing="x", teacher=TEACHER)
    again = load_dataset(tmp_path / "labelled", num_actions=2, obs_shape=(2,), teacher_sha256=TEACHER["sha256"])
    assert label(again, torch.sin) == 0
    assert not again.sample(64, torch.Generator())[1].isnan().any()


@pytest.mark.parametrize(("first", "last", "counts"), [(0, 8, "0 states to fit to and 2"), (8, 10, "8 .* and 0 held")])
def test_a_part_without_states_is_refused(first: int, last: int, counts: str, tmp_path: Path) -> None:
    history = (np.arange(10) >= first) & (np.arange(10) < last)
    write_dataset(tmp_path / "d", ABOUT, [{**points(10), "history": history}])
    assert load(tmp_path / "d").num_states == 10 - (last - first)
    with pytest.raises(ValueError, match=rf"d: {counts}.*; import more states") as caught:
        load_dataset(tmp_path / "d", num_actions=2, obs_shape=(2,), num_held_out=2)
    assert "\n" not in str(caught.value)


def test_what_no_memory_can_hold_is_refused_before_it_is_taken(small: Path) -> None:
    os.truncate(small / "states-0001.npz", 1 << 36)  # sparse: as large as such a dataset would be
    manifest = json.loads((small / MANIFEST).read_text())
    (small / MANIFEST).write_text(json.dumps({**manifest, "num_rows": 10**12}))
    with pytest.raises(
        ValueError, match=r"small: 1,0+.* rows take 17,000\.0 GB of memory, .*has [\d.,]+; .*--num-states"
    ):
        load(small)


def test_a_full_replay_gives_labelled_batches(tmp_path: Path) -> None:
    replay, _ = visit(IdentityEnv(4, 4, seed=0), 100)
    save_dataset(replay, tmp_path, source="random play", preprocessing="none")
    full = load_dataset(tmp_path, num_actions=4, obs_shape=(4,), num_held_out=100)
    assert full.sample(8, torch.Generator())[1].isnan().all()
    label(full, lambda obs: 3.0 * obs)
    obs, scores_BA = full.sample(64, torch.Generator())
    assert (scores_BA == 3.0 * obs).all()


@pytest.mark.parametrize("game", ["identity", "Breakout"])
def test_a_runs_checkpoints_are_a_dataset(game: str, tmp_path: Path) -> None:
    if game == "identity":
        envs: VectorEnv = IdentityEnv(4, 4, 0)
        student, teacher, num_states = make_student((8,), 4, (4,)), lambda obs: 3.0 * obs, 80
    else:
        envs = make_atari("Breakout", 4, 0)
        student, num_states = make_student("1%", 4), 80
        weights = torch.randn(84 * 84, 4, generator=torch.Generator().manual_seed(0))
        teacher = lambda obs: obs[:, -1].flatten(1).float() @ weights / 1000  # noqa: E731
        settings = {"game": "Breakout", "teacher": {**TEACHER, "file": "a.zip"}}
        (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
    learner = make_learner(student, envs, capacity=2 * num_states, seed=0)
    loop = distill(
        teacher, learner, loss=ForwardKL(), states=MixedStates(), learning_rate=WarmupCosine(1e-3), rounds=2,
        states_per_round=num_states, updates_per_round=1, batch_size=4,
    )  # fmt: skip
    for _ in loop:
        save_checkpoint(learner, tmp_path / "checkpoints")
    for path in (tmp_path, tmp_path / "checkpoints"):
        again = load_dataset(
            path, num_actions=4, obs_shape=envs.obs_shape, game="Breakout", teacher_sha256=TEACHER["sha256"]
        )
        rows_B = torch.arange(2 * num_states)
        assert (again.gather(rows_B) == learner.replay.gather(rows_B)).all()
        assert (again.num_envs, bool(again.scores_NA.isnan().any())) == (4, game == "identity")
        if game == "Breakout":
            assert (again.scores_NA == learner.replay.scores_NA).all()
            with pytest.raises(ValueError, match=r"expected states of Pong, found Breakout"):
                load_dataset(path, num_actions=4, obs_shape=(4, 84, 84), game="Pong")


def test_an_offline_runs_states_are_elsewhere(tmp_path: Path) -> None:
    envs = IdentityEnv(4, 1, 0)
    learner = make_learner(make_student((8,), 4, (4,)), envs, capacity=8, seed=0)
    learner.replay, _ = visit(envs, 8)
    learner.replay.num_given = len(learner.replay)
    save_checkpoint(learner, tmp_path)
    with pytest.raises(ValueError, match="holds no states of its own, as an offline run"):
        open_dataset(tmp_path)


def test_another_game_shape_or_number_of_actions_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match=r"small: expected observations \(4, 84, 84\), found \(2,\)"):
        load_dataset(small, num_actions=2, obs_shape=(4, 84, 84))
    with pytest.raises(ValueError, match=r"small: expected states of an agent with 6 actions, found 2"):
        load_dataset(small, num_actions=6, obs_shape=(2,))
    with pytest.raises(ValueError, match=r"cannot hold out 40 of 40 rows"):
        load_dataset(small, num_actions=2, obs_shape=(2,), num_held_out=40)


def test_the_bundled_teachers_hash_keeps_its_scores(tmp_path: Path) -> None:
    teacher = load_teacher(game="Pong")
    replay, seen = visit(make_atari("Pong", 2, seed=0), 20)
    replay.scores_NA[:] = teacher(seen)
    about = {"algorithm": teacher.algorithm, "sha256": teacher.sha256}
    save_dataset(replay, tmp_path, source="random play", preprocessing="SB3's", game="Pong", teacher=about)
    again = load_dataset(tmp_path, num_actions=6, obs_shape=(4, 84, 84), game="Pong", teacher_sha256=teacher.sha256)
    assert label(again, teacher) == 0


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_bad_shard_is_named(kind: str, small: Path) -> None:
    shard = small / "states-0001.npz"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9] + (b"" if kind == "truncated" else bytes([content[-9] ^ 4]) + content[-8:]))
    if kind == "missing":
        shard.unlink()
    with pytest.raises(ValueError, match=r"states-0001\.npz") as caught:
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


PASTS = saved(np.zeros(10, np.uint8))
FORGED = {
    "a bomb": ({"frames": claims((10**9, 2)), "pasts": claims((10**9,), "|u1")}, "declares 1,000,000,000 rows"),
    "a wide bomb": ({"frames": claims((10, 10**9)), "pasts": PASTS}, "found float32 (10, 1000000000)"),
    "fewer numbers": ({"frames": claims((10, 2)), "pasts": PASTS}, "not a shard"),
    "objects": ({"frames": saved(np.array([print] * 10)), "pasts": PASTS}, "not plain numbers"),
    "no pasts": ({"frames": saved(np.zeros((10, 2), np.float32))}, "no pasts"),
    "scores of nobody": (
        {"frames": saved(np.zeros((10, 2), np.float32)), "pasts": PASTS, "scores": saved(np.zeros((10, 2)))},
        "unknown array 'scores'",
    ),
    "a long reach": (
        {"frames": saved(np.zeros((10, 2), np.float32)), "pasts": saved(np.ones(10, np.uint8))},
        "reaches back before its stream",
    ),
    "nan": ({"frames": saved(np.full((10, 2), np.nan, np.float32)), "pasts": PASTS}, "NaN"),
    "not a zip": (None, "not a shard"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_shard_with_the_right_hash_is_refused(kind: str, small: Path) -> None:
    members, reason = FORGED[kind]
    file = io.BytesIO(b"" if members else b"not a zip")
    if members:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
    (small / "states-0001.npz").write_bytes(file.getvalue())
    manifest = json.loads((small / MANIFEST).read_text())
    manifest["shards"]["states-0001.npz"] = hashlib.sha256(file.getvalue()).hexdigest()
    (small / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"states-0001\.npz") as caught:
        load(small)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stacks_that_reach_into_another_stream_are_refused(tmp_path: Path) -> None:
    about = About(obs_shape=(3, 1, 1), stack=3, dtype="uint8", source="x", preprocessing="x", num_envs=2)

    def read(name: str, pasts: list[int]) -> Replay:
        frames = np.arange(len(pasts), dtype=np.uint8).reshape(-1, 1, 1)
        parts = [{"frames": frames, "pasts": np.array(pasts, np.uint8)}]
        write_dataset(tmp_path / name, about, parts, rows_per_shard=3)
        return load_dataset(tmp_path / name, num_actions=2, obs_shape=(3, 1, 1))

    assert len(read("right", [0, 0, 1, 1, 0, 2, 1, 2])) == 8
    for k, pasts in enumerate(([1, 0], [0, 1], [0, 0, 2, 1], [0, 0, 1, 1, 2, 2, 3, 2])):
        with pytest.raises(ValueError, match=r"states-000\d\.npz: a stack reaches back"):
            read(str(k), pasts)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", 2, "dataset of format 2, this policykd reads 1; update policykd"),
        ("num_rows", 10**9, "claims 1,000,000,000 rows"),
        ("num_rows", 41, "1 of 41 rows are in no shard"),
        ("num_rows", 35, "declares 10 rows, the manifest leaves 5"),
        ("shards", {"../small/states-0000.npz": "ab"}, "its shards cannot be"),
        ("shards", {"states-0000.npz": None}, "its shards cannot be"),
        ("obs_shape", [-2], "its obs_shape cannot be"),
        ("dtype", "object", "its dtype cannot be"),
        ("stack", 4, "a stack of 4 frames does not make"),
        ("game", "Pnog", "its game cannot be"),
        ("teacher", {"sha256": 3}, "its teacher cannot be"),
        ("num_envs", None, "its num_envs cannot be"),
        ("complete", "no", "its complete cannot be"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(key: str, value: object, reason: str, small: Path) -> None:
    manifest = json.loads((small / MANIFEST).read_text())
    (small / MANIFEST).write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ValueError, match="small") as caught:
        load(small)
    assert reason in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_a_damaged_manifest_is_named(content: str, small: Path) -> None:
    (small / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=MANIFEST):
        load(small)


def cut(num_parts: int, error: type[BaseException]) -> Iterator[Arrays]:
    """Yields parts of 25 points, then ends as a process does that is killed, or told to stop."""
    for first in range(0, 25 * num_parts, 25):
        yield points(25, first)
    raise error


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("num_parts", range(6))
def test_an_import_that_was_cut_goes_on_to_the_same_bytes(num_parts: int, tmp_path: Path) -> None:
    """D02: no shard that was committed is lost, or written again."""
    write_dataset(tmp_path / "whole", ABOUT, [points(130)], rows_per_shard=40)
    folder = tmp_path / "d"
    with pytest.raises(KeyboardInterrupt) as interrupt:
        write_dataset(folder, ABOUT, cut(num_parts, KeyboardInterrupt), rows_per_shard=40)
    num_shards = 25 * num_parts // 40
    if num_shards:
        assert str(interrupt.value) == f"{40 * num_shards} states are imported; run the same import again, it goes on"
        dataset = open_dataset(folder)
        assert (dataset.num_rows, len(dataset.shards), dataset.is_complete) == (40 * num_shards, num_shards, False)
        assert np.concatenate([arrays["frames"] for _, arrays in dataset.read()])[-1, 0] == 40 * num_shards - 1
        with pytest.raises(
            BadFile, match=rf"d: an import of {40 * num_shards} states so far that was cut.* it goes on"
        ):
            load(folder)
    else:
        assert not folder.exists()

    (tmp_path / "d").mkdir(exist_ok=True)
    (folder / f"states-{num_shards:04d}.npz").write_bytes(b"written, and not yet in the manifest")
    (folder / ".manifest.json.999999.policykd.tmp").write_bytes(b"cut by a kill")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("states-*")}
    write_dataset(folder, ABOUT, [points(70), points(60, 70)], rows_per_shard=40)
    assert contents(folder) == contents(tmp_path / "whole")
    assert [p.stat().st_mtime_ns == before[p] for p in sorted(before)] == [True] * num_shards + [False]
    with pytest.raises(ValueError, match="holds a dataset already"):
        write_dataset(folder, ABOUT, [points(10)])


def test_an_import_goes_on_with_the_same_rows_alone(tmp_path: Path) -> None:
    """D06."""
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, ABOUT, cut(4, KeyboardInterrupt), rows_per_shard=40)
    with pytest.raises(ValueError, match=r"holds part of another import \(a test\); give another folder"):
        write_dataset(tmp_path, replace(ABOUT, source="another"), [points(130)], rows_per_shard=40)
    with pytest.raises(BadFile, match=r"states-0001\.npz: not what a test gives now"):
        write_dataset(tmp_path, ABOUT, [points(40), points(90, 41)], rows_per_shard=40)
    assert len(open_dataset(tmp_path).shards) == 2


def test_a_damaged_shard_of_an_import_that_was_cut_is_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D04."""
    write_dataset(tmp_path / "whole", ABOUT, [points(130)], rows_per_shard=20)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d", ABOUT, cut(4, KeyboardInterrupt), rows_per_shard=20)
    (tmp_path / "d" / "states-0002.npz").write_bytes(b"damaged")
    write_dataset(tmp_path / "d", ABOUT, [points(130)], rows_per_shard=20)
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    assert re.fullmatch(r"warning: \S+states-0002.npz: damaged .*are imported again\n", capsys.readouterr().err)


def test_fewer_states_than_were_imported_are_all_that_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, ABOUT, cut(6, KeyboardInterrupt), rows_per_shard=20)
    write_dataset(tmp_path, ABOUT, [points(50)], rows_per_shard=20)
    assert (load(tmp_path).frames[1:, 0] == torch.arange(50)).all()
    assert sorted(contents(tmp_path)) == [MANIFEST, *(f"states-{k:04d}.npz" for k in range(3))]


def test_one_process_imports_into_a_folder(tmp_path: Path) -> None:
    """C08."""
    with lock(tmp_path), pytest.raises(OSError, match=f"locked by process {os.getpid()}"):
        write_dataset(tmp_path, ABOUT, [points(50)])


def test_a_reader_sees_the_first_rows_whole(tmp_path: Path) -> None:
    """D03."""
    seen = set[int]()
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(
            write_dataset, tmp_path, ABOUT, (points(5, first) for first in range(0, 200, 5)), rows_per_shard=10
        )
        while not writing.done():
            if (tmp_path / MANIFEST).is_file():
                dataset = open_dataset(tmp_path)
                frames = np.concatenate([arrays["frames"] for _, arrays in dataset.read()])
                assert (frames[:, 0] == np.arange(dataset.num_rows)).all()
                assert not dataset.num_rows % 10
                seen.add(dataset.num_rows)
    assert len(seen) > 1
    assert len(load(tmp_path)) == 200


def test_a_manifest_of_before_is_complete(small: Path) -> None:
    manifest = json.loads((small / MANIFEST).read_text())
    assert manifest.pop("complete") is True
    (small / MANIFEST).write_text(json.dumps(manifest))
    assert open_dataset(small).is_complete
    assert len(load(small)) == 40


def test_shards_bound_the_memory_and_the_manifest_counts(tmp_path: Path) -> None:
    history = np.arange(25) < 3
    write_dataset(tmp_path, ABOUT, ({**points(25, 25 * k), "history": history} for k in range(4)), rows_per_shard=10)
    dataset = open_dataset(tmp_path)
    assert (dataset.num_rows, dataset.num_states, len(dataset.shards)) == (100, 88, 10)
    replay = load(tmp_path)
    assert replay.history.tolist() == [25 * k + i for k in range(4) for i in range(3)]
    with pytest.raises(ValueError, match="a test: holds no states"):
        write_dataset(tmp_path / "empty", ABOUT, [])
