"""Networks: the input scaling, what they refuse, what they cost, and the layout of memory that they are fast in."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from policykd.agents.networks import MLP, ConvNet, num_macs, num_parameters
from policykd.agents.student import make_student


def noise(num: int) -> torch.Tensor:
    return torch.randint(256, (num, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scores_are_those_of_the_plain_layers_on_scaled_pixels() -> None:
    net = make_student("7%", 6).net
    assert isinstance(net, ConvNet)
    net.centre.fill_(87.0)
    net.scale.fill_(31.0)
    frames = noise(5)
    x = (frames.float() - 87.0) / 31.0
    for layer in (net.conv1, net.conv2, net.conv3):
        x = F.relu(layer(x))
    expected = net.dense[1](F.relu(net.dense[0](x.reshape(5, -1))))
    torch.testing.assert_close(net(frames), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net(frames.movedim(1, -1).contiguous().movedim(-1, 1)), net(frames), atol=0.0, rtol=0.0)


def test_activations_are_those_of_the_layers() -> None:
    net, frames = make_student("7%", 6).net, noise(3)
    assert isinstance(net, ConvNet)
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        seen[layer] = output

    for layer in (net.conv2, net.conv3, *net.dense):
        layer.register_forward_hook(keep)
    scores_BA, hidden_BF, maps = net.activations(frames)
    assert torch.equal(scores_BA, seen[net.dense[1]])
    assert torch.equal(hidden_BF, F.relu(seen[net.dense[0]]))
    assert torch.equal(maps[0], F.relu(F.conv2d(frames.float(), *net.first_layer(), stride=4)))
    assert torch.equal(maps[1], F.relu(seen[net.conv2]))
    assert torch.equal(maps[2], F.relu(seen[net.conv3]))
    assert [tuple(m.shape) for m in maps] == [(3, 16, 20, 20), (3, 16, 9, 9), (3, 16, 7, 7)]
    assert torch.equal(net(frames), scores_BA)
    (scores_BA.sum() + sum(m.sum() for m in maps)).backward()
    assert net.conv1.weight.grad is not None
    with pytest.raises(ValueError, match="expected uint8 frames"):
        net.activations(frames / 255.0)


def test_activations_of_an_mlp_have_no_maps() -> None:
    net, obs = MLP(4, (8, 5), 2, activation=nn.Tanh), torch.randn(3, 4)
    scores_BA, hidden_BF, maps = net.activations(obs)
    hidden = torch.tanh(net.dense[1](torch.tanh(net.dense[0](obs))))
    torch.testing.assert_close(hidden_BF, hidden)
    torch.testing.assert_close(scores_BA, net.dense[2](hidden))
    assert torch.equal(net(obs), scores_BA)
    assert maps == ()


def test_the_convolutions_run_channels_last() -> None:
    """Forward and backward are twice as fast so (docs/log.md)."""
    net, layouts = make_student("7%", 6).net, list[bool]()
    assert isinstance(net, ConvNet)
    for layer in (net.conv2, net.conv3):
        layer.register_forward_pre_hook(
            lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    net(noise(2))
    assert layouts == [True, True]


def test_frames_of_another_shape_or_kind_are_refused() -> None:
    """X02: never scores of what a network was not trained on."""
    net, frames = make_student("1%", 6), noise(2)
    with pytest.raises(ValueError, match=r"observations are \(84, 84, 4\), expected a batch of \(4, 84, 84\)"):
        net(frames.movedim(1, -1))
    with pytest.raises(ValueError, match=r"observations are \(84, 84\), expected a batch of \(4, 84, 84\)"):
        net(frames[0])
    with pytest.raises(ValueError, match=r"observations are torch.float32, expected uint8 frames from 0 to 255"):
        net(frames / 255.0)


def test_vectors_of_another_shape_are_refused() -> None:
    """X02."""
    net = MLP(4, (8,), 2, activation=nn.ReLU)
    for obs in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(3, 2, 2)):
        with pytest.raises(ValueError, match=r"expected a batch of \(4,\)"):
            net(obs)


def test_costs_are_the_readmes() -> None:
    net = make_student("7%", 6)
    assert num_parameters(net) == 111_798
    assert num_macs(net, (4, 84, 84)) == pytest.approx(2.18e6, rel=0.01)
    assert num_macs(MLP(4, (16, 8), 2, activation=nn.Tanh), (4,)) == 4 * 16 + 16 * 8 + 8 * 2
