"""Muon: an orthogonal update of weights, Adam's of biases, and nothing at all of an update that is not finite."""

import pytest
import torch
from torch import nn

from policykd.optimizer import UPDATE_RMS, Muon, orthogonalized
from tests.core.problems import Problem


@pytest.mark.parametrize("shape", [(16, 256), (98, 40), (1, 9), (6, 6)])
def test_singular_values_become_about_equal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1, shape[1])
    found = orthogonalized(matrix)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.25
    assert values.min() > 0.3
    # The singular vectors stay: the product with the transpose is symmetric and positive.
    product = found @ matrix.T
    torch.testing.assert_close(product, product.T, rtol=1e-3, atol=1e-3 * float(product.abs().max()))
    assert torch.linalg.eigvalsh(product).min() > -1e-3


def optimizer_of(parameters: list[nn.Parameter], rate: float) -> Muon:
    optimizer = Muon(parameters, torch.tensor(rate))
    optimizer.found_inf = torch.tensor(0.0)
    return optimizer


def test_biases_are_updated_as_by_adam() -> None:
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    muon = optimizer_of([ours], 0.1)
    adam = torch.optim.Adam([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient = torch.randn(3, generator=generator)
        ours.grad = gradient.clone()
        theirs.grad = gradient.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_updates_of_weights_have_the_size_of_adams() -> None:
    weight = nn.Parameter(torch.zeros(32, 16, 4, 4))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer_of([weight], 1.0).step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(UPDATE_RMS, rel=0.25)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    optimizer = optimizer_of(parameters, 0.1)

    def step(scale: float, found_inf: float) -> None:
        optimizer.found_inf = torch.tensor(found_inf)
        for p in parameters:
            p.grad = torch.full_like(p, scale)
        optimizer.step()

    step(bad, 1.0)  # the very first one
    assert all((p == 1).all() for p in parameters)
    step(0.5, 0.0)
    before = [tensor.clone() for p in parameters for tensor in (p, *optimizer.state[p].values())]
    step(bad, 1.0)
    after = [tensor for p in parameters for tensor in (p, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_memory_format_of_weights_changes_nothing() -> None:
    weights = [nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
    for weight in weights:
        weight.grad = torch.ones_like(weight) * torch.arange(3.0)
        optimizer_of([weight], 0.1).step()
    torch.testing.assert_close(*weights)


def test_a_student_learns_with_it(eye: torch.Tensor) -> None:
    problem = Problem()
    last = problem.train(optimizer="muon")[-1]
    assert (problem.student(eye).argmax(dim=1) == torch.arange(4)).all()
    assert last.train["kl"] < 1e-3
