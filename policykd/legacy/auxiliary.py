"""What else a teacher knows than its scores: values, features, and that a picture moved by a pixel is the same picture.

Suffixes name dimensions: B batch, N stored states, A actions, F features, P pixels of all maps, C H W an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, Activations, ConvNet, FrameNet, UserNet
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.legacy.feature_losses import (
    attention_loss_B,
    attention_maps,
    hint_loss_B,
    relational_loss_B,
    shift_loss_B,
    shifted_frames,
    similarity_loss_B,
    value_loss_B,
)
from policykd.legacy.schedules import Quantity

EVERY = slice(None)
_FEATURES = ("hint", "attention", "similarity", "relational")
_SIDES = (20, 9, 7)
"""of the maps of SB3's NatureCNN, pixels"""


@dataclass(frozen=True)
class BeyondLogits:
    """Weights of what is learned beside the scores (docs/beyond_logits.md); 0 is left out, a schedule changes it."""

    value: Quantity = 0.0
    """of the squared error of the student's value head against PPO's or A2C's critic, or max Q"""
    hint: Quantity = 0.0
    """of the relative squared error of a linear map from the student's last hidden layer to the teacher's (FitNets)"""
    attention: Quantity = 0.0
    """of the distance between where in the picture both networks' convolutions are active"""
    similarity: Quantity = 0.0
    """of the distance between which states of a batch both networks find alike"""
    relational: Quantity = 0.0
    """of the difference between the distances and angles of a batch's states in both networks' hidden layers"""
    shift: Quantity = 0.0
    """of the KL from the student's policy to the same student's on the frames moved by up to 4 pixels"""

    def __post_init__(self) -> None:
        for name, weight in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(weight, int | float) and not 0.0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} is {weight}; give a number from 0 up, 0 to leave it out")

    @property
    def active(self) -> tuple[str, ...]:
        """The names of what is learned at some time: those whose weight is a schedule, or not 0."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != 0.0)


class Beyond(nn.Module):
    """What is trained beside a student and thrown away, and what its teacher says of each stored state.

    Its parameters belong into the student's optimizer. What the teacher says is in buffers that no checkpoint holds:
    `label` gives the same again.
    """

    values_N1: Tensor
    hidden_NF: Tensor
    attention_NP: Tensor

    def __init__(self, config: BeyondLogits, student: Student, teacher: Teacher, *, seed: int = 0) -> None:
        """Makes it empty; `grow` gives it room.

        Args:
            config: what is learned.
            student: whose hidden layer is projected; it is not kept.
            teacher: an SB3 archive that was rebuilt, for its features; with a critic or Q-values, for values.
            seed: of the projection's weights.

        Raises:
            ValueError: the student or the teacher lacks what the configuration asks for.
        """
        super().__init__()
        self.active, self.teacher = config.active, teacher
        _check(self.active, student, teacher)
        net = teacher.net
        num_hidden = net.num_features if isinstance(net, ConvNet | MLP) else 0
        self.projection: nn.Linear | None = None
        if "hint" in self.active:
            assert not isinstance(student.net, UserNet)
            self.projection = nn.Linear(student.net.num_features, num_hidden)
            generator = torch.Generator().manual_seed(seed)
            std = self.projection.in_features**-0.5
            self.projection.weight.data.normal_(0.0, std, generator=generator)
            self.projection.bias.data.zero_()
        keeps_hidden = {"hint", "similarity", "relational"} & set(self.active)
        num_pixels = sum(n * n for n in _SIDES) if "attention" in self.active else 0
        self._keep("values_N1", torch.empty(0, 1 if "value" in self.active else 0))
        self._keep("hidden_NF", torch.empty(0, num_hidden if keeps_hidden else 0, dtype=torch.float16))
        self._keep("attention_NP", torch.empty(0, num_pixels, dtype=torch.float16))

    def _keep(self, name: str, rows: Tensor) -> None:
        self.register_buffer(name, rows, persistent=False)

    def grow(self, capacity: int) -> None:
        """Makes room for so many states; what is not labelled is nan. Not while other threads read or label."""
        for name, rows in list(self.named_buffers()):
            more = rows.new_full((max(0, capacity - len(rows)), *rows.shape[1:]), math.nan)
            self._keep(name, torch.cat([rows, more]))

    @torch.inference_mode()
    def label(self, obs_BCHW: Tensor, rows_B: Tensor, new: slice = EVERY) -> None:
        """Asks the teacher about states, with one pass of its network (and one of its critic if that shares nothing).

        Args:
            obs_BCHW: observations on the teacher's device.
            rows_B: of the replay, where they lie, int64, on the same device.
            new: which of them are kept; a network gives the same bits for a state where it stands at the same place of
                a batch of the same size.
        """
        rows_B = rows_B[new]
        net, seen = self.teacher.net, None
        if set(_FEATURES) & set(self.active):
            assert isinstance(net, ConvNet | MLP)
            seen = net.activations(obs_BCHW)
        if "value" in self.active:
            values_B1 = self.teacher.values(obs_BCHW, seen)[new].unsqueeze(1)
            self.values_N1.index_copy_(0, rows_B, values_B1.to(self.values_N1.device))
        if seen is not None and self.hidden_NF.shape[1]:
            self.hidden_NF.index_copy_(0, rows_B, seen.hidden_BF[new].to(self.hidden_NF))
        if seen is not None and self.attention_NP.shape[1]:
            self.attention_NP.index_copy_(0, rows_B, attention_maps(seen.maps)[new].to(self.attention_NP))

    def terms(
        self, obs_BCHW: Tensor, rows_B: Tensor, shifts_B2: Tensor, student: Student, now: BeyondLogits
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the student's scores and by name, unweighted `(batch,)`, each term whose weight is not 0 now.

        Takes one pass of the student, another for `shift`. Several threads may call it, each with a part of a batch.

        Args:
            obs_BCHW: the states' observations.
            rows_B: where they lie in the replay, int64; labelled before.
            shifts_B2: pixels from -4 to 4, int64, for `shift`.
            student: that is trained.
            now: weights as numbers.
        """
        seen = student.activations(obs_BCHW)
        losses = {}
        if now.shift:
            losses["shift"] = shift_loss_B(seen.outputs_BA, student(shifted_frames(obs_BCHW, shifts_B2)))
        with torch.autocast(obs_BCHW.device.type, enabled=False):
            losses |= self._compared(seen, rows_B, student, now)
        return seen.outputs_BA, losses

    def _compared(self, seen: Activations, rows_B: Tensor, student: Student, now: BeyondLogits) -> dict[str, Tensor]:
        """Returns the terms that compare the student with what was labelled."""
        losses, hidden_BF = {}, seen.hidden_BF.float()
        if now.value:
            teacher_value_B = self.values_N1.index_select(0, rows_B).squeeze(1)
            losses["value"] = value_loss_B(student.value_of(hidden_BF), teacher_value_B)
        if now.attention:
            teacher_BP = self.attention_NP.index_select(0, rows_B).float()
            losses["attention"] = attention_loss_B(attention_maps(seen.maps), teacher_BP, len(seen.maps))
        if not (now.hint or now.similarity or now.relational):
            return losses
        teacher_BF = self.hidden_NF.index_select(0, rows_B).float()
        if now.hint:
            assert self.projection is not None
            losses["hint"] = hint_loss_B(self.projection(hidden_BF), teacher_BF)
        if now.similarity:
            losses["similarity"] = similarity_loss_B(hidden_BF, teacher_BF)
        if now.relational:
            losses["relational"] = relational_loss_B(hidden_BF, teacher_BF)
        return losses


def _check(active: Sequence[str], student: Student, teacher: Teacher) -> None:
    """Raises ValueError where the student or the teacher lacks what is asked for."""
    who = teacher.ref or teacher.path
    if active and isinstance(student.net, UserNet):
        raise ValueError(f"beyond {', '.join(active)}: {student.shape.module} shows its scores alone; leave it out")
    if "value" in active:
        if student.value_head is None:
            raise ValueError(
                "beyond value needs a student with a value head; make it with make_student(..., value=True)"
            )
        if teacher.algorithm not in ("DQN", "QRDQN"):
            _ = teacher.critic  # says why there is none
    features = [name for name in _FEATURES if name in active]
    if features and not isinstance(teacher.net, ConvNet | MLP):
        raise ValueError(
            f"beyond {', '.join(features)} needs the teacher's features: {who} has none that can be read; give one SB3"
            " archive, without --trust-pickle"
        )
    if "attention" in active and not (isinstance(teacher.net, ConvNet) and isinstance(student.net, FrameNet)):
        raise ValueError(
            f"beyond attention needs a teacher and a student with convolutions, which {who} is not; leave it"
        )
    if "attention" in active and (sides := _sides(student)) != _SIDES:
        raise ValueError(
            f"beyond attention needs a student whose maps are {_SIDES} pixels wide as the teacher's, this design's are"
            f" {sides}; leave it out"
        )
    if "shift" in active and not isinstance(student.net, FrameNet):
        raise ValueError("beyond shift needs a student that sees frames, not vectors; leave it out")


@torch.no_grad()
def _sides(student: Student) -> tuple[int, ...]:
    """Returns how many pixels wide the student's maps are."""
    blank = torch.zeros((1, *student.shape.obs_shape), dtype=torch.uint8, device=next(student.parameters()).device)
    return tuple(seen.shape[-1] for seen in student.activations(blank).maps)
