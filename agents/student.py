"""Students: compact networks by name, saved as safetensors + JSON, that play with SB3's `predict` signature."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from policykd.agents.files import BadFile, write_atomically
from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, Activations, ConvNet
from policykd.agents.policy import greedy, sample

Size = Literal["25%", "7%", "4%", "1%"]

SIZES: dict[Size, tuple[tuple[int, int, int], int]] = {
    "25%": ((16, 32, 32), 256),
    "7%": ((16, 16, 16), 128),
    "4%": ((16, 16, 16), 64),
    "1%": ((8, 8, 8), 32),
}
"""share of the NatureCNN's parameters -> (convolution widths, dense units); the first three are Rusu et al.'s (2015)
nets"""

FORMATS = (1, 2)
"""of student.json; the second is one that a reader of the first would play wrongly: with a temperature, or a value
head"""


@dataclass(frozen=True)
class Shape:
    """What a student's network is, enough to build it again."""

    widths: tuple[int, ...]
    """of the three convolutions; empty for an MLP on vectors"""
    hidden: tuple[int, ...]
    """units of the dense layers"""
    num_actions: int
    obs_shape: tuple[int, ...]
    value: bool = False
    """whether it has a value head beside the scores"""
    temperature: float = 1.0
    """what the network's scores are divided by to get logits; 0.01 for a student that was regressed on Q-values"""

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}; 1 for logits, 0.01 for Q-values")


class Student(nn.Module):
    """A compact policy: scores actions like every `Policy`, plays with SB3's `predict`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.net: ConvNet | MLP
        if shape.widths:
            self.net = ConvNet(shape.widths, shape.hidden, shape.num_actions)
        else:
            self.net = MLP(shape.obs_shape[0], shape.hidden, shape.num_actions, activation=nn.ReLU)
        self.value_head: nn.Linear | None = nn.Linear(self.net.num_features, 1) if shape.value else None

    @property
    def temperature(self) -> float:
        """What the network's scores are divided by to get logits."""
        return self.shape.temperature

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits, float32 `(batch, num_actions)`: the network's scores divided by the temperature."""
        return self._logits(self.net(obs_BCHW))

    def activations(self, obs_BCHW: Tensor) -> Activations:
        """Returns the same logits as a call, with the hidden layer and the convolutions' maps on the way to them."""
        found = self.net.activations(obs_BCHW)
        return found._replace(scores_BA=self._logits(found.scores_BA))

    def values(self, obs_BCHW: Tensor) -> Tensor:
        """Returns the states' values, float32 `(batch,)`, in the unit of what the head was fitted to.

        Raises:
            ValueError: it has no value head.
        """
        return self.value_of(self.net.activations(obs_BCHW).hidden_BF)

    def value_of(self, hidden_BF: Tensor) -> Tensor:
        """Returns the values of states whose last hidden activations are known, float32 `(batch,)`.

        Raises:
            ValueError: it has no value head.
        """
        if self.value_head is None:
            raise ValueError("this student has no value head; make it with make_student(..., value=True)")
        with torch.autocast(hidden_BF.device.type, enabled=False):
            values_B: Tensor = self.value_head(hidden_BF.float()).squeeze(-1)
        return values_B

    def folded_net(self) -> ConvNet | MLP:
        """Returns a network that gives the student's logits: its own, or a copy with the temperature folded in."""
        if self.temperature == 1.0:
            return self.net
        net = copy.deepcopy(self.net)
        with torch.no_grad():
            for weight in net.dense[-1].parameters():
                weight.div_(self.temperature)
        return net

    def to_sb3(self, env: Any = None, algorithm: Any = "PPO", **kwargs: Any) -> Any:
        """Returns an SB3 agent whose policy is this student; see `policykd.agents.sb3_student.to_sb3`."""
        from policykd.agents.sb3_student import to_sb3

        like: Any = self
        return to_sb3(like, env, algorithm, **kwargs)

    def from_sb3(self, model: Any) -> Any:
        """Returns a student of this shape with the weights of an agent that `to_sb3` made."""
        from policykd.agents.sb3_student import from_sb3

        like: Any = self  # a type checker that follows both paths to this module sees two classes
        return from_sb3(model, like)

    def _logits(self, scores_BA: Tensor) -> Tensor:
        return scores_BA if self.temperature == 1.0 else scores_BA / self.temperature

    @torch.no_grad()
    def centre_on(self, frames: Tensor) -> None:
        """Sets the input scaling from frames `(n, 84, 84)`: the background becomes 0, the spread of the pixels 1.

        In [0, 1] a small network first learns the background, and may never get to the handful of pixels that is the
        ball (docs/log.md has the measurements). Vectors are left as they are.
        """
        if isinstance(self.net, ConvNet):
            pixels = frames.float()
            self.net.centre.copy_(pixels.median())
            self.net.scale.copy_(pixels.std().clamp(min=1.0))

    @torch.inference_mode()
    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Returns actions and the unchanged state, with the signature of SB3's `predict`.

        Args:
            observation: one or a batch; frames uint8, channels first `(4, 84, 84)` or last `(84, 84, 4)`.
            state: unused, students have no memory.
            episode_start: unused.
            deterministic: the best action instead of one drawn from the policy.

        Raises:
            ValueError: another shape or kind of observation, or one that is not finite.
        """
        obs = np.asarray(observation)
        expected = self.shape.obs_shape
        if len(expected) == 3 and obs.shape[-3:] == (*expected[1:], expected[0]):
            obs = np.moveaxis(obs, -1, -3)
        if obs.shape[-len(expected) :] != expected or obs.ndim > len(expected) + 1:
            raise ValueError(f"observation has shape {obs.shape}, expected {expected} or a batch of them")
        if len(expected) == 3 and obs.dtype != np.uint8:
            raise ValueError(f"observation is {obs.dtype}, expected uint8 frames from 0 to 255")
        if len(expected) == 1 and not np.isfinite(obs).all():
            raise ValueError("observation is NaN or infinite, expected finite numbers")
        batch = torch.from_numpy(np.ascontiguousarray(obs)).view(-1, *expected)
        scores_BA = self(batch.to(next(self.parameters()).device)).cpu()
        actions = greedy(scores_BA) if deterministic else sample(scores_BA, torch.default_generator)
        return (actions.numpy() if obs.ndim > len(expected) else actions.numpy()[0]), state


def make_student(
    size: Size | Sequence[int],
    num_actions: int,
    obs_shape: tuple[int, ...] = ATARI_OBS_SHAPE,
    *,
    seed: int = 0,
    value: bool = False,
    temperature: float = 1.0,
) -> Student:
    """Returns an untrained student; a seed gives the same policy with and without a value head.

    Args:
        size: a name from `SIZES` for frames; the dense layers' units, such as `(32, 32)`, for vectors.
        num_actions: how many actions it scores.
        obs_shape: of one observation; `(4, 84, 84)` on Atari.
        seed: of the initial weights.
        value: whether it has a value head, a linear layer on the last hidden layer.
        temperature: what the network's scores are divided by to get logits.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"unknown student size {size!r}: choose from {', '.join(SIZES)}")
        if obs_shape != ATARI_OBS_SHAPE:
            raise ValueError(
                f"size {size} is for frames {ATARI_OBS_SHAPE}, not {obs_shape}; give the dense layers' units"
            )
        widths, units = SIZES[size]
        shape = Shape(widths, (units,), num_actions, obs_shape, value, temperature)
    else:
        shape = Shape((), tuple(size), num_actions, obs_shape, value, temperature)
    student = Student(shape)
    generator = torch.Generator().manual_seed(seed)
    for layer in student.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # He et al. (2015); small heads, so that it starts near uniform
            fan_in = layer.weight[0].numel()
            gain = 0.1 if layer in (student.net.dense[-1], student.value_head) else math.sqrt(2.0)
            layer.weight.data.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
            layer.bias.data.zero_()  # type: ignore[union-attr]
    return student


def save_student(student: Student, path: Path, about: Mapping[str, Any]) -> None:
    """Writes `student.safetensors` and `student.json` into the folder `path`, each whole or not at all.

    Args:
        student: whose weights.
        path: a folder, made if it is missing.
        about: what the JSON says besides the shape and the hash, such as the teacher's.
    """
    weights = packed_weights(student)
    write_atomically(path / "student.safetensors", weights)
    shape = student.shape
    said = {f.name: getattr(shape, f.name) for f in fields(shape) if getattr(shape, f.name) != f.default}
    version = FORMATS[1] if {"value", "temperature"} & said.keys() else FORMATS[0]
    card = {"format": version, "sha256": hashlib.sha256(weights).hexdigest(), "shape": said, **about}
    write_atomically(path / "student.json", (json.dumps(card, indent=1) + "\n").encode())


def packed_weights(student: Student) -> bytes:
    """Returns the content of `student.safetensors`; its sha256 says which student it is."""
    return save_tensors({name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()})


def load_student(path: str | Path) -> Student:
    """Returns the student of a run's folder (or of its `student.json`), ready to play.

    Raises:
        BadFile: not a student, another format, or weights that are not those that were saved.
    """
    path = Path(path)
    folder = path.parent if path.name == "student.json" else path
    try:
        card = json.loads((folder / "student.json").read_text())
        weights = (folder / "student.safetensors").read_bytes()
        if card["format"] not in FORMATS:
            raise BadFile(f"{folder}: student of format {card['format']}, this policykd reads {FORMATS}; update it")
        if hashlib.sha256(weights).hexdigest() != card["sha256"]:
            raise BadFile(f"{folder}/student.safetensors is not the file that student.json describes; copy both again")
        student = Student(_shape(card["shape"]))
        student.load_state_dict(load_tensors(weights))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadFile(f"{error.filename}: {error.strerror}; give the folder of a finished run") from error
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        raise BadFile(
            f"{folder}: not a student of policykd ({str(error).splitlines()[0]}); copy the folder again"
        ) from error
    return student.eval()


def _shape(said: Mapping[str, Any]) -> Shape:
    """Returns the shape that a card says; what it leaves out is as it was before there was a choice."""
    widths, hidden, obs_shape = (tuple(said[name]) for name in ("widths", "hidden", "obs_shape"))
    value, temperature = said.get("value", False), said.get("temperature", 1.0)
    if not isinstance(value, bool) or type(temperature) not in (int, float) or not 0.0 < temperature < math.inf:
        raise TypeError(f"value {value!r:.20} or temperature {temperature!r:.20}")
    return Shape(widths, hidden, int(said["num_actions"]), obs_shape, value, float(temperature))
