"""Students: compact networks by name, saved as safetensors + JSON, that play with SB3's `predict` signature."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from policykd.agents.files import BadFile, write_atomically
from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, ConvNet
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

FORMAT = 1


@dataclass(frozen=True)
class Shape:
    """What a student's network is, enough to build it again."""

    widths: tuple[int, ...]
    """of the three convolutions; empty for an MLP on vectors"""
    hidden: tuple[int, ...]
    """units of the dense layers"""
    num_actions: int
    obs_shape: tuple[int, ...]


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

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits, float32 `(batch, num_actions)`."""
        scores_BA: Tensor = self.net(obs_BCHW)
        return scores_BA

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
    size: Size | Sequence[int], num_actions: int, obs_shape: tuple[int, ...] = ATARI_OBS_SHAPE, *, seed: int = 0
) -> Student:
    """Returns an untrained student.

    Args:
        size: a name from `SIZES` for frames; the dense layers' units, such as `(32, 32)`, for vectors.
        num_actions: how many actions it scores.
        obs_shape: of one observation; `(4, 84, 84)` on Atari.
        seed: of the initial weights.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"unknown student size {size!r}: choose from {', '.join(SIZES)}")
        if obs_shape != ATARI_OBS_SHAPE:
            raise ValueError(
                f"size {size} is for frames {ATARI_OBS_SHAPE}, not {obs_shape}; give the dense layers' units"
            )
        widths, units = SIZES[size]
        shape = Shape(widths, (units,), num_actions, obs_shape)
    else:
        shape = Shape((), tuple(size), num_actions, obs_shape)
    student = Student(shape)
    generator = torch.Generator().manual_seed(seed)
    for layer in student.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # He et al. (2015); a small head, so that it starts near uniform
            fan_in = layer.weight[0].numel()
            gain = 0.1 if layer is student.net.dense[-1] else math.sqrt(2.0)
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
    card = {"format": FORMAT, "sha256": hashlib.sha256(weights).hexdigest(), "shape": asdict(student.shape), **about}
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
        if card["format"] != FORMAT:
            raise BadFile(f"{folder}: student of format {card['format']}, this policykd reads {FORMAT}; update it")
        if hashlib.sha256(weights).hexdigest() != card["sha256"]:
            raise BadFile(f"{folder}/student.safetensors is not the file that student.json describes; copy both again")
        shape = card["shape"]
        student = Student(
            Shape(tuple(shape["widths"]), tuple(shape["hidden"]), int(shape["num_actions"]), tuple(shape["obs_shape"]))
        )
        student.load_state_dict(load_tensors(weights))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadFile(f"{error.filename}: {error.strerror}; give the folder of a finished run") from error
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        raise BadFile(
            f"{folder}: not a student of policykd ({str(error).splitlines()[0]}); copy the folder again"
        ) from error
    return student.eval()
