"""Ensembles: several teachers as one, whose policy is the mixture of theirs.

Q-values and logits are only comparable as probabilities, so each member's softmax is taken at its own temperature.
Suffixes name dimensions: M members, B batch, A actions.
"""

import copy
import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from policykd.agents.card import Card
from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.policy import entropy, log_policy
from policykd.agents.teacher import Teacher
from policykd.envs.games import RANDOM_AND_HUMAN_SCORES, canonical_name

_MIN_CONFIDENCE = 1e-6
"""makes the weights equal where all members are uniform"""


@dataclass(frozen=True)
class FixedWeights:
    """The same weights in every state."""

    values: tuple[float, ...]
    """one per member, not negative; they are divided by their sum"""

    def __post_init__(self) -> None:
        if not all(0.0 <= v < math.inf for v in self.values) or not sum(self.values) > 0.0:
            raise ValueError(f"teacher weights {self.values}: give numbers from 0 up, not all of them 0")

    def __call__(self, log_p_MBA: Tensor, /) -> Tensor:
        """Returns values / sum(values), `(members, 1)`."""
        weights_M = torch.tensor(self.values, device=log_p_MBA.device)
        return (weights_M / weights_M.sum()).unsqueeze(1)


@dataclass(frozen=True)
class ConfidenceWeights:
    """Weights per state, proportional to 1 - H(p) / log A: near 0 for a uniform member, largest for a certain one."""

    def __call__(self, log_p_MBA: Tensor, /) -> Tensor:
        """Returns the weights, `(members, batch)`; equal where all members are uniform."""
        max_entropy = math.log(max(2, log_p_MBA.shape[-1]))
        confidence_MB = (1.0 - entropy(log_p_MBA) / max_entropy).clamp(min=0.0) + _MIN_CONFIDENCE
        return confidence_MB / confidence_MB.sum(dim=0)


Weights = FixedWeights | ConfidenceWeights


def log_mixture(log_p_MBA: Tensor, weights_MB: Tensor) -> Tensor:
    """Returns log sum_m w_m p_m, `(batch, num_actions)`; finite, since at least one weight is positive."""
    return torch.logsumexp(log_p_MBA + weights_MB.log().unsqueeze(-1), dim=0)


def disagreement_B(log_p_MBA: Tensor, weights_MB: Tensor) -> Tensor:
    """Returns H(sum_m w_m p_m) - sum_m w_m H(p_m), nats `(batch,)`: the generalised Jensen-Shannon divergence.

    It is 0 where all members agree, and at most the entropy of the weights, where no action is shared (Lin, 1991).
    """
    within_B = (weights_MB * entropy(log_p_MBA)).sum(dim=0)
    return (entropy(log_mixture(log_p_MBA, weights_MB)) - within_B).clamp(min=0.0)


class Ensemble:
    """The mixture of several teachers as a policy: log-probabilities, which are logits at temperature 1."""

    temperature = 1.0

    def __init__(self, teachers: Sequence[Teacher], weights: Weights) -> None:
        """Mixes teachers of one game.

        Raises:
            ValueError: other actions or observations, or another number of weights.
        """
        self.teachers = tuple(teachers)
        self.weights = weights
        first = self.teachers[0]
        for other in self.teachers:
            if (other.num_actions, other.obs_shape) != (first.num_actions, first.obs_shape):
                raise ValueError(
                    f"{first.ref} has {first.num_actions} actions on observations {first.obs_shape}, {other.ref} has"
                    f" {other.num_actions} on {other.obs_shape}; give teachers of one game"
                )
        if isinstance(weights, FixedWeights) and len(weights.values) != len(self.teachers):
            raise ValueError(
                f"{len(weights.values)} teacher weights for {len(self.teachers)} teachers; give one for each"
            )
        self.num_actions = first.num_actions
        self.obs_shape = first.obs_shape
        # One entry per batch; several threads may append to a deque while another takes from it.
        self._sums: deque[Tensor] = deque()

    def __call__(self, obs_BCHW: Tensor, /) -> Tensor:
        """Returns log-probabilities, float32 `(batch, num_actions)`, finite if the members' outputs are."""
        # Q-values and logits differ in scale and offset, so the members are mixed as probabilities.
        log_p_MBA = torch.stack([log_policy(t(obs_BCHW), t.temperature) for t in self.teachers])
        weights_MB = self.weights(log_p_MBA)
        # States with NaN are left out. The sums stay on the device, so that the GPU is not synchronised in every batch.
        nats_B = disagreement_B(log_p_MBA, weights_MB)
        finite_B = nats_B.isfinite()
        rows_NB = torch.cat([finite_B.float()[None], nats_B[None], weights_MB.expand(-1, len(nats_B))])
        self._sums.append(rows_NB.masked_fill(~finite_B, 0.0).sum(dim=1))
        return log_mixture(log_p_MBA, weights_MB)

    def take_metrics(self) -> dict[str, float]:
        """Returns `teacher_disagreement` (nats) and `teacher_weight_0`, ...: means over states since the last call."""
        sums = [self._sums.popleft().cpu() for _ in range(len(self._sums))]
        if not sums:
            return {}
        num, nats, *weights = torch.stack(sums).double().sum(dim=0).tolist()
        totals = {"teacher_disagreement": nats} | {f"teacher_weight_{i}": w for i, w in enumerate(weights)}
        return {name: total / num for name, total in totals.items()} if num else {}

    def to(self, device: Any, /) -> "Ensemble":
        """Moves the members to a device and returns the ensemble."""
        for teacher in self.teachers:
            teacher.to(device)
        return self

    def with_members(self, teachers: Sequence[Teacher]) -> "Ensemble":
        """Returns the ensemble with other versions of its members; both add to the same statistics."""
        # A shallow copy: the statistics are the same deque.
        other = copy.copy(self)
        other.teachers = tuple(teachers)
        return other

    @property
    def backend(self) -> str:
        """Libraries that compute the members' outputs."""
        return " + ".join(dict.fromkeys(t.backend for t in self.teachers))

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all members' acting paths."""
        nets = [t.net for t in self.teachers]
        return sum(num_parameters(n) if isinstance(n, nn.Module) else getattr(n, "num_parameters", 0) for n in nets)

    @property
    def num_macs(self) -> int | None:
        """Multiply-accumulates of all members for one observation; None with an ONNX file among them."""
        macs = [num_macs(t.net, self.obs_shape) for t in self.teachers if isinstance(t.net, nn.Module)]
        return sum(macs) if len(macs) == len(self.teachers) else None


def make_ensemble(teachers: Sequence[Teacher], weights: Weights) -> Teacher:
    """Returns several teachers as one, identified by the members' hashes and the weights.

    Raises:
        ValueError: other actions or observations, or another number of weights.
    """
    net = Ensemble(teachers, weights)
    games = {t.card.game for t in teachers if t.card.game}
    # The members' archives and the weights identify the mixture. Its card has no return: nobody has measured it.
    return Teacher(
        net,
        "ENSEMBLE",
        teachers[0].path,
        sha256=hashlib.sha256("\n".join([*(t.sha256 for t in teachers), repr(weights)]).encode()).hexdigest(),
        card=Card(
            game=games.pop() if len(games) == 1 else "",
            members=tuple(t.record for t in teachers),
            weights=repr(weights),
        ),
        ref="+".join(f"{t.ref}@{t.revision}" if t.revision else t.ref for t in teachers),
    )


def parse_weights(
    text: str, teachers: Sequence[Teacher], game: str | None, measure: Callable[[Teacher], float] | None
) -> Weights:
    """Returns the weights that `--teacher-weights` names; for the arguments see `load_teachers`.

    Raises:
        ValueError: malformed weights, or an unknown return.
    """
    if text == "equal":
        return FixedWeights((1.0,) * len(teachers))
    if text == "confidence":
        return ConfidenceWeights()
    if text == "return":
        return _return_weights(teachers, game, measure)
    try:
        return FixedWeights(tuple(float(number) for number in text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"--teacher-weights {text}: give equal, return, confidence, or numbers from 0 up such as 0.7,0.3"
        ) from error


def _return_weights(
    teachers: Sequence[Teacher], game: str | None, measure: Callable[[Teacher], float] | None
) -> FixedWeights:
    """Returns weights proportional to max(return - random play's return, 0), returns unclipped."""
    returns: list[float] = []
    for teacher in teachers:
        if teacher.reported_return is not None:
            returns.append(teacher.reported_return)
        elif measure is not None:
            returns.append(measure(teacher))
        else:
            raise ValueError(f"{teacher.ref}: no reported return; give numbers as --teacher-weights")
    random_return, _ = RANDOM_AND_HUMAN_SCORES.get(canonical_name(game), (0.0, 0.0)) if game else (0.0, 0.0)
    if max(returns) <= random_return:
        raise ValueError(
            f"teacher returns {returns}: none is above random play's {random_return}, so they give no weights; give"
            " numbers as --teacher-weights"
        )
    return FixedWeights(tuple(max(r - random_return, 0.0) for r in returns))
