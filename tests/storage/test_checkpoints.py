"""A run that is cut between rounds goes on as if nothing had happened."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from policykd.agents.student import make_student
from policykd.envs.atari import make_atari
from policykd.envs.identity import IdentityEnv
from policykd.io.files import BadFile
from policykd.legacy.loop import distill
from policykd.legacy.losses import ForwardKL
from policykd.legacy.schedules import WarmupCosine
from policykd.legacy.states import MixedStates
from policykd.legacy.train_state import Learner, make_learner
from policykd.legacy.trainer import Round
from policykd.storage.checkpoints import restore_checkpoint, save_checkpoint


def breakout_teacher(obs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(84 * 84, 4, generator=generator)
    return obs[:, -1].flatten(1).float() @ weights / 1000


def make(game: str, seed: int = 0) -> Learner:
    if game == "identity":
        return make_learner(make_student((8,), 4, (4,), seed=seed), IdentityEnv(4, 4, seed), capacity=400, seed=seed)
    envs = make_atari("Breakout", 4, seed)
    return make_learner(make_student("1%", 4, seed=seed), envs, capacity=1600, seed=seed)


def rounds(learner: Learner, game: str, until: int, of: int = 4) -> list[Round]:
    run = distill(
        breakout_teacher if game == "Breakout" else lambda obs: 3.0 * obs,
        learner,
        loss=ForwardKL(),
        states=MixedStates(),
        learning_rate=WarmupCosine(1e-3),
        rounds=of,
        states_per_round=400 if game == "Breakout" else 80,
        updates_per_round=4,
        batch_size=16,
    )
    return [next(run) for _ in range(until - learner.round)]


@pytest.mark.parametrize("game", ["identity", "Breakout"])
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_is_bit_equal_to_uninterrupted(game: str, stop: int, tmp_path: Path) -> None:
    whole = make(game)
    expected = rounds(whole, game, 4)

    first = make(game)
    for k in range(stop):
        rounds(first, game, k + 1)
        save_checkpoint(first, tmp_path)
    again = make(game, seed=0)
    restore_checkpoint(again, tmp_path)
    found = rounds(again, game, 4)

    assert [(r.loss, r.kl, r.new_kl, r.num_updates) for r in found] == [
        (r.loss, r.kl, r.new_kl, r.num_updates) for r in expected[stop:]
    ]
    for name, weights in whole.student.state_dict().items():
        assert (again.student.state_dict()[name] == weights).all()
    assert (again.replay.frames == whole.replay.frames).all()


def saved(folder: Path, num_rounds: int) -> list[Learner]:
    """Returns learners as they stood after each round of a run that saved into `folder`."""
    learner, stood = make("identity"), []
    for k in range(num_rounds):
        rounds(learner, "identity", k + 1)
        save_checkpoint(learner, folder)
        again = make("identity")
        restore_checkpoint(again, folder)
        stood.append(again)
    return stood


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] + (b"" if kind == "truncated" else bytes([content[-9] ^ 4]) + content[-8:]))


def test_the_last_two_learners_are_kept_and_every_shard(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    names = [f"{kind}-{k:06d}" for kind in ("checkpoint", "learner") for k in (2, 3)]
    assert sorted(p.stem for p in tmp_path.iterdir()) == names + [f"replay-{k:06d}" for k in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("which", ["learner-000003.safetensors", "replay-000003.npz", "checkpoint-000003.json"])
def test_a_damaged_round_goes_back_to_the_one_before_loudly(
    kind: str, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C05: the run then ends as if nothing had happened."""
    *_, second, third = saved(tmp_path, 3)
    damage(tmp_path / which, kind)
    learner = make("identity")
    restore_checkpoint(learner, tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    reason = "damaged (" if (kind, which[:5]) != ("missing", "check") else "of a checkpoint that"
    assert re.fullmatch(
        rf"warning: {tmp_path}/\w+-000003\.\w+: {re.escape(reason)}.*: going on from round 2, the one before\n", said
    )
    assert learner.round == 2
    assert same(learner, second)
    rounds(learner, "identity", 3)
    save_checkpoint(learner, tmp_path)
    assert not list(tmp_path.glob("damaged-*"))
    again = make("identity")
    restore_checkpoint(again, tmp_path)
    assert same(again, third)
    assert not capsys.readouterr().err


def same(a: Learner, b: Learner) -> bool:
    weights = b.student.state_dict()
    assert a.visit
    assert b.visit
    visits = (replace(visit, collect_seconds=0.0, label_seconds=0.0) for visit in (a.visit, b.visit))
    replays = ((learner.replay.frames, learner.replay.scores_NA, learner.replay.pasts_N) for learner in (a, b))
    return (
        (a.round, a.num_updates, len(a.replay)) == (b.round, b.num_updates, len(b.replay))
        and next(visits) == next(visits)
        and all((weights[name] == w).all() for name, w in a.student.state_dict().items())
        and all((x == y).all() for x, y in zip(*replays, strict=True))
    )


def test_where_every_round_is_damaged_none_is_started_from_zero(tmp_path: Path) -> None:
    """C05."""
    saved(tmp_path, 3)
    damage(tmp_path / "replay-000001.npz", "flipped")
    with pytest.raises(BadFile, match=r"no checkpoint is whole: .*replay-000001.npz: damaged.*; copy them") as caught:
        restore_checkpoint(make("identity"), tmp_path)
    assert "\n" not in str(caught.value)
    for manifest in tmp_path.glob("checkpoint-*"):
        manifest.unlink()
    with pytest.raises(BadFile, match=r"files of checkpoints but none of their manifests"):
        restore_checkpoint(make("identity"), tmp_path)


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        save_checkpoint(make("identity"), tmp_path)
    again = make("identity")
    restore_checkpoint(again, tmp_path)
    assert again.round == 2


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no checkpoint to resume from"):
        restore_checkpoint(make("identity"), tmp_path)
