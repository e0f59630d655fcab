"""A run that is cut between rounds goes on as if nothing had happened."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from policykd.agents.student import make_student
from policykd.checkpoints import MANIFEST, restore_checkpoint, save_checkpoint
from policykd.distill import Learner, Round, distill, make_learner
from policykd.envs.atari import make_atari
from policykd.envs.identity import IdentityEnv
from policykd.losses import ForwardKL
from policykd.schedules import WarmupCosine
from policykd.states import MixedStates


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


def test_only_the_last_learner_is_kept_and_every_shard(tmp_path: Path) -> None:
    learner = make("identity")
    for k in range(3):
        rounds(learner, "identity", k + 1)
        save_checkpoint(learner, tmp_path)
    names = ["checkpoint.json", "learner-0003.safetensors", *(f"replay-{k:04d}.npz" for k in (1, 2, 3))]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("which", ["learner-0001.safetensors", "replay-0001.npz"])
def test_damage_is_noticed(kind: str, which: str, tmp_path: Path) -> None:
    learner = make("identity")
    rounds(learner, "identity", 1)
    save_checkpoint(learner, tmp_path)
    file = tmp_path / which
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(
            content[:-9] if kind == "truncated" else content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
        )
    with pytest.raises(ValueError, match=which):
        restore_checkpoint(make("identity"), tmp_path)


def test_no_checkpoint_or_one_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        restore_checkpoint(make("identity"), tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        restore_checkpoint(make("identity"), tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        restore_checkpoint(make("identity"), tmp_path)
