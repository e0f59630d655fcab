from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import num_parameters
from policykd.agents.student import make_student
from policykd.compression.compressors import Fit, layers_with_weights, pixel_unit, recentred
from policykd.compression.pruning import (
    Magnitude,
    Structured,
    cubic_sparsity,
    masks_of_largest,
    sparsity_for_bytes,
    without_channels,
)
from policykd.compression.sparse import pack_sparse
from policykd.legacy.losses import ForwardKL


def test_the_sparsity_rises_as_a_cube_and_then_stays() -> None:
    assert cubic_sparsity(0.0, 0.9, 0.6) == 0.0
    assert cubic_sparsity(0.3, 0.9, 0.6) == pytest.approx(0.9 * (1 - 0.5**3))
    assert cubic_sparsity(0.6, 0.9, 0.6) == cubic_sparsity(1.0, 0.9, 0.6) == pytest.approx(0.9)


def test_the_smallest_of_all_layers_go_in_the_unit_of_their_inputs() -> None:
    weights = [torch.tensor([[0.1, -3.0]]), torch.tensor([[0.2, -0.4, 1.0, 0.05]])]
    assert [m.tolist() for m in masks_of_largest(weights, 0.5, 1.0)] == [[[0.0, 1.0]], [[0.0, 1.0, 1.0, 0.0]]]
    assert [m.tolist() for m in masks_of_largest(weights, 0.5, 10.0)] == [[[1.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]]


def test_the_input_scaling_does_not_decide_what_is_pruned(obs: Tensor) -> None:
    begin = make_student("1%", 6)
    masks = [
        masks_of_largest([x.weight.data for x in layers_with_weights(student)], 0.8, pixel_unit(student))
        for student in (begin, recentred(begin, obs[:, -1]))
    ]
    differ = sum(int((one != other).sum()) for one, other in zip(*masks, strict=True))
    assert differ <= 2  # ties, after rounding
    assert differ < float(masks[0][0].sum())


def test_magnitude_pruning_ends_at_its_bytes_and_zeros_stay_zero(fit: Fit) -> None:
    begin = make_student("4%", 6)
    pruned = Magnitude(60_000)(begin, fit)
    assert len(pack_sparse(pruned)) == pytest.approx(60_000, rel=0.02)
    share = sum(int((x.weight == 0).sum()) for x in layers_with_weights(pruned)) / num_parameters(pruned)
    assert 0.6 < share < 0.9
    assert {type(x) for x in layers_with_weights(pruned)} == {nn.Conv2d, nn.Linear}  # nothing is left of the masks
    assert pruned.state_dict().keys() == begin.state_dict().keys()
    assert not torch.equal(layers_with_weights(pruned)[3].weight, layers_with_weights(begin)[3].weight)
    with pytest.raises(ValueError, match="holds no weight"):
        sparsity_for_bytes(begin, 100)


def test_structured_pruning_changes_nothing_where_nothing_goes(obs: Tensor) -> None:
    begin = make_student("4%", 6)
    same = without_channels(recentred(begin, obs[:, -1]), 10**9)
    assert same.shape == begin.shape
    torch.testing.assert_close(same(obs), begin(obs), atol=1e-4, rtol=0.0)


@dataclass(frozen=True)
class _Recorded:
    """A loss that keeps what it is given."""

    batches: list[Tensor] = field(default_factory=list)

    def __call__(self, student_BA: Tensor, teacher_BA: Tensor, /) -> Tensor:
        self.batches.append(teacher_BA.clone())
        return ForwardKL()(student_BA, teacher_BA)


def test_structured_pruning_gives_a_small_dense_network(fit: Fit) -> None:
    begin = make_student("4%", 6)
    loss = _Recorded()
    pruned = Structured(20_000, loss=loss)(begin, fit)
    assert 15_000 < num_parameters(pruned) <= 20_000
    assert all(16 > width > 1 for width in pruned.shape.widths)
    assert pruned.shape.hidden[0] < 64
    assert all(int((x.weight == 0).sum()) == 0 for x in layers_with_weights(pruned))
    assert begin.shape.widths == (16, 16, 16)
    assert len(loss.batches) == fit.updates
    assert len({batch.numpy().tobytes() for batch in loss.batches}) == fit.updates  # each network goes on in the budget


def test_a_unit_that_does_nothing_goes_first_with_all_that_reads_it(obs: Tensor) -> None:
    student = make_student("1%", 6)
    first, last = layers_with_weights(student)[3:]
    with torch.no_grad():
        for tensor in (first.weight[5], first.bias[5], last.weight[:, 5]):  # type: ignore[index]
            tensor.zero_()
    found = without_channels(student, num_parameters(student) - 1)
    kept = layers_with_weights(found)[3].weight
    assert all(not torch.equal(row, torch.zeros_like(row)) for row in kept)


def test_networks_with_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="structured pruning takes"):
        without_channels(make_student("half", 6), 1000)
