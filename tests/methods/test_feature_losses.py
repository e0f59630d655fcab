"""Each formula against one written out another way, and the attacks that a test must notice."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from policykd.methods.feature_losses import (
    NUM_ENDS,
    angle_loss_B,
    attention_loss_B,
    attention_maps,
    distance_loss_B,
    hint_loss_B,
    relational_loss_B,
    shift_frames,
    shift_loss_B,
    similarity_loss_B,
    value_loss_B,
)

Pairwise = Callable[[Tensor, Tensor], Tensor]
PAIRWISE: list[Pairwise] = [similarity_loss_B, distance_loss_B, angle_loss_B, relational_loss_B]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_values() -> None:
    loss_B = value_loss_B(torch.tensor([1.0, -2.0]), torch.tensor([1.5, 1.0]))
    assert loss_B.tolist() == [0.25, 9.0]


def test_a_hint_is_relative_to_the_teachers_features() -> None:
    ours, theirs = noise(5, 3), noise(5, 3, seed=1)
    expected = [float(((o - t) ** 2).sum() / (t**2).sum()) for o, t in zip(ours.numpy(), theirs.numpy(), strict=True)]
    np.testing.assert_allclose(hint_loss_B(ours, theirs), expected)
    torch.testing.assert_close(hint_loss_B(7.0 * ours, 7.0 * theirs), hint_loss_B(ours, theirs))
    assert (hint_loss_B(torch.zeros(5, 3), theirs) == 1.0).all()
    assert hint_loss_B(torch.zeros(1, 3), torch.zeros(1, 3)) == 0.0
    assert torch.autograd.gradcheck(lambda o: hint_loss_B(o, theirs), (ours.requires_grad_(),))


def test_attention_is_where_a_map_is_active() -> None:
    ours, theirs = [noise(4, 3, 5, 5), noise(4, 2, 2, 2)], [noise(4, 7, 5, 5, seed=1), noise(4, 9, 2, 2, seed=1)]
    found_B = attention_loss_B(attention_maps(ours), attention_maps(theirs), 2)
    for row in range(4):
        parts = []
        for one, other in zip(ours, theirs, strict=True):
            a, b = ((np.asarray(m[row].float()) ** 2).sum(axis=0).ravel() for m in (one, other))
            parts.append(((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2).sum())
        assert float(found_B[row]) == pytest.approx(np.mean(parts), rel=1e-5)
    assert attention_maps(ours).shape == (4, 29)
    louder = [torch.cat([3.0 * m, 4.0 * m], dim=1) for m in ours]  # more channels, another scale, the same places
    torch.testing.assert_close(attention_maps(louder), attention_maps(ours))
    corner, other = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    corner[..., 0, 0], other[..., 1, 1] = 1.0, 1.0
    assert attention_loss_B(attention_maps([corner]), attention_maps([other]), 1) == 2.0


def test_a_dead_map_has_a_gradient_that_is_a_number() -> None:
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_loss_B(attention_maps([dead]), torch.full((2, 16), 0.25), 1).sum().backward()
    assert dead.grad is not None
    assert dead.grad.isfinite().all()


def test_similarity_compares_normalised_gram_matrices() -> None:
    ours, theirs = noise(6, 3), noise(6, 8, seed=1)
    grams = [np.array([[a @ b for a in x] for b in x]) for x in (ours.numpy(), theirs.numpy())]
    grams = [g / np.sqrt((g**2).sum(axis=1, keepdims=True)) for g in grams]
    np.testing.assert_allclose(similarity_loss_B(ours, theirs), ((grams[0] - grams[1]) ** 2).sum(axis=1))
    torch.testing.assert_close(similarity_loss_B(5.0 * ours, theirs), similarity_loss_B(ours, theirs))
    paper = np.square(grams[0] - grams[1]).sum() / 36  # Tung & Mori's equation 4
    assert float(similarity_loss_B(ours, theirs).mean()) / 6 == pytest.approx(paper)


def test_distances_are_compared_over_their_mean() -> None:
    ours, theirs = 3.0 * noise(7, 3), noise(7, 5, seed=1)

    def relations(x: np.ndarray) -> np.ndarray:
        distances = np.array([[math.dist(a, b) for a in x] for b in x])
        relative: np.ndarray = distances / np.mean([distances[i, j] for i, j in itertools.permutations(range(7), 2)])
        return relative

    a, b = relations(ours.numpy()), relations(theirs.numpy())
    expected = [np.mean([huber(a[i, j] - b[i, j]) for j in range(7) if j != i]) for i in range(7)]
    np.testing.assert_allclose(distance_loss_B(ours, theirs), expected)


@pytest.mark.parametrize("batch", [5, NUM_ENDS + 4])
def test_angles_are_those_between_the_rows_that_follow(batch: int) -> None:
    ours, theirs = noise(batch, 3), noise(batch, 5, seed=1)
    num_ends = min(NUM_ENDS, batch - 1)

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = x[(i + j) % batch] - x[i], x[(i + k) % batch] - x[i]
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    for i, found in enumerate(angle_loss_B(ours, theirs).tolist()):
        pairs = itertools.permutations(range(1, num_ends + 1), 2)
        differences = [cosine(ours.numpy(), i, *ends) - cosine(theirs.numpy(), i, *ends) for ends in pairs]
        assert found == pytest.approx(np.mean([huber(d) for d in differences]))


def test_relations_are_distances_and_twice_the_angles() -> None:
    ours, theirs = noise(9, 3), noise(9, 5, seed=1)
    expected_B = distance_loss_B(ours, theirs) + 2.0 * angle_loss_B(ours, theirs)
    torch.testing.assert_close(relational_loss_B(ours, theirs), expected_B)


@pytest.mark.parametrize("loss", PAIRWISE)
def test_pairwise_losses_are_blind_to_rotation_and_scale(loss: Pairwise) -> None:
    theirs = noise(12, 4)
    rotation, _ = torch.linalg.qr(noise(4, 4, seed=2))
    torch.testing.assert_close(loss(2.5 * theirs @ rotation, theirs), torch.zeros(12, dtype=torch.float64))
    assert (loss(noise(12, 4, seed=3), theirs) > 1e-3).all()
    moved = loss(theirs + 5.0, theirs)
    assert (moved > 1e-3).all() if loss is similarity_loss_B else (moved < 1e-12).all()


@pytest.mark.parametrize("loss", PAIRWISE)
def test_pairwise_losses_have_gradients_where_two_states_are_one(loss: Pairwise) -> None:
    ours, theirs = noise(6, 3).requires_grad_(), noise(6, 5, seed=1)
    assert torch.autograd.gradcheck(lambda o: loss(o, theirs), (ours,))
    twice = noise(6, 3)[[0, 0, 1, 2, 2, 3]].requires_grad_()  # a replay is sampled with replacement
    loss(twice, theirs).sum().backward()
    assert twice.grad is not None
    assert twice.grad.isfinite().all()
    assert twice.grad.abs().max() < 1e3
    same = torch.ones(6, 3, requires_grad=True)
    loss(same, theirs.float()).sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("loss", PAIRWISE)
@pytest.mark.parametrize("batch", [1, 2])
def test_pairwise_losses_of_next_to_no_rows_are_numbers(loss: Pairwise, batch: int) -> None:
    found_B = loss(noise(batch, 3), noise(batch, 5, seed=1))
    assert found_B.shape == (batch,)
    assert found_B.isfinite().all()


def test_pairwise_losses_do_not_grow_with_the_batch() -> None:
    for loss in PAIRWISE:
        few, many = (float(loss(noise(n, 4), noise(n, 4, seed=1)).mean()) for n in (64, 256))
        assert many == pytest.approx(few, rel=0.5)


def test_shift_is_the_kl_from_the_state_as_it_is() -> None:
    scores_BA, shifted_BA = noise(5, 4).requires_grad_(), noise(5, 4, seed=1).requires_grad_()
    loss_B = shift_loss_B(scores_BA, shifted_BA)
    expected_B = kl_divergence(Categorical(logits=scores_BA), Categorical(logits=shifted_BA))
    torch.testing.assert_close(loss_B, expected_B)
    loss_B.sum().backward()
    assert scores_BA.grad is None  # the state as it is does not learn from the shifted one
    assert shifted_BA.grad is not None
    assert (shift_loss_B(scores_BA, scores_BA + 2.0).abs() < 1e-9).all()


def test_frames_are_shifted_as_by_padding_and_cropping() -> None:
    obs = torch.randint(256, (81, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifts = torch.tensor(list(itertools.product(range(-4, 5), repeat=2)))
    padded = F.pad(obs.float(), (4, 4, 4, 4), mode="replicate").byte()
    found = shift_frames(obs, shifts)
    assert found.dtype == torch.uint8
    for row, (down, along) in enumerate(shifts.tolist()):
        crop = padded[row, :, 4 + down : 4 + down + 84, 4 + along : 4 + along + 84]
        assert torch.equal(found[row], crop), (down, along)
    assert torch.equal(shift_frames(obs[:3], torch.zeros(3, 2, dtype=torch.int64)), obs[:3])
