"""Writes a trained SB3 agent as a teacher: an archive that SB3 opens and that is read here without unpickling."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import NatureCNN
from torch import Tensor, nn

from policykd.agents.networks import ConvNet
from policykd.agents.teacher import Teacher
from policykd.io.files import write_atomically

MADE_AT = (1980, 1, 1, 0, 0, 0)
UNNEEDED = (
    *("replay_buffer", "replay_buffer_class", "replay_buffer_kwargs", "rollout_buffer", "_custom_logger", "_logger"),
    *("_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"),
)
"""of SB3's attributes: what only training needs"""


def first_convolutions(policy: nn.Module) -> list[nn.Conv2d]:
    """Returns the first convolution of every distinct NatureCNN in an SB3 policy."""
    found = [m.cnn[0] for m in policy.modules() if isinstance(m, NatureCNN)]
    assert all(isinstance(layer, nn.Conv2d) for layer in found)
    return found  # type: ignore[return-value]


def centre_input(policy: nn.Module, centre: float, scale: float) -> None:
    """Gives a policy's convolutions (grey - centre) / scale in place of grey / 255; both in grey levels.

    Small and large networks alike sit on a plateau in Pong without it (docs/log.md). The weights' names stay SB3's.
    """

    def centred(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return (inputs[0] - centre / 255.0) * (255.0 / scale)

    for layer in first_convolutions(policy):
        layer.register_forward_pre_hook(centred)


@torch.no_grad()
def start_from(policy: nn.Module, teacher: Teacher, centre: float, scale: float) -> None:
    """Copies a teacher's convolutions and features into an SB3 policy, and its head where both are of PPO or A2C.

    Args:
        policy: of the new agent, whose input will be centred.
        teacher: of the same game.
        centre: what `centre_input` will be given.
        scale: likewise.

    Raises:
        ValueError: the teacher is not a NatureCNN on frames in [0, 1].
    """
    net = teacher.net
    if not isinstance(net, ConvNet) or (net.widths, net.hidden) != ((32, 64, 64), (512,)) or net.scale != 255.0:
        raise ValueError(f"--start-from {teacher.ref}: not SB3's NatureCNN on frames in [0, 1]; give another teacher")
    for extractor in [m for m in policy.modules() if isinstance(m, NatureCNN)]:
        layers = [extractor.cnn[0], extractor.cnn[2], extractor.cnn[4], extractor.linear[0]]
        for layer, source in zip(layers, [net.conv1, net.conv2, net.conv3, net.dense[0]], strict=True):
            layer.load_state_dict(source.state_dict())
    for first in first_convolutions(policy):
        assert first.bias is not None
        first.bias.add_((centre / 255.0) * first.weight.sum(dim=(1, 2, 3)))
        first.weight.mul_(scale / 255.0)
    if isinstance(policy, ActorCriticPolicy) and teacher.algorithm in ("PPO", "A2C"):
        policy.action_net.load_state_dict(net.dense[-1].state_dict())


def fold_input_normalization(policy: nn.Module, centre: float, scale: float) -> dict[str, Tensor]:
    """Returns the state dict of a policy whose input was centred, as that of a plain one: the same function."""
    state = {name: t.detach().clone() for name, t in policy.state_dict().items()}
    for name in [n for n in state if n.endswith("cnn.0.weight")]:
        bias = name.removesuffix("weight") + "bias"
        state[name] = state[name] * (255.0 / scale)
        state[bias] = state[bias] - (centre / 255.0) * state[name].sum(dim=(1, 2, 3))
    return state


def write_teacher(model: BaseAlgorithm, path: Path, *, centre: float = 0.0, scale: float = 255.0) -> None:
    """Writes `model` as an SB3 archive without its optimizer's state.

    Tensors that are equal are stored once: a target network is its network, since nothing goes on learning from here.

    Args:
        model: PPO, A2C, DQN or QR-DQN.
        path: of the `.zip`.
        centre: what `centre_input` was given; folded into the weights.
        scale: likewise.

    Raises:
        OSError: no room or no permission; nothing is left behind.
    """
    buffer = io.BytesIO()
    model.save(buffer, exclude=UNNEEDED)
    state, plain = model.policy.state_dict(), fold_input_normalization(model.policy, centre, scale)
    once: dict[int, Tensor] = {}
    policy = {n: once.setdefault(state[_source(n)].data_ptr(), plain[_source(n)].contiguous()) for n in state}
    optimizer: dict[str, Any] = model.policy.optimizer.state_dict()
    replaced = {"policy.pth": policy, "policy.optimizer.pth": {**optimizer, "state": {}}}
    archive = io.BytesIO()
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(archive, "w") as out:
        for name in whole.namelist():
            content = whole.read(name)
            if name in replaced:
                inner = io.BytesIO()
                torch.save(replaced[name], inner)
                content = inner.getvalue()
            out.writestr(zipfile.ZipInfo(name, MADE_AT), content)
    write_atomically(path, archive.getvalue())


def _source(name: str) -> str:
    """Returns the tensor that stands for `name`: a target network's is its network's."""
    return name.replace("_target.", ".", 1)
