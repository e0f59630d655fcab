"""Stacks gathered from single frames equal those that the environment showed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policykd.envs.atari import make_atari
from policykd.replay import DrawRange, Replay


def test_stacks_of_real_games_come_back_bit_for_bit() -> None:
    """Breakout under random play: lost lives and game ends within 60 x 8 steps of every stream."""
    envs = make_atari("Breakout", 8, seed=0)
    replay = Replay(8 * 120, 8, 4, envs.obs_shape, stack=4, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    obs, starts_B = envs.reset(), torch.ones(8, dtype=torch.bool)
    seen, labels, num_starts = [], [], 0
    for _ in range(120):
        scores_BA = torch.randn(8, 4, generator=generator)
        replay.add(obs, starts_B, scores_BA)
        seen.append(obs)
        labels.append(scores_BA)
        step = envs.step(torch.randint(4, (8,), generator=generator))
        obs, starts_B = step.obs, step.starts_B
        num_starts += int(starts_B.sum())
    assert num_starts > 8
    assert (replay.gather(torch.arange(len(replay))) == torch.cat(seen)).all()
    assert (replay.teacher_NA == torch.cat(labels)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_stacks_never_cross_a_start(data: st.DataObject) -> None:
    num_envs, num_steps, stack = (data.draw(st.integers(1, n)) for n in (4, 12, 4))
    replay = Replay(num_envs * num_steps, num_envs, 2, (stack, 1, 1), stack=stack, dtype=torch.uint8)
    expected, stacks = [], torch.zeros(num_envs, stack, 1, 1, dtype=torch.uint8)
    for t in range(num_steps):
        starts = (
            [True] * num_envs if t == 0 else data.draw(st.lists(st.booleans(), min_size=num_envs, max_size=num_envs))
        )
        new = torch.arange(num_envs, dtype=torch.uint8) + (1 + t * num_envs)
        stacks = torch.cat([stacks[:, 1:], new.view(-1, 1, 1, 1)], dim=1)
        stacks[torch.tensor(starts), :-1] = 0
        replay.add(stacks, torch.tensor(starts), torch.zeros(num_envs, 2))
        expected.append(stacks.clone())
    assert (replay.gather(torch.arange(len(replay))) == torch.cat(expected)).all()


def test_vectors_stand_alone() -> None:
    replay = Replay(6, 3, 2, (5,))
    obs = torch.randn(6, 5)
    for part in obs.split(3):
        replay.add(part, torch.zeros(3, dtype=torch.bool), torch.ones(3, 2))
    assert (replay.gather(torch.tensor([4, 0])) == obs[[4, 0]]).all()


def sample(replay: Replay, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns observations and teacher outputs of one batch of all states but those held out."""
    drawn = DrawRange(0, len(replay) - replay.num_held_out)
    rows_B = next(replay.batches(1, num, drawn, torch.Generator().manual_seed(0)))
    return replay.gather(rows_B), replay.teacher_NA[rows_B]


def test_samples_are_uniform_pairs_and_a_seed_decides_them() -> None:
    replay = Replay(10, 1, 1, (1,))
    for i in range(10):
        replay.add(torch.tensor([[float(i)]]), torch.tensor([False]), torch.tensor([[10.0 * i]]))
    obs, scores_BA = sample(replay, 20_000)
    assert (scores_BA == 10.0 * obs).all()
    counts = torch.bincount(obs.long().squeeze(1), minlength=10)
    assert counts.min() > 1800
    again, _ = sample(replay, 20_000)
    assert (again == obs).all()


def test_a_stored_state_takes_one_frame_and_a_few_bytes() -> None:
    replay = Replay(1000, 10, 6, (4, 84, 84), stack=4, dtype=torch.uint8)
    bytes_per_state = (replay.frames.nbytes + replay.num_past_frames_N.nbytes) / replay.capacity
    assert bytes_per_state <= 7200
    assert replay.teacher_NA.nbytes / replay.capacity == 4 * 6


def test_a_full_replay_says_so() -> None:
    replay = Replay(3, 2, 1, (1,))
    replay.add(torch.zeros(2, 1), torch.ones(2, dtype=torch.bool), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="replay is full: 3 states"):
        replay.add(torch.zeros(2, 1), torch.ones(2, dtype=torch.bool), torch.zeros(2, 1))


def test_shards_rebuild_a_replay() -> None:
    replay, again = (Replay(8, 2, 1, (2, 1, 1), stack=2, dtype=torch.uint8) for _ in range(2))
    for t in range(4):
        replay.add(torch.full((2, 2, 1, 1), t, dtype=torch.uint8), torch.full((2,), t in (0, 2)), torch.full((2, 1), t))
        if t == 1:
            again.extend(replay.arrays(0))
    again.extend(replay.arrays(4))
    rows_B = torch.arange(8)
    assert (again.gather(rows_B) == replay.gather(rows_B)).all()
    assert (again.teacher_NA == replay.teacher_NA).all()
    with pytest.raises(ValueError, match="the replay holds 8"):
        again.extend(replay.arrays(4))


def test_what_is_held_out_and_what_is_history_are_never_drawn() -> None:
    replay = Replay(20, 1, 1, (1,))
    history = torch.tensor([0, 1, 5, 6, 14, 15])
    frames = torch.arange(20.0).view(20, 1).numpy()
    is_history = torch.isin(torch.arange(20), history).numpy()
    for part in (slice(0, 12), slice(12, 20)):
        shard = {"frames": frames[part], "num_past_frames": torch.zeros(20, dtype=torch.uint8).numpy()[part]}
        replay.extend({**shard, "context_only": is_history[part]})
    replay.num_held_out = 3
    obs, scores_BA = sample(replay, 20_000)
    counts = torch.bincount(obs.long().squeeze(1), minlength=20)
    assert (counts > 0).tolist() == [n not in history.tolist() and n < 17 for n in range(20)]
    assert counts[counts > 0].min() > 1600
    assert scores_BA.isnan().all()
    again = Replay(20, 1, 1, (1,))
    again.extend(replay.arrays(0, 6))
    again.extend(replay.arrays(6))
    assert (again.context_only_rows == history).all()
