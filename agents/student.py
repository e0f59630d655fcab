"""Students: compact networks by name, saved as safetensors + JSON, that play with SB3's `predict` signature."""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from policykd.agents.card import MAX_CARD_BYTES, Provenance
from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, Activations, ConvNet, Design, ImpalaNet, Net, UserNet
from policykd.agents.policy import greedy, sample
from policykd.io.files import BadFile, write_atomically
from policykd.io.typed import one_line, read_bounded, read_json, to_json

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

MAX_STUDENT_BYTES = 1 << 30
"""size cap of student.safetensors, far above any network that deserves the name"""

Size = Literal["100%", "25%", "7%", "4%", "1%", "0.3%", "0.1%", "narrow", "strided", "depthwise", "half", "impala"]

SIZES: dict[Size, tuple[Design, tuple[int, ...], int]] = {
    "100%": ("nature", (32, 64, 64), 512),
    "25%": ("nature", (16, 32, 32), 256),
    "7%": ("nature", (16, 16, 16), 128),
    "4%": ("nature", (16, 16, 16), 64),
    "1%": ("nature", (8, 8, 8), 32),
    "0.3%": ("nature", (4, 8, 8), 8),
    "0.1%": ("nature", (2, 4, 4), 4),
    "narrow": ("nature", (4, 16, 16), 128),
    "strided": ("strided", (16, 16, 16), 128),
    "depthwise": ("depthwise", (8, 8, 16, 16), 64),
    "half": ("half", (8, 16, 16), 64),
    "impala": ("impala", (4, 8, 8), 64),
}
"""name -> (design, convolution widths, dense units); percentages are of the parameters of the first, SB3's NatureCNN;
the next three are Rusu et al.'s (2015) networks; the last five save arithmetic, not parameters (docs/students.md)"""

Width = Annotated[int, Field(ge=1, le=1 << 16)]


@dataclass(frozen=True)
class Shape:
    """Architecture of a student: everything needed to build its network again."""

    widths: Annotated[tuple[Width, ...], Field(max_length=16)]
    """channels of the convolutions, or of the residual stages; empty for an MLP on vectors"""
    hidden: Annotated[tuple[Width, ...], Field(max_length=16)]
    """units of the dense layers"""
    num_actions: Width
    obs_shape: Annotated[tuple[Width, ...], Field(min_length=1, max_length=3)]
    value: bool = False
    """a value head in addition to the logits"""
    temperature: float = 1.0
    """divisor of the network's outputs that gives logits; 0.01 for a student that was regressed on Q-values"""
    design: Design = "nature"
    """kernels and strides of the convolutions; "impala" for residual stages"""
    rank: int = 0
    """rank of the first dense layer, then two linear ones; 0 for a full one"""
    module: Annotated[str, Field(max_length=200)] = ""
    """class of the user's own module; `widths` and `hidden` are empty then"""

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, not {self.temperature}; 1 for logits, 0.01 for Q-values")
        if self.rank < 0 or (self.rank and not self.widths):
            raise ValueError(f"rank {self.rank}: give a positive one to a network on frames, 0 to leave it out")


@dataclass(frozen=True, kw_only=True)
class StudentCard(Provenance):
    """Content of student.json."""

    format: int
    """version, increased when an older policykd would misread the student: 2 has a temperature or a value head, 3 has
    another design, a low rank or a module of the user's, 4 plays several games"""
    sha256: str
    """hash of student.safetensors"""
    shape: Shape
    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """game -> outputs that are its actions, of a student of several games"""

    def __post_init__(self) -> None:
        if not 1 <= self.format <= 4:
            raise ValueError(f"format {self.format} is unknown to this policykd, update it")
        for game, head in self.heads.items():
            if not head or not set(head) <= set(range(self.shape.num_actions)) or len(set(head)) < len(head):
                raise ValueError(
                    f"heads: {game} has {head}, expected different ones of {self.shape.num_actions} outputs"
                )


class Student(nn.Module):
    """A compact policy: returns logits like every `Policy`, plays with SB3's `predict`."""

    def __init__(self, shape: Shape, module: nn.Module | None = None) -> None:
        """Builds the network with torch's initial weights, or wraps a module of the user's (see `Student.of`)."""
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
        """Returns a module of the user's as a student (docs/students.md); training changes the module in place.

        Args:
            module: maps uint8 frames `(batch, 4, 84, 84)` or float32 vectors to float32 `(batch, num_actions)`.
            num_actions: number of outputs.
            obs_shape: shape of one observation.
            temperature: divisor of the module's outputs that gives logits.

        Raises:
            ValueError: the module does not return such outputs.
        """
        name = type(module).__qualname__
        return cls(Shape((), (), num_actions, tuple(obs_shape), temperature=temperature, module=name), module)

    @property
    def temperature(self) -> float:
        """Temperature of the policy, as a teacher has one: 1, since `shape.temperature` is already in the logits."""
        return 1.0

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits, float32 `(batch, num_actions)`: the network's outputs divided by the temperature."""
        return self._logits(self.net(obs_BCHW))

    def activations(self, obs_BCHW: Tensor) -> Activations:
        """Returns the same logits as a call, with the hidden layer and the feature maps.

        Raises:
            ValueError: a module of the user's, whose hidden activations are unknown.
        """
        if isinstance(self.net, UserNet):
            raise ValueError(f"{self.shape.module}: your own module has no known hidden layers; use losses on logits")
        found = self.net.activations(obs_BCHW)
        return found._replace(outputs_BA=self._logits(found.outputs_BA))

    def values(self, obs_BCHW: Tensor) -> Tensor:
        """Returns the states' values, float32 `(batch,)`, in the unit that the head was trained on.

        Raises:
            ValueError: no value head.
        """
        return self.value_of(self.activations(obs_BCHW).hidden_BF)

    def value_of(self, hidden_BF: Tensor) -> Tensor:
        """Returns the values of states given their last hidden activations, float32 `(batch,)`.

        Raises:
            ValueError: no value head.
        """
        if self.value_head is None:
            raise ValueError("this student has no value head; make it with make_student(..., value=True)")
        with torch.autocast(hidden_BF.device.type, enabled=False):
            values_B: Tensor = self.value_head(hidden_BF.float()).squeeze(-1)
        return values_B

    def folded_net(self) -> Net:
        """Returns a network that gives the student's logits: its own, or a copy with the temperature folded in."""
        if self.shape.temperature == 1.0:
            return self.net
        # The last layer is linear, so dividing its parameters divides the outputs.
        net = copy.deepcopy(self.net)
        if isinstance(net, UserNet):
            net.divisor = self.shape.temperature
            return net
        with torch.no_grad():
            for weight in net.dense[-1].parameters():
                weight.div_(self.shape.temperature)
        return net

    @torch.no_grad()
    def with_outputs(self, outputs: Sequence[int]) -> "Student":
        """Returns a copy with some of the outputs only, such as the actions of one of its games, in evaluation mode.

        Raises:
            ValueError: a module of the user's, whose last layer is unknown.
        """
        if isinstance(self.net, UserNet):
            raise ValueError(f"{self.shape.module}: your own module has no known last layer to take outputs from")
        student = Student(replace(self.shape, num_actions=len(outputs)))
        last = f"net.dense.{len(self.net.dense) - 1}."
        tensors = {k: t[list(outputs)] if k.startswith(last) else t for k, t in self.state_dict().items()}
        student.load_state_dict(tensors)
        return student.to(next(self.parameters()).device).eval()

    def to_sb3(self, env: Any = None, algorithm: Any = "PPO", **kwargs: Any) -> "BaseAlgorithm":
        """Returns an SB3 agent whose policy is this student; see `policykd.agents.sb3_student.to_sb3`."""
        from policykd.agents.sb3_student import to_sb3

        student: Any = self  # a type checker that follows both paths to this module sees two classes
        return to_sb3(student, env, algorithm, **kwargs)

    def from_sb3(self, model: "BaseAlgorithm") -> "Student":
        """Returns a student of this shape with the weights of an agent that `to_sb3` made."""
        from policykd.agents.sb3_student import from_sb3

        student: Any = self
        trained: Any = from_sb3(model, student)
        return trained  # type: ignore[no-any-return]

    def _logits(self, outputs_BA: Tensor) -> Tensor:
        divisor = self.shape.temperature
        return outputs_BA if divisor == 1.0 else outputs_BA / divisor

    @torch.no_grad()
    def fit_input_normalization(self, frames: Tensor) -> None:
        """Sets the input normalisation from frames `(n, 84, 84)`: the background becomes 0, the pixels' spread 1.

        On [0, 1] a small network first learns the background, and may never get to the few pixels that are the ball
        (measured in docs/log.md). Networks on vectors, and modules without `centre` and `scale`, are left unchanged.
        """
        holder = self.net.module if isinstance(self.net, UserNet) else self.net
        centre = getattr(holder, "centre", None)
        scale = getattr(holder, "scale", None)
        if isinstance(centre, Tensor) and isinstance(scale, Tensor):
            # The median is the background; the floor keeps the noise of a flat image from being blown up.
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
            ValueError: another shape or dtype, or observations that are not finite.
        """
        # SB3 passes frames channels last, policykd channels first.
        obs = np.asarray(observation)
        expected = self.shape.obs_shape
        if len(expected) == 3 and obs.shape[-3:] == (*expected[1:], expected[0]):
            obs = np.moveaxis(obs, -1, -3)
        if obs.shape[-len(expected) :] != expected or obs.ndim > len(expected) + 1:
            raise ValueError(f"observation has shape {obs.shape}, expected {expected} or a batch of them")
        if len(expected) == 1 and not np.isfinite(obs).all():
            raise ValueError("observation is NaN or infinite, expected finite numbers")
        batch = torch.from_numpy(np.ascontiguousarray(obs)).view(-1, *expected)
        logits_BA = self(batch.to(next(self.parameters()).device)).cpu()
        # SB3's signature has no generator, so this one draws from torch's global generator as SB3 does.
        actions = greedy(logits_BA) if deterministic else sample(logits_BA, torch.default_generator)
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
        size: name from `SIZES` for frames; units of the dense layers, such as `(32, 32)`, for vectors.
        num_actions: number of logits.
        obs_shape: shape of one observation; `(4, 84, 84)` on Atari.
        seed: seed of the initial weights.
        value: whether to add a value head, a linear layer on the last hidden layer.
        temperature: divisor of the network's outputs that gives logits.

    Raises:
        ValueError: unknown size, or one that does not fit the observations.
    """
    shape = student_shape(size, num_actions, obs_shape)
    return init_student(replace(shape, value=value, temperature=temperature), seed)


def student_shape(size: Size | Sequence[int], num_actions: int, obs_shape: tuple[int, ...] = ATARI_OBS_SHAPE) -> Shape:
    """Returns the architecture of a size, to change it before `init_student`: `replace(shape, rank=8)`.

    Raises:
        ValueError: unknown size, or one that does not fit the observations.
    """
    if not isinstance(size, str):
        return Shape((), tuple(size), num_actions, obs_shape)
    if size not in SIZES:
        raise ValueError(f"unknown student size {size!r}: choose from {', '.join(SIZES)}")
    if obs_shape != ATARI_OBS_SHAPE:
        raise ValueError(f"size {size} is for frames {ATARI_OBS_SHAPE}, not {obs_shape}; give the dense layers' units")
    design, widths, units = SIZES[size]
    return Shape(widths, (units,), num_actions, obs_shape, design=design)


def make_net(shape: Shape) -> ConvNet | ImpalaNet | MLP:
    """Returns a network of this shape with torch's initial weights.

    Raises:
        ValueError: a shape that no network has.
    """
    if not shape.widths:
        if len(shape.obs_shape) != 1:
            raise ValueError(f"no convolutions for observations {shape.obs_shape}; give widths, or vectors")
        return MLP(shape.obs_shape[0], shape.hidden, shape.num_actions, activation=nn.ReLU)
    if shape.design == "impala":
        return ImpalaNet(shape.widths, shape.hidden, shape.num_actions, rank=shape.rank)
    return ConvNet(shape.widths, shape.hidden, shape.num_actions, design=shape.design, rank=shape.rank)


def init_student(shape: Shape, seed: int = 0) -> Student:
    """Returns an untrained student of any architecture.

    Weights are drawn as in He et al. (2015), with small ones in the heads, so that a policy starts nearly uniform.
    """
    student = Student(shape)
    assert not isinstance(student.net, UserNet)
    # torch's own initial weights are replaced: the result depends on the seed alone, not on global state.
    heads = (student.net.dense[-1], student.value_head)
    generator = torch.Generator().manual_seed(seed)
    for layer in student.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        gain = math.sqrt(2.0)
        if layer in heads:
            gain = 0.1
        elif layer.bias is None:  # a linear factor without a ReLU after it
            gain = 1.0
        layer.weight.data.normal_(0.0, gain / math.sqrt(layer.weight[0].numel()), generator=generator)
        if layer.bias is not None:
            layer.bias.data.zero_()
    return student


def save_student(
    student: Student,
    path: str | Path,
    provenance: Provenance | None = None,
    *,
    heads: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Writes `student.safetensors` and `student.json` into a folder, created if missing, each atomically.

    Args:
        student: the network.
        path: the folder.
        provenance: where it comes from.
        heads: game -> outputs that are its actions, of a student of several games (`policykd.multi_game`).

    Raises:
        OSError: no space left or no permission; the previous files stay.
    """
    # The weights come first: student.json marks a complete student.
    folder = Path(path)
    weights = packed_weights(student)
    write_atomically(folder / "student.safetensors", weights)
    shape = student.shape
    version = 1
    # The lowest version that reads this student correctly, so that older releases load most students.
    if shape.value or shape.temperature != 1.0:
        version = 2
    if shape.design != "nature" or shape.rank or shape.module:
        version = 3
    if heads:
        version = 4
    provenance = provenance or Provenance()
    origin = {f.name: getattr(provenance, f.name) for f in fields(Provenance)}
    sha256 = hashlib.sha256(weights).hexdigest()
    card = StudentCard(format=version, sha256=sha256, shape=shape, heads=dict(heads or {}), **origin)
    write_atomically(folder / "student.json", to_json(card))


def packed_weights(student: Student) -> bytes:
    """Returns the content of `student.safetensors`; its sha256 identifies the student."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in student.state_dict().items()}
    if student.shape.module:  # tensors of a user's module may share memory, which safetensors refuses
        tensors = {name: t.clone() for name, t in tensors.items()}
    return save_tensors(tensors)


def read_student_card(path: Path, *, next_step: str = "give the folder of a finished run") -> StudentCard:
    """Returns the content of a student.json.

    Raises:
        BadFile: not found, or not the description of a student.
    """
    return read_json(StudentCard, path, next_step=next_step, max_bytes=MAX_CARD_BYTES)


def load_student(path: str | Path, *, game: str = "", module: nn.Module | None = None) -> Student:
    """Returns the student of a run's folder (or of its `student.json`) in evaluation mode.

    Args:
        path: the folder.
        game: of a student of several games, the one whose actions are returned; without it, all outputs are.
        module: for a student made by `Student.of`, an instance of its class; its weights are replaced.

    Raises:
        ValueError: a module is missing, or given for a student that has none; a game that the student does not play.
        BadFile: not a student, another format, another module, or weights that are not those that were saved.
    """
    path = Path(path)
    folder = path.parent if path.name == "student.json" else path
    card = read_student_card(folder / "student.json")
    weights = read_bounded(folder / "student.safetensors", MAX_STUDENT_BYTES, next_step="copy the folder again")
    # Also catches a folder in which only one of the two files was replaced.
    if hashlib.sha256(weights).hexdigest() != card.sha256:
        raise BadFile(f"{folder}/student.safetensors: not the file that student.json describes; copy both again")
    _check_module(folder, card.shape, module)
    student = Student(card.shape, module) if module is not None else _build(folder, card.shape, len(weights))
    try:
        student.load_state_dict(load_tensors(weights))
    except (SafetensorError, RuntimeError) as error:
        next_step = "copy the folder again" if module is None else "give one made like the student's"
        kind = "Student" if module is None else type(module).__name__
        raise BadFile(f"{folder}: not the tensors of this {kind} ({one_line(str(error))}); {next_step}") from error
    if game and card.heads:
        if game not in card.heads:
            raise ValueError(f"{folder}: plays {', '.join(card.heads)}, not {game}; give one of them")
        return student.with_outputs(card.heads[game])
    return student.eval()


def _build(folder: Path, shape: Shape, max_bytes: int) -> Student:
    """Returns a student of a foreign shape, once its weights are known to fit into `max_bytes`."""
    try:
        with torch.device("meta"):  # allocates nothing, whatever the card claims
            num_bytes = sum(t.nbytes for t in Student(shape).state_dict().values())
    except (RuntimeError, ValueError) as error:
        raise BadFile(f"{folder}: not a student of policykd ({one_line(str(error))}); copy it again") from error
    if num_bytes > max_bytes:
        raise BadFile(f"{folder}: the shape in student.json needs {num_bytes:,} bytes of weights; copy both again")
    return Student(shape)


def _check_module(folder: Path, shape: Shape, module: nn.Module | None) -> None:
    """Raises ValueError unless a module is given exactly if the card names one, and of the named class."""
    expected = one_line(shape.module)
    given = type(module).__qualname__ if module is not None else ""
    if given == shape.module:
        return
    if not expected:
        raise ValueError(f"{folder}: one of policykd's own students; leave out module={given}()")
    example = f"load_student(path, module={expected}())"
    raise ValueError(f"{folder}: a student of your own module; load it with {example}")
