"""Networks: normalisation, activations, costs, memory layout, refusals; and modules of the user's as students."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policykd.agents.card import Provenance
from policykd.agents.networks import MLP, ConvNet, num_macs, num_parameters
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Student, load_student, make_student, save_student
from policykd.export.onnx import to_onnx
from policykd.io.files import BadFile
from policykd.loop import DistillConfig, distill
from tests.identity_env import IdentityEnv


def noise(num: int) -> Tensor:
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
    seen: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, _: object, output: Tensor) -> None:
        seen[layer] = output

    for layer in (net.conv2, net.conv3, *net.dense):
        layer.register_forward_hook(keep)
    outputs_BA, hidden_BF, maps = net.activations(frames)
    assert torch.equal(outputs_BA, seen[net.dense[1]])
    assert torch.equal(hidden_BF, F.relu(seen[net.dense[0]]))
    assert torch.equal(maps[0], F.relu(F.conv2d(frames.float(), *net.first_layer(), stride=4)))
    assert torch.equal(maps[1], F.relu(seen[net.conv2]))
    assert torch.equal(maps[2], F.relu(seen[net.conv3]))
    assert [tuple(m.shape) for m in maps] == [(3, 16, 20, 20), (3, 16, 9, 9), (3, 16, 7, 7)]
    assert torch.equal(net(frames), outputs_BA)
    (outputs_BA.sum() + sum(m.sum() for m in maps)).backward()
    assert net.conv1.weight.grad is not None
    with pytest.raises(ValueError, match="expected uint8 frames"):
        net.activations(frames / 255.0)


def test_activations_of_an_mlp_have_no_maps() -> None:
    net, obs = MLP(4, (8, 5), 2, activation=nn.Tanh), torch.randn(3, 4)
    outputs_BA, hidden_BF, maps = net.activations(obs)
    hidden = torch.tanh(net.dense[1](torch.tanh(net.dense[0](obs))))
    torch.testing.assert_close(hidden_BF, hidden)
    torch.testing.assert_close(outputs_BA, net.dense[2](hidden))
    assert torch.equal(net(obs), outputs_BA)
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


class MyNet(nn.Module):
    """One convolution, with an input scaling, tied layers and a critic that does not act."""

    def __init__(self, num_actions: int = 6, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, width, 12, 8), nn.GroupNorm(2, width), nn.SiLU(), nn.Flatten())
        self.middle = nn.Linear(100 * width, 5)
        self.one = nn.Linear(5, 5)
        self.two = nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.head, self.critic = nn.Linear(5, num_actions), nn.Linear(5, 1)
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, obs: Tensor) -> Tensor:
        x = self.middle(self.body((obs.float() - self.centre) / self.scale))  # type: ignore[operator]
        logits: Tensor = self.head(self.two(self.one(x)))
        return logits


def test_a_users_module_learns_from_a_plain_function() -> None:
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
    config = DistillConfig(rounds=3, states_per_round=400, updates_per_round=60, learning_rate=1e-2)
    rounds = list(distill(lambda obs: 5.0 * obs, Student.of(mine, 4, (4,)), IdentityEnv(8, 4, 0), config))
    assert rounds[-1].train["kl"] < 0.05 < rounds[0].train["kl"]
    assert (mine(torch.eye(4)).argmax(dim=1) == torch.arange(4)).all()  # the module itself has learned


def test_a_users_module_is_saved_and_loaded(tmp_path: Path) -> None:
    student, obs = Student.of(MyNet(), 6), noise(3)
    student.fit_input_normalization(obs[:, 0])
    assert student.net.module.scale == obs[:, 0].float().std()  # type: ignore[union-attr]
    save_student(student, tmp_path, Provenance(game="Pong"))
    loaded = load_student(tmp_path, module=MyNet())
    assert torch.equal(loaded(obs), student(obs))
    assert not loaded.net.training
    best, _ = loaded.predict(np.moveaxis(obs.numpy(), 1, -1), deterministic=True)
    assert (best == student(obs).argmax(dim=1).numpy()).all()
    for module, error, reason in [
        (None, ValueError, r"a student of your own module; load it with load_student\(path, module=MyNet\(\)\)"),
        (nn.Linear(2, 2), ValueError, r"load it with load_student\(path, module=MyNet\(\)\)"),
        (MyNet(width=4), BadFile, r"not the tensors of this MyNet .*size mismatch"),
        (MyNet(num_actions=5), ValueError, r"MyNet returns a tensor float32 \(2, 5\), expected"),
    ]:
        with pytest.raises(error, match=reason) as raised:
            load_student(tmp_path, module=module)
        assert "\n" not in str(raised.value)
    save_student(make_student((8,), 2, (4,)), tmp_path)
    with pytest.raises(ValueError, match="one of policykd's own students; leave out module=MyNet"):
        load_student(tmp_path, module=MyNet())


def test_only_the_acting_parameters_are_counted() -> None:
    student, net = Student.of(MyNet(), 6), MyNet()
    outside = sum(p.numel() for p in net.critic.parameters())
    assert num_parameters(student) == sum(p.numel() for p in net.parameters()) - outside
    convolution, dense = 10 * 10 * 8 * 4 * 12 * 12, 800 * 5 + 5 * 5 + 5 * 5 + 5 * 6
    assert num_macs(student, (4, 84, 84)) == convolution + dense
    with torch.inference_mode():
        assert num_parameters(student) == num_parameters(student.net)


def test_its_onnx_file_gives_its_logits(tmp_path: Path) -> None:
    student, obs = Student.of(MyNet(), 6, temperature=0.1), noise(5)
    student.fit_input_normalization(obs[:, 0])
    content = to_onnx(student.folded_net())
    (tmp_path / "mine.onnx").write_bytes(content)
    policy = OnnxPolicy(tmp_path / "mine.onnx")
    torch.testing.assert_close(policy(obs), student(obs).detach(), atol=1e-4, rtol=1e-4)
    model = onnx.load_model_from_string(content)
    assert [(i.name, i.type.tensor_type.elem_type) for i in model.graph.input] == [("obs", onnx.TensorProto.UINT8)]
    assert [output.name for output in model.graph.output] == ["scores"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert student.training


def test_a_module_that_is_not_a_policy_is_refused() -> None:
    """X02, before anything is learned."""
    with pytest.raises(ValueError, match=r"^Linear fails on two blank observations \(4, 84, 84\) \(mat1 .*fix it"):
        Student.of(nn.Linear(3, 6), 6)
    with pytest.raises(ValueError, match=r"^Flatten returns a tensor uint8 \(2, 28224\), expected"):
        Student.of(nn.Flatten(), 6)
    student = Student.of(MyNet(), 6)
    with pytest.raises(ValueError, match="expected uint8 frames"):
        student(noise(2).float())
    with pytest.raises(ValueError, match="MyNet: your own module has no known hidden layers"):
        student.activations(noise(2))
    with pytest.raises(ValueError, match="MyNet: your own module is not an SB3 policy"):
        student.to_sb3()
