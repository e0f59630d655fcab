"""A network's layers, computed one by one by their definitions, give the network's outputs."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policykd.agents.networks import MLP, FrameNet, ImpalaNet, UserNet
from policykd.agents.student import SIZES, Size, Student, init_student, student_shape
from policykd.export.layers import Layer, layers_of


def computed(layers: list[Layer], obs: Tensor) -> Tensor:
    """Returns outputs by the definitions in `Layer` alone."""
    values = {"obs": obs.float()}
    formulas: dict[str, Callable[[Layer, Tensor], Tensor]] = {
        "conv": lambda y, x: F.conv2d(x, weight(y), y.bias, y.stride, y.padding, 1, y.groups),
        "average_pool": lambda y, x: F.avg_pool2d(x, y.kernel, y.stride, y.padding),
        "max_pool": lambda y, x: F.max_pool2d(x, y.kernel, y.stride, y.padding),
        "relu": lambda _, x: x.clamp(min=0.0),
        "elu": lambda y, x: F.elu(x, y.alpha),
        "leaky_relu": lambda y, x: F.leaky_relu(x, y.alpha),
        "tanh": lambda _, x: torch.tanh(x),
        "flatten": lambda _, x: x.reshape(len(x), -1),
        "dense": lambda y, x: x @ weight(y).T + (0.0 if y.bias is None else y.bias),
    }
    for layer in layers:
        taken = [values[name] for name in layer.takes]
        values[layer.gives] = (
            taken[0] + taken[1] if layer.operator == "add" else formulas[layer.operator](layer, *taken)
        )
    return values["scores"]


def weight(layer: Layer) -> Tensor:
    assert layer.weight is not None
    return layer.weight


def shaken(student: Student) -> Student:
    """Returns a student with every number away from where it begins, the input scaling too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        if isinstance(student.net, FrameNet):
            student.net.centre.fill_(87.0)
            student.net.scale.fill_(31.0)
    return student


def noise(num: int) -> Tensor:
    return torch.randint(256, (num, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_layers_give_the_networks_scores(size: Size, rank: int) -> None:
    student, frames = shaken(init_student(replace(student_shape(size, 6), rank=rank))), noise(3)
    assert isinstance(student.net, FrameNet)
    layers, state = layers_of(student.net), student.net.state_dict()
    torch.testing.assert_close(computed(layers, frames), student.net(frames), atol=1e-4, rtol=1e-4)
    unscaled = copy.deepcopy(student.net)
    unscaled.centre.fill_(0.0)
    unscaled.scale.fill_(1.0)
    scaled_pixels = computed(layers_of(unscaled), (frames.float() - 87.0) / 31.0)
    torch.testing.assert_close(scaled_pixels, student.net(frames), atol=1e-4, rtol=1e-4)
    with_weights = [layer for layer in layers if layer.weight is not None]
    assert with_weights[0].padding == 0  # so that the input scaling could be folded into it
    named = {f"{layer.name}.weight": weight(layer) for layer in with_weights}
    named |= {f"{layer.name}.bias": layer.bias for layer in with_weights if layer.bias is not None}
    assert named.keys() | {"centre", "scale"} == state.keys()
    for name, tensor in named.items():
        assert tensor.is_contiguous()
        assert (tensor.dtype, tensor.shape) == (torch.float32, state[name].shape)
        if not name.startswith(with_weights[0].name + "."):
            assert torch.equal(tensor, state[name])
            assert tensor.data_ptr() != state[name].data_ptr()
    assert (layers[0].takes, layers[-1].gives) == (("obs",), "scores")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.ELU(0.7), nn.LeakyReLU(0.2)])
def test_layers_give_an_mlps_scores(activation: nn.Module) -> None:
    net, obs = MLP(4, (16, 8), 3, activation=lambda: activation), torch.randn(50, 4)  # type: ignore[arg-type]
    torch.testing.assert_close(computed(layers_of(net), obs), net(obs).detach())


def test_another_activation_ends_in_one_line() -> None:
    with pytest.raises(ValueError, match="activation GELU cannot be exported; use one of ReLU"):
        layers_of(MLP(4, (8,), 2, activation=nn.GELU))


def test_a_residual_block_is_the_papers() -> None:
    """Espeholt et al. (2018), figure 3: convolution, pool, twice x + conv(relu(conv(relu(x)))), a ReLU at the end."""
    net, frames = ImpalaNet((2, 3), (5,), 4), noise(2)
    x = (frames.float() - net.centre) / net.scale
    for stage in net.stages:
        x = F.max_pool2d(stage.conv(x), 3, 2, 1)  # type: ignore[operator]
        for block in stage.blocks:  # type: ignore[union-attr]
            x = x + block.conv2(F.relu(block.conv1(F.relu(x))))
    assert x.shape == (2, 3, 21, 21)
    expected = net.dense[1](F.relu(net.dense[0](F.relu(x).flatten(1))))
    torch.testing.assert_close(net(frames), expected, atol=1e-5, rtol=1e-5)


def test_a_module_of_the_users_has_no_layers_that_are_known() -> None:
    mine = nn.Sequential(nn.Linear(4, 2))
    for net in (mine, UserNet(mine, (4,), 2)):
        with pytest.raises(ValueError, match=r"^Sequential: a module of your own has no known layers; export"):
            layers_of(net)
