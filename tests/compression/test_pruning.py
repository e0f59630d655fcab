import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import num_parameters
from policykd.agents.student import make_student
from policykd.compression.fine_tuning import FineTuning
from policykd.compression.networks import pixel_unit, weight_layers, with_normalized_input
from policykd.compression.pruning import (
    cubic_sparsity,
    masks_of_largest,
    prune_by_magnitude,
    prune_structured,
    remove_channels,
)
from policykd.loop import forward_kl
from policykd.losses import Batch, Metrics


def test_sparsity_rises_cubically_and_then_stays() -> None:
    assert cubic_sparsity(0.0, 0.9) == 0.0
    assert cubic_sparsity(0.3, 0.9) == pytest.approx(0.9 * (1 - 0.5**3))
    assert cubic_sparsity(0.6, 0.9) == cubic_sparsity(1.0, 0.9) == pytest.approx(0.9)


def test_weights_of_all_layers_are_ranked_together_in_the_unit_of_their_inputs() -> None:
    weights = [torch.tensor([[0.1, -3.0]]), torch.tensor([[0.2, -0.4, 1.0, 0.05]])]
    assert [m.tolist() for m in masks_of_largest(weights, 0.5, 1.0)] == [[[0.0, 1.0]], [[0.0, 1.0, 1.0, 0.0]]]
    assert [m.tolist() for m in masks_of_largest(weights, 0.5, 10.0)] == [[[1.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]]


def test_input_normalization_does_not_decide_what_is_pruned(obs: Tensor) -> None:
    student = make_student("1%", 6)
    masks = [
        masks_of_largest([layer.weight.data for layer in weight_layers(s)], 0.8, pixel_unit(s))
        for s in (student, with_normalized_input(student, obs[:, -1]))
    ]
    num_different = sum(int((one != other).sum()) for one, other in zip(*masks, strict=True))
    assert num_different <= 2  # ties, after rounding
    assert num_different < float(masks[0][0].sum())


def test_magnitude_pruning_reaches_its_sparsity_and_leaves_a_plain_network(tuning: FineTuning) -> None:
    student = make_student("4%", 6)
    pruned = prune_by_magnitude(student, tuning, 0.8)
    layers = weight_layers(pruned)
    num_zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    assert num_zeros / sum(layer.weight.numel() for layer in layers) == pytest.approx(0.8, abs=1e-3)
    assert {type(layer) for layer in layers} == {nn.Conv2d, nn.Linear}  # no parametrization is left
    assert pruned.state_dict().keys() == student.state_dict().keys()
    assert not torch.equal(layers[3].weight, weight_layers(student)[3].weight)
    assert all(int((layer.weight == 0).sum()) == 0 for layer in weight_layers(student))  # the argument is unchanged


def test_removing_nothing_changes_nothing(obs: Tensor) -> None:
    student = make_student("4%", 6)
    same = remove_channels(with_normalized_input(student, obs[:, -1]), 10**9)
    assert same.shape == student.shape
    torch.testing.assert_close(same(obs), student(obs), atol=1e-4, rtol=0.0)


def test_structured_pruning_gives_a_small_dense_network(tuning: FineTuning, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student("4%", 6)
    trained: list[Tensor] = []

    def recording_kl(student: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        if torch.is_grad_enabled():
            trained.append(batch.teacher_BA.clone())
        return forward_kl(student, batch)

    monkeypatch.setattr(FineTuning.train, "__defaults__", (recording_kl,))
    pruned = prune_structured(student, tuning, 20_000)
    assert 15_000 < num_parameters(pruned) <= 20_000
    assert all(16 > width > 1 for width in pruned.shape.widths)
    assert pruned.shape.hidden[0] < 64
    assert all(int((layer.weight == 0).sum()) == 0 for layer in weight_layers(pruned))
    assert student.shape.widths == (16, 16, 16)
    # Every step of pruning continues in the budget, with batches of its own.
    assert len(trained) == tuning.settings.updates
    assert len({batch.numpy().tobytes() for batch in trained}) == tuning.settings.updates


def test_a_dead_unit_is_removed_first_with_all_that_reads_it() -> None:
    student = make_student("1%", 6)
    first, last = weight_layers(student)[3:]
    assert first.bias is not None
    with torch.no_grad():
        for tensor in (first.weight[5], first.bias[5], last.weight[:, 5]):
            tensor.zero_()
    found = remove_channels(student, num_parameters(student) - 1)
    kept = weight_layers(found)[3].weight
    assert all(not torch.equal(row, torch.zeros_like(row)) for row in kept)


def test_structured_pruning_refuses_other_designs_and_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="three convolutions"):
        remove_channels(make_student("half", 6), 1000)
    with pytest.raises(ValueError, match="cannot leave 10 parameters"):
        remove_channels(make_student("1%", 6), 10)
