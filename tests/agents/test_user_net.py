"""A module of the user's as a student: it learns, plays, is saved, loaded and exported like ours, or is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from policykd.agents.card import Provenance
from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.onnx_policy import OnnxPolicy
from policykd.agents.student import Student, load_student, make_student, save_student
from policykd.envs.identity import IdentityEnv
from policykd.export.onnx import to_onnx
from policykd.io.files import BadFile
from policykd.legacy.loop import distill
from policykd.legacy.losses import ForwardKL
from policykd.legacy.schedules import Constant
from policykd.legacy.states import MixedStates
from policykd.legacy.train_state import make_learner


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
        scores: Tensor = self.head(self.two(self.one(x)))
        return scores


def noise(num: int) -> Tensor:
    return torch.randint(256, (num, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_learns_by_the_same_loop() -> None:
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
    learner = make_learner(Student.of(mine, 4, (4,)), IdentityEnv(8, 4, 0), capacity=2000, seed=0)
    rounds = list(
        distill(
            lambda obs: 5.0 * obs,
            learner,
            loss=ForwardKL(),
            states=MixedStates(),
            learning_rate=Constant(1e-2),
            rounds=3,
            states_per_round=400,
            updates_per_round=60,
        )
    )
    assert rounds[-1].kl < 0.01 < rounds[0].kl
    assert (mine(torch.eye(4)).argmax(dim=1) == torch.arange(4)).all()  # in place: the user's own module has learned


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
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
        (nn.Linear(2, 2), ValueError, r"a student of MyNet, not of Linear; load it with module=MyNet\(\)"),
        (MyNet(width=4), BadFile, r"not the tensors of this MyNet .*size mismatch"),
        (MyNet(num_actions=5), ValueError, r"MyNet returns torch.float32 \(2, 5\) for two observations, expected"),
    ]:
        with pytest.raises(error, match=reason) as raised:
            load_student(tmp_path, module=module)
        assert "\n" not in str(raised.value)
    save_student(make_student((8,), 2, (4,)), tmp_path)
    with pytest.raises(ValueError, match="one of policykd's own students; leave out module=MyNet"):
        load_student(tmp_path, module=MyNet())


def test_what_acts_is_counted_once() -> None:
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


def test_what_is_no_policy_is_refused() -> None:
    """X02, before anything is learned."""
    with pytest.raises(ValueError, match=r"^Linear fails on two blank observations \(4, 84, 84\) \(mat1 .*fix it"):
        Student.of(nn.Linear(3, 6), 6)
    with pytest.raises(ValueError, match=r"^Flatten returns torch.uint8 \(2, 28224\) for two observations, expected"):
        Student.of(nn.Flatten(), 6)
    student = Student.of(MyNet(), 6)
    with pytest.raises(ValueError, match="expected uint8 frames"):
        student(noise(2).float())
    with pytest.raises(ValueError, match="MyNet: your own module has no known hidden layers"):
        student.activations(noise(2))
    with pytest.raises(ValueError, match="MyNet: a module of your own is no SB3 policy"):
        student.to_sb3()
