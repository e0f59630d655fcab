"""Auxiliary losses: the teacher's values and features, and invariance to small shifts of the image.

`AuxiliaryLosses` wraps a policy loss and plugs into the loop as a loss function. Shape suffixes: B batch, N stored
states, A actions, F features, P pixels of all maps, C H W an image.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, Activations, ConvNet, FrameNet, UserNet
from policykd.agents.student import Student
from policykd.agents.teacher import Teacher
from policykd.losses import AuxiliaryLossWeights, Batch, Metrics, PolicyLoss
from policykd.methods.feature_losses import (
    attention_loss_B,
    attention_maps,
    hint_loss_B,
    random_shifts,
    relational_loss_B,
    shift_frames,
    shift_loss_B,
    similarity_loss_B,
    value_loss_B,
)
from policykd.replay import Replay
from policykd.schedules import Schedule, iter_schedules, resolve

_FEATURE_LOSSES = ("hint", "attention", "similarity", "relational")
_NATURE_CNN_MAP_SIZES = (20, 9, 7)
"""width of the maps of SB3's NatureCNN, pixels"""
_LABEL_BATCH_SIZE = 256


class AuxiliaryLosses(nn.Module):
    """A policy loss plus weighted auxiliary losses, as a loss function of the loop.

    Its parameters (the projection of `hint`) are trained together with the student. The teacher's values and features
    per stored state are buffers that no checkpoint holds: `prepare` computes them, bit for bit the same after a resume.
    """

    teacher_values_N: Tensor
    teacher_hidden_NF: Tensor
    teacher_attention_NP: Tensor

    def __init__(
        self, loss: PolicyLoss, weights: AuxiliaryLossWeights, student: Student, teacher: Teacher, *, seed: int = 0
    ) -> None:
        """Prepares the losses that have a weight.

        Args:
            loss: loss of the policies, to which the auxiliary losses are added.
            weights: weights of the auxiliary losses.
            student: the network whose hidden layer is projected.
            teacher: an SB3 archive, for its features; with a critic or Q-values, for values.
            seed: seed of the projection's weights.

        Raises:
            ValueError: the student or the teacher lacks what a loss needs.
        """
        super().__init__()
        self.loss = loss
        self.weights = weights
        self.teacher = teacher
        self.active = weights.active
        _check_supported(self.active, student, teacher)
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
        # States are labelled in the order of their rows, each once.
        self._num_prepared = 0
        # Width 0 where a loss is not used: then nothing is stored per state.
        keeps_hidden = bool({"hint", "similarity", "relational"} & set(self.active))
        num_pixels = sum(n * n for n in _NATURE_CNN_MAP_SIZES) if "attention" in self.active else 0
        self.register_buffer("teacher_values_N", torch.empty(0), persistent=False)
        hidden_NF = torch.empty(0, num_hidden if keeps_hidden else 0, dtype=torch.float16)
        self.register_buffer("teacher_hidden_NF", hidden_NF, persistent=False)
        self.register_buffer("teacher_attention_NP", torch.empty(0, num_pixels, dtype=torch.float16), persistent=False)

    @torch.inference_mode()
    def prepare(self, replay: Replay, num_rows: int) -> None:
        """Computes the teacher's values and features of the stored states that do not have them yet.

        A network gives the same bits for a state only at the same position of a batch of the same size, so the states
        are labelled in fixed blocks: a resumed run, which labels all of them again, gets identical labels.
        """
        if set(self.active) <= {"shift"}:
            return
        # 1. Room for all states that the run will have, so that labels are not moved again.
        self._grow(replay.capacity)
        # 2. Blocks of fixed size; the last is padded with its own last state.
        while self._num_prepared < num_rows:
            first = self._num_prepared // _LABEL_BATCH_SIZE * _LABEL_BATCH_SIZE
            end = min(first + _LABEL_BATCH_SIZE, num_rows)
            rows_B = torch.arange(first, first + _LABEL_BATCH_SIZE, device=replay.device).clamp_(max=end - 1)
            self._label(replay.gather(rows_B), rows_B, slice(self._num_prepared - first, end - first))
            self._num_prepared = end

    def forward(self, student: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the loss per state, and the metrics with each auxiliary loss before its weight."""
        assert isinstance(student, Student)
        seen = student.activations(batch.obs)
        student_BA = seen.outputs_BA.float()
        loss_B = self.loss.per_state(student_BA, batch.teacher_BA, batch.temperature, batch.progress)
        metrics = self.loss.metrics(student_BA, batch)
        for name in self.active:
            weight = resolve(getattr(self.weights, name), batch.progress)
            # Not computed at weight 0; it stays among the metrics, which must be the same in every update.
            term_B = self._term(name, student, seen, batch) if weight else torch.zeros_like(loss_B)
            loss_B = loss_B + weight * term_B
            metrics[f"{name}_loss"] = term_B
        return loss_B, metrics

    def iter_schedules(self, prefix: str) -> Iterator[tuple[str, Schedule]]:
        """Yields the schedules of the wrapped loss and of the weights, for `policykd.schedules.iter_schedules`."""
        yield from iter_schedules(self.loss, prefix)
        yield from iter_schedules(self.weights, f"{prefix}auxiliary.")

    def _term(self, name: str, student: Student, seen: Activations, batch: Batch) -> Tensor:
        """Returns one auxiliary loss per state."""
        if name == "shift":
            shifted_BA = student(shift_frames(batch.obs, random_shifts(batch.random_B)))
            return shift_loss_B(seen.outputs_BA, shifted_BA)
        # Distances of hidden layers in float32: bfloat16 has too few digits for differences of squares.
        with torch.autocast(batch.obs.device.type, enabled=False):
            hidden_BF = seen.hidden_BF.float()
            if name == "value":
                teacher_B = self.teacher_values_N.index_select(0, batch.rows_B)
                return value_loss_B(student.value_of(hidden_BF), teacher_B)
            if name == "attention":
                teacher_BP = self.teacher_attention_NP.index_select(0, batch.rows_B).float()
                return attention_loss_B(attention_maps(seen.maps), teacher_BP, len(seen.maps))
            teacher_BF = self.teacher_hidden_NF.index_select(0, batch.rows_B).float()
            if name == "hint":
                assert self.projection is not None
                return hint_loss_B(self.projection(hidden_BF), teacher_BF)
            if name == "similarity":
                return similarity_loss_B(hidden_BF, teacher_BF)
            return relational_loss_B(hidden_BF, teacher_BF)

    def _grow(self, capacity: int) -> None:
        """Makes room for the labels of `capacity` states; those that are not labelled are nan."""
        for name in ("teacher_values_N", "teacher_hidden_NF", "teacher_attention_NP"):
            rows = getattr(self, name)
            is_used = rows.ndim > 1 or "value" in self.active
            if is_used and len(rows) < capacity:
                more = rows.new_full((capacity - len(rows), *rows.shape[1:]), math.nan)
                self.register_buffer(name, torch.cat([rows, more]), persistent=False)

    def _label(self, obs_BCHW: Tensor, rows_B: Tensor, new: slice) -> None:
        """Stores the teacher's values and features of the rows `rows_B[new]`, with one forward pass of its network."""
        # Features are stored in float16: half the memory, at a relative error of 5e-4.
        new_rows_B = rows_B[new]
        # One forward pass serves values and features alike.
        net = self.teacher.net
        seen: Activations | None = None
        if set(_FEATURE_LOSSES) & set(self.active):
            assert isinstance(net, ConvNet | MLP)
            seen = net.activations(obs_BCHW)
        if "value" in self.active:
            self.teacher_values_N[new_rows_B] = self.teacher.values(obs_BCHW, seen)[new].to(self.teacher_values_N)
        if seen is not None and self.teacher_hidden_NF.shape[1]:
            self.teacher_hidden_NF[new_rows_B] = seen.hidden_BF[new].to(self.teacher_hidden_NF)
        if seen is not None and self.teacher_attention_NP.shape[1]:
            self.teacher_attention_NP[new_rows_B] = attention_maps(seen.maps)[new].to(self.teacher_attention_NP)


def _check_supported(active: tuple[str, ...], student: Student, teacher: Teacher) -> None:
    """Raises ValueError where the student or the teacher lacks what an auxiliary loss needs."""
    who = teacher.ref or teacher.path
    if active and isinstance(student.net, UserNet):
        raise ValueError(
            f"auxiliary losses {', '.join(active)} need the student's features, which {student.shape.module} does not"
            " give; leave them out"
        )
    if "value" in active:
        if student.value_head is None:
            raise ValueError("the auxiliary loss value needs a value head; use make_student(..., value=True)")
        if teacher.algorithm not in ("DQN", "QRDQN"):
            _ = teacher.critic  # raises with the reason if there is none
    features = [name for name in _FEATURE_LOSSES if name in active]
    if features and not isinstance(teacher.net, ConvNet | MLP):
        raise ValueError(
            f"auxiliary losses {', '.join(features)} need the teacher's features, which {who} does not give; use one"
            " SB3 archive, without --trust-pickle"
        )
    if "attention" in active:
        are_convolutions = isinstance(teacher.net, ConvNet) and isinstance(student.net, FrameNet)
        if not are_convolutions or _map_sizes(student) != _NATURE_CNN_MAP_SIZES:
            raise ValueError(
                "the auxiliary loss attention needs a teacher and a student with convolutions whose maps are"
                f" {_NATURE_CNN_MAP_SIZES} pixels wide, unlike this student or {who}; leave it out"
            )
    if "shift" in active and not isinstance(student.net, FrameNet):
        raise ValueError("the auxiliary loss shift needs a student of images, not of vectors; leave it out")


@torch.no_grad()
def _map_sizes(student: Student) -> tuple[int, ...]:
    """Returns the width of each of the student's maps, pixels."""
    blank = torch.zeros((1, *student.shape.obs_shape), dtype=torch.uint8, device=next(student.parameters()).device)
    return tuple(maps.shape[-1] for maps in student.activations(blank).maps)
