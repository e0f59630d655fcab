"""A run that is killed between rounds resumes with the results of one that was not."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from policykd.agents.student import make_student
from policykd.envs.atari import make_atari
from policykd.envs.vector import VectorEnv
from policykd.io.files import BadFile
from policykd.loop import DistillConfig, Round, distill
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint
from policykd.train_state import Rollout, TrainState, make_train_state
from tests.identity_env import IdentityEnv


class TestTeacher:
    """Outputs that are a fixed function of the newest frame."""

    __test__ = False
    temperature = 1.0

    def __call__(self, obs: Tensor) -> Tensor:
        if obs.ndim == 2:
            return 3.0 * obs
        weights = torch.randn(84 * 84, 4, generator=torch.Generator().manual_seed(0))
        return obs[:, -1].flatten(1).float() @ weights / 1000


def config_of(game: str) -> DistillConfig:
    return DistillConfig(
        rounds=4,
        states_per_round=400 if game == "Breakout" else 80,
        updates_per_round=4,
        batch_size=16,
        learning_rate=1e-3,
        optimizer="muon" if "muon" in game else "adam",
        threads=1,
    )


def make(game: str) -> TrainState:
    envs: VectorEnv = make_atari("Breakout", 4, 0) if game == "Breakout" else IdentityEnv(4, 4, 0)
    student = make_student("1%", 4) if game == "Breakout" else make_student((8,), 4, (4,))
    return make_train_state(student, envs, config_of(game))


def rounds(state: TrainState, game: str = "identity") -> Iterator[Round]:
    return distill(TestTeacher(), state.student, state.envs, config_of(game), state=state)


@pytest.mark.parametrize("game", ["identity", "Breakout", "identity with muon"])
def test_resumed_is_bit_equal_to_uninterrupted(game: str, tmp_path: Path) -> None:
    whole = make(game)
    expected = [(r.train, r.new_states, r.num_updates) for r in rounds(whole, game)]
    found = list[object]()
    for end in (1, 3, 4):  # killed after the first and the third round
        state = make(game)
        if found:
            restore_checkpoint(state, tmp_path)
        for r in rounds(state, game):
            save_checkpoint(state, tmp_path)
            found.append((r.train, r.new_states, r.num_updates))
            if r.index + 1 == end:
                break
    assert found == expected
    for name, weights in whole.student.state_dict().items():
        assert (state.student.state_dict()[name] == weights).all()
    assert (state.replay.frames == whole.replay.frames).all()


def saved(folder: Path, num_rounds: int) -> list[TrainState]:
    """Returns the state after each round of a run that saved into `folder`."""
    state = make("identity")
    restored = []
    for _, _ in zip(range(num_rounds), rounds(state), strict=False):
        save_checkpoint(state, folder)
        restored.append(make("identity"))
        restore_checkpoint(restored[-1], folder)
    return restored


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] + (b"" if kind == "truncated" else bytes([content[-9] ^ 4]) + content[-8:]))


def test_the_last_two_models_are_kept_and_every_shard(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    kept = {path.stem for path in tmp_path.iterdir() if path.name.startswith("model")}
    assert kept == {"model-000002", "model-000003"}
    assert [path.stem for path in sorted(tmp_path.glob("states-*"))] == [f"states-00000{k}" for k in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["model", "progress", "states", "manifest"])
def test_a_damaged_round_falls_back_to_the_previous_one(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C05: the run then ends as if nothing had happened."""
    *_, second, third = saved(tmp_path, 3)
    damage(next(tmp_path.glob(f"{name}-000003.*")), kind)
    state = make("identity")
    restore_checkpoint(state, tmp_path)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.match(rf"warning: {tmp_path}/\w+-000003\.\w+: .*; continuing from round 2, the previous one", printed)
    assert is_same(state, second)
    next(rounds(state))
    save_checkpoint(state, tmp_path)
    found = make("identity")
    restore_checkpoint(found, tmp_path)
    assert is_same(found, third)
    assert not capsys.readouterr().err


def is_same(a: TrainState, b: TrainState) -> bool:
    assert a.rollout
    assert b.rollout
    rollouts = [replace(rollout, collect_seconds=0.0, label_seconds=0.0) for rollout in (a.rollout, b.rollout)]
    weights = b.student.state_dict()
    return (
        (a.round, a.num_updates, len(a.replay)) == (b.round, b.num_updates, len(b.replay))
        and rollouts[0] == rollouts[1]
        and all((weights[name] == w).all() for name, w in a.student.state_dict().items())
        and bool((a.replay.frames == b.replay.frames).all())
        and bool((a.replay.teacher_NA == b.replay.teacher_NA).all())
    )


def test_where_every_round_is_damaged_the_run_does_not_start_over(tmp_path: Path) -> None:
    """C05."""
    with pytest.raises(BadFile, match="no checkpoint to resume from"):
        restore_checkpoint(make("identity"), tmp_path)
    saved(tmp_path, 3)
    damage(tmp_path / "states-000001.npz", "flipped")
    with pytest.raises(BadFile, match=r"no intact generation: .*states-000001.npz: damaged.*; copy the") as caught:
        restore_checkpoint(make("identity"), tmp_path)
    assert "\n" not in str(caught.value)
    for manifest in tmp_path.glob("manifest-*"):
        manifest.unlink()
    with pytest.raises(BadFile, match=r"holds files of checkpoints or datasets but no manifest"):
        restore_checkpoint(make("identity"), tmp_path)


def test_the_checkpoints_of_another_run_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        save_checkpoint(make("identity"), tmp_path)
    state = make("identity")
    restore_checkpoint(state, tmp_path)
    assert state.round == 2


def test_a_metric_that_is_not_a_number_does_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    state = make("identity")
    state.rollout = Rollout(first=0, student_fraction=0.0, episodes=[], metrics={"a": float("nan"), "b": 1.0})
    save_checkpoint(state, tmp_path)
    restore_checkpoint(state, tmp_path)
    assert state.rollout.metrics == {"b": 1.0}


def test_a_loss_with_weights_is_restored(tmp_path: Path) -> None:
    state, found = make("identity"), make("identity")
    state.loss_module = torch.nn.Linear(2, 2)
    found.loss_module = torch.nn.Linear(2, 2)
    save_checkpoint(state, tmp_path)
    restore_checkpoint(found, tmp_path)
    assert (state.loss_module.weight == found.loss_module.weight).all()
