"""Students: compact networks by name, saved as safetensors + JSON, that play with SB3's `predict` signature."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from policykd.agents.networks import ATARI_OBS_SHAPE, Activations
from policykd.agents.policy import greedy, sample
from policykd.agents.shapes import SIZES, Net, Shape, Size, check_module, draw_weights, make_net, shape_of
from policykd.agents.user_net import UserNet
from policykd.io.files import BadFile, write_atomically

__all__ = ["SIZES", "Shape", "Size", "Student", "load_student", "make_student", "packed_weights", "save_student"]

FORMATS = (1, 2, 3)
"""of student.json; each later one is what a reader of those before it would play wrongly: 2 with a temperature or a
value head, 3 with another design, a low rank or a module of the user's"""


class Student(nn.Module):
    """A compact policy: scores actions like every `Policy`, plays with SB3's `predict`."""

    def __init__(self, shape: Shape, module: nn.Module | None = None) -> None:
        """Builds it with new weights, or around a module of the user's (see `Student.of`)."""
        super().__init__()
        self.shape = shape
        self.net: Net
        self.value_head: nn.Linear | None = None
        if module is not None:
            self.net = UserNet(module, shape.obs_shape, shape.num_actions)
            return
        self.net = make_net(shape)
        if shape.value:
            self.value_head = nn.Linear(self.net.num_features, 1)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        num_actions: int,
        obs_shape: tuple[int, ...] = ATARI_OBS_SHAPE,
        *,
        temperature: float = 1.0,
    ) -> "Student":
        """Returns a module of the user's as a student (docs/students.md): what it learns, it learns in place.

        Args:
            module: maps uint8 frames `(batch, 4, 84, 84)` or float32 vectors to float32 scores `(batch, num_actions)`.
            num_actions: how many actions it scores.
            obs_shape: of one observation.
            temperature: what its scores are divided by to get logits.

        Raises:
            ValueError: it does not give such scores.
        """
        name = type(module).__qualname__
        return cls(Shape((), (), num_actions, tuple(obs_shape), temperature=temperature, module=name), module)

    @property
    def temperature(self) -> float:
        """What the network's scores are divided by to get logits."""
        return self.shape.temperature

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits, float32 `(batch, num_actions)`: the network's scores divided by the temperature."""
        return self._logits(self.net(obs_BCHW))

    def activations(self, obs_BCHW: Tensor) -> Activations:
        """Returns the same logits as a call, with the hidden layer and the convolutions' maps on the way to them.

        Raises:
            ValueError: a module of the user's, of which only the scores are known.
        """
        if isinstance(self.net, UserNet):
            raise ValueError(f"{self.shape.module}: of your own module only the scores are known; learn those alone")
        found = self.net.activations(obs_BCHW)
        return found._replace(outputs_BA=self._logits(found.outputs_BA))

    def values(self, obs_BCHW: Tensor) -> Tensor:
        """Returns the states' values, float32 `(batch,)`, in the unit of what the head was fitted to.

        Raises:
            ValueError: it has no value head.
        """
        return self.value_of(self.activations(obs_BCHW).hidden_BF)

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

    def folded_net(self) -> Net:
        """Returns a network that gives the student's logits: its own, or a copy with the temperature folded in."""
        if self.temperature == 1.0:
            return self.net
        net = copy.deepcopy(self.net)
        if isinstance(net, UserNet):
            net.temperature = self.temperature
            return net
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
    def fit_input_normalization(self, frames: Tensor) -> None:
        """Sets the input scaling from frames `(n, 84, 84)`: the background becomes 0, the spread of the pixels 1.

        In [0, 1] a small network first learns the background, and may never get to the handful of pixels that is the
        ball (docs/log.md has the measurements). Vectors are left as they are, and a module without such tensors.
        """
        holder = self.net.module if isinstance(self.net, UserNet) else self.net
        centre, scale = getattr(holder, "centre", None), getattr(holder, "scale", None)
        if isinstance(centre, Tensor) and isinstance(scale, Tensor):
            pixels = frames.float()
            centre.copy_(pixels.median())
            scale.copy_(pixels.std().clamp(min=1.0))

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
    rank: int = 0,
) -> Student:
    """Returns an untrained student; a seed gives the same policy with and without a value head.

    Args:
        size: a name from `SIZES` for frames; the dense layers' units, such as `(32, 32)`, for vectors.
        num_actions: how many actions it scores.
        obs_shape: of one observation; `(4, 84, 84)` on Atari.
        seed: of the initial weights.
        value: whether it has a value head, a linear layer on the last hidden layer.
        temperature: what the network's scores are divided by to get logits.
        rank: of the first dense layer on frames, which is then two linear ones; 0 for a plain one.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"unknown student size {size!r}: choose from {', '.join(SIZES)}")
        if obs_shape != ATARI_OBS_SHAPE:
            raise ValueError(
                f"size {size} is for frames {ATARI_OBS_SHAPE}, not {obs_shape}; give the dense layers' units"
            )
        design, widths, units = SIZES[size]
        shape = Shape(widths, (units,), num_actions, obs_shape, value, temperature, design, rank)
    else:
        shape = Shape((), tuple(size), num_actions, obs_shape, value, temperature, rank=rank)
    student = Student(shape)
    assert not isinstance(student.net, UserNet)
    draw_weights(student, [student.net.dense[-1], student.value_head], seed)
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
    version = 3 if {"design", "rank", "module"} & said.keys() else 2 if {"value", "temperature"} & said.keys() else 1
    card = {"format": version, "sha256": hashlib.sha256(weights).hexdigest(), "shape": said, **about}
    write_atomically(path / "student.json", (json.dumps(card, indent=1) + "\n").encode())


def packed_weights(student: Student) -> bytes:
    """Returns the content of `student.safetensors`; its sha256 says which student it is."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()}
    if student.shape.module:  # its tensors may be views of each other, which safetensors does not take
        tensors = {name: t.clone() for name, t in tensors.items()}
    return save_tensors(tensors)


def load_student(path: str | Path, *, module: nn.Module | None = None) -> Student:
    """Returns the student of a run's folder (or of its `student.json`), ready to play.

    Args:
        path: where it lies.
        module: a new one of the class that it was made of, if it was made by `Student.of`; its weights are replaced.

    Raises:
        ValueError: a module is missing, or given where the student is none.
        BadFile: not a student, another format, another module, or weights that are not those that were saved.
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
        shape = shape_of(card["shape"])
        check_module(folder, shape, module)
        student = Student(shape, module)
        student.load_state_dict(load_tensors(weights))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadFile(f"{error.filename}: {error.strerror}; give the folder of a finished run") from error
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        if module is not None:
            raise BadFile(
                f"{folder}: not the tensors of this {type(module).__name__} ({reason})"
                "; give one made as the student's was"
            ) from error
        raise BadFile(f"{folder}: not a student of policykd ({reason}); copy the folder again") from error
    return student.eval()
