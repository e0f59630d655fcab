"""A trained SB3 agent as a teacher: an archive that SB3 opens and that policykd reads without unpickling."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import NatureCNN
from torch import Tensor, nn

from policykd.agents.networks import ConvNet
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.io.files import write_atomically

ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""fixed, so that equal agents give equal bytes"""
TRAINING_ONLY = (
    *("replay_buffer", "replay_buffer_class", "replay_buffer_kwargs", "rollout_buffer", "_custom_logger", "_logger"),
    *("_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"),
)
"""SB3's attributes that are needed for training only"""


@dataclass(frozen=True)
class InputScaling:
    """Scaling (grey - centre) / scale of frames, both in grey levels; by default SB3's own grey / 255."""

    centre: float = 0.0
    scale: float = 255.0


def first_convolutions(policy: nn.Module) -> list[nn.Conv2d]:
    """Returns the first convolution of every distinct NatureCNN in an SB3 policy."""
    layers = [module.cnn[0] for module in policy.modules() if isinstance(module, NatureCNN)]
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def centre_input(policy: nn.Module, scaling: InputScaling) -> None:
    """Makes a policy's convolutions see scaled frames in place of grey / 255; the names of the weights stay SB3's.

    Without it small and large networks alike stay on a plateau in Pong for long (docs/log.md).
    """

    def rescaled(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return (inputs[0] - scaling.centre / 255.0) * (255.0 / scaling.scale)

    for layer in first_convolutions(policy):
        layer.register_forward_pre_hook(rescaled)


@torch.no_grad()
def start_from(policy: nn.Module, start: Teacher | Student, scaling: InputScaling) -> None:
    """Copies convolutions and features into an SB3 policy, and both heads into one of PPO or A2C.

    A good policy with a random critic would be unlearned in the first updates, so the critic's head comes along. The
    outputs of a DQN's or QR-DQN's teacher are no logits: its head stays behind.

    `scaling` is the one that `centre_input` will be given.

    Raises:
        ValueError: the network is not SB3's NatureCNN.
    """
    net = start.net
    if not isinstance(net, ConvNet) or (net.design, net.widths, net.hidden) != ("nature", (32, 64, 64), (512,)):
        name = start.ref if isinstance(start, Teacher) else "the student"
        raise ValueError(f"--start-from: {name} is not SB3's NatureCNN; give another teacher, or a 100% student")
    # By position in SB3's NatureCNN: a layer with weights, then a ReLU.
    for extractor in [module for module in policy.modules() if isinstance(module, NatureCNN)]:
        layers = [extractor.cnn[2], extractor.cnn[4], extractor.linear[0]]
        for layer, source in zip(layers, [net.conv2, net.conv3, net.dense[0]], strict=True):
            layer.load_state_dict(source.state_dict())
    # w grey = (w scale) ((grey - centre) / scale) + w centre
    weight, bias = net.first_layer()
    for first in first_convolutions(policy):
        assert first.bias is not None
        first.weight.copy_(weight * scaling.scale)
        first.bias.copy_(bias + scaling.centre * weight.sum(dim=(1, 2, 3)))
    is_policy = isinstance(start, Student) or start.algorithm in ("PPO", "A2C")
    if isinstance(policy, ActorCriticPolicy) and is_policy:
        policy.action_net.load_state_dict(net.dense[-1].state_dict())
        critic = start.value_head if isinstance(start, Student) else start.critic
        if isinstance(critic, nn.Linear):
            policy.value_net.load_state_dict(critic.state_dict())


def fold_input_normalization(policy: nn.Module, scaling: InputScaling) -> dict[str, Tensor]:
    """Returns the state dict of a policy with a centred input as that of a plain policy, which is the same function."""
    # w (grey - centre) / scale = (w 255 / scale) (grey / 255) - w centre / scale
    state = {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}
    for name in [name for name in state if name.endswith("cnn.0.weight")]:
        bias = name.removesuffix("weight") + "bias"
        state[name] = state[name] * (255.0 / scaling.scale)
        state[bias] = state[bias] - (scaling.centre / 255.0) * state[name].sum(dim=(1, 2, 3))
    return state


def write_teacher(model: BaseAlgorithm, path: Path, scaling: InputScaling = InputScaling()) -> None:
    """Writes a PPO, A2C, DQN or QR-DQN agent as an SB3 archive (`.zip`) without its optimizer's state.

    `scaling` is the one that `centre_input` was given; it is folded into the weights.

    Raises:
        OSError: no space left or no permission; no partial file is left.
    """
    # SB3's own archive, in memory.
    buffer = io.BytesIO()
    model.save(buffer, exclude=TRAINING_ONLY)
    # Equal tensors are stored once: a target network is written as its network, since no training follows. In half
    # precision, which halves the file; SB3 and policykd read it as float32, and the card's games are played with that.
    state = model.policy.state_dict()
    plain = fold_input_normalization(model.policy, scaling)
    stored: dict[int, Tensor] = {}
    policy: dict[str, Tensor] = {}
    for name in state:
        source = name.replace("_target.", ".", 1)
        policy[name] = stored.setdefault(state[source].data_ptr(), plain[source].half().contiguous())
    replaced = {"policy.pth": policy, "policy.optimizer.pth": {**model.policy.optimizer.state_dict(), "state": {}}}
    # Written again member by member, without timestamps.
    archive = io.BytesIO()
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(archive, "w") as out:
        for name in whole.namelist():
            content = whole.read(name)
            if name in replaced:
                inner = io.BytesIO()
                torch.save(replaced[name], inner)
                content = inner.getvalue()
            out.writestr(zipfile.ZipInfo(name, ZIP_DATE), content)
    write_atomically(path, archive.getvalue())
