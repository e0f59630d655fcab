"""Several teachers as one: each one's own softmax, then a mixture of their policies.

Teachers of different algorithms mix, since Q-values and logits only meet as probabilities. Suffixes name dimensions:
M members, B batch, A actions.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from policykd.agents.networks import num_macs, num_parameters
from policykd.agents.policy import entropy, log_policy
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.games import RANDOM_AND_HUMAN_SCORES, canonical_name

WEIGHTS_HELP = (
    "weights of several teachers: `equal`, `return` (each teacher's reported return above random play), `confidence`"
    " (per state, the teachers of lower entropy count more), or numbers such as 0.7,0.3"
)
_LEAST_CONFIDENCE = 1e-6
"""so that members that are all uniform weigh the same"""


class Weights(Protocol):
    """How much each member counts in each state."""

    def __call__(self, log_p_MBA: Tensor, /) -> Tensor:
        """Returns weights `(members, batch)`, or `(members, 1)` for all states; they sum to 1 over the members."""
        ...


@dataclass(frozen=True)
class FixedWeights:
    """The same weights in every state."""

    values: tuple[float, ...]
    """one a member, not negative; they are divided by their sum"""

    def __post_init__(self) -> None:
        if not all(0.0 <= v < math.inf for v in self.values) or not sum(self.values) > 0.0:
            raise ValueError(f"teacher weights {self.values}: give numbers from 0 up, not all of them 0")

    def __call__(self, log_p_MBA: Tensor, /) -> Tensor:
        """Returns values / sum(values), `(members, 1)`."""
        weights_M = torch.tensor(self.values, device=log_p_MBA.device)
        return (weights_M / weights_M.sum()).unsqueeze(1)


@dataclass(frozen=True)
class ReturnWeights:
    """Proportional to what each member plays above chance: max(return - random, 0), over their sum."""

    returns: tuple[float, ...]
    """mean episodic return of each member, unclipped"""
    random_return: float = 0.0
    """of random play in the same game"""

    def __post_init__(self) -> None:
        if not any(r > self.random_return for r in self.returns):
            raise ValueError(
                f"teacher returns {self.returns} are none above random play's {self.random_return}: there is nothing to"
                " weigh them by; give numbers as --teacher-weights"
            )

    def __call__(self, log_p_MBA: Tensor, /) -> Tensor:
        """Returns the weights, `(members, 1)`."""
        return FixedWeights(tuple(max(r - self.random_return, 0.0) for r in self.returns))(log_p_MBA)


@dataclass(frozen=True)
class ConfidenceWeights:
    """Per state, proportional to 1 - H(p) / log A: nothing for a member that is uniform there, most for a sure one."""

    def __call__(self, log_p_MBA: Tensor, /) -> Tensor:
        """Returns the weights, `(members, batch)`; equal where all members are uniform."""
        most = math.log(max(2, log_p_MBA.shape[-1]))
        confidence_MB = (1.0 - entropy(log_p_MBA) / most).clamp(min=0.0) + _LEAST_CONFIDENCE
        return confidence_MB / confidence_MB.sum(dim=0)


def log_mixture(log_p_MBA: Tensor, weights_MB: Tensor) -> Tensor:
    """Returns log sum_m w_m p_m, `(batch, num_actions)`; finite, since one weight at least is positive."""
    return torch.logsumexp(log_p_MBA + weights_MB.log().unsqueeze(-1), dim=0)


def disagreement_B(log_p_MBA: Tensor, weights_MB: Tensor) -> Tensor:
    """Returns H(sum_m w_m p_m) - sum_m w_m H(p_m), nats `(batch,)`: the generalised Jensen-Shannon divergence.

    It is 0 where all members agree, and the weights' own entropy, at most log M, where no action is shared (Lin, 1991).
    """
    within_B = (weights_MB * entropy(log_p_MBA)).sum(dim=0)
    return (entropy(log_mixture(log_p_MBA, weights_MB)) - within_B).clamp(min=0.0)


@dataclass(frozen=True)
class Shares:
    """Who said what in an ensemble, means over states."""

    disagreement: float
    """between the members: their generalised Jensen-Shannon divergence, nats"""
    weights: tuple[float, ...]
    """of the members"""


class Disagreement:
    """Means over states that several threads add to; on a GPU nothing waits for them before they are asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: list[Tensor] = []

    def add(self, nats_B: Tensor, weights_MB: Tensor) -> None:
        """Counts these states, but for those that are no numbers."""
        counted_B = nats_B.isfinite()
        rows_NB = torch.cat([counted_B.float()[None], nats_B[None], weights_MB.expand(-1, len(nats_B))])
        sums_N = rows_NB.masked_fill(~counted_B, 0.0).sum(dim=1)
        with self._lock:
            self._sums.append(sums_N)

    def take(self) -> Shares | None:
        """Returns the means over the states since it was last asked, or None if there were none."""
        with self._lock:
            sums, self._sums = self._sums, []
        if not sums:
            return None
        num, nats, *weights = torch.stack([s.cpu() for s in sums]).double().sum(dim=0).tolist()
        return Shares(nats / num, tuple(w / num for w in weights)) if num else None


class Ensemble:
    """Scores actions as the mixture of several teachers: log-probabilities, which are logits at temperature 1."""

    def __init__(
        self, teachers: Sequence[Teacher], weights: Weights, *, disagreement: Disagreement | None = None
    ) -> None:
        self.teachers, self.weights = tuple(teachers), weights
        shapes = [(t.num_actions, t.obs_shape) for t in self.teachers]
        for teacher, (num_actions, obs_shape) in zip(self.teachers, shapes, strict=True):
            if (num_actions, obs_shape) != shapes[0]:
                raise ValueError(
                    f"{self.teachers[0].ref} scores {shapes[0][0]} actions on {shapes[0][1]}, {teacher.ref} scores"
                    f" {num_actions} on {obs_shape}: teachers of one game are needed"
                )
        given = getattr(weights, "values", getattr(weights, "returns", self.teachers))
        if len(given) != len(self.teachers):
            raise ValueError(f"{len(given)} teacher weights for {len(self.teachers)} teachers; give one for each")
        self.num_actions, self.obs_shape = shapes[0]
        self._disagreement = disagreement or Disagreement()

    def __call__(self, obs_BCHW: Tensor, /) -> Tensor:
        """Returns log-probabilities, float32 `(batch, num_actions)`, finite if the members' scores are."""
        log_p_MBA = torch.stack([log_policy(t(obs_BCHW), t.temperature) for t in self.teachers])
        weights_MB = self.weights(log_p_MBA)
        self._disagreement.add(disagreement_B(log_p_MBA, weights_MB), weights_MB)
        return log_mixture(log_p_MBA, weights_MB)

    def take_disagreement(self) -> Shares | None:
        """Returns how far the members were apart on the states since it was last asked; None if there were none."""
        return self._disagreement.take()

    def to(self, device: Any, /) -> "Ensemble":
        """Moves the members to a device and returns itself."""
        for teacher in self.teachers:
            teacher.to(device)
        return self

    def with_members(self, teachers: Sequence[Teacher]) -> "Ensemble":
        """Returns an ensemble of other members with the same weights; both add to one count of disagreement."""
        return Ensemble(teachers, self.weights, disagreement=self._disagreement)

    @property
    def backend(self) -> str:
        """What computes the members' scores."""
        return " + ".join(dict.fromkeys(t.backend for t in self.teachers))

    @property
    def num_parameters(self) -> int:
        """Of all members' acting paths."""
        nets = [t.net for t in self.teachers]
        return sum(num_parameters(n) if isinstance(n, nn.Module) else getattr(n, "num_parameters", 0) for n in nets)

    @property
    def num_macs(self) -> int | None:
        """Multiply-accumulates of all members for one observation; None with an ONNX file among them."""
        macs = [num_macs(t.net, self.obs_shape) for t in self.teachers if isinstance(t.net, nn.Module)]
        return sum(macs) if len(macs) == len(self.teachers) else None


def make_ensemble(teachers: Sequence[Teacher], weights: Weights) -> Teacher:
    """Returns several teachers as one, known by its members' hashes and the weights.

    Raises:
        ValueError: they score other actions or observations, or there is another number of weights.
    """
    net = Ensemble(teachers, weights)
    known_by = "\n".join([*(t.sha256 for t in teachers), repr(weights)])
    card: dict[str, Any] = {"members": [{"ref": t.ref, "sha256": t.sha256} for t in teachers], "weights": repr(weights)}
    games = {t.card["game"] for t in teachers if t.card.get("game")}
    if len(games) == 1:
        card["game"] = games.pop()
    return Teacher(
        net,
        "ENSEMBLE",
        teachers[0].path,
        hashlib.sha256(known_by.encode()).hexdigest(),
        card,
        "+".join(f"{t.ref}@{t.revision}" if t.revision else t.ref for t in teachers),
    )


def load_teachers(
    ref: str | Path = "auto",
    weights: str = "equal",
    *,
    game: str | None = None,
    trust_pickle: bool = False,
    measure: Callable[[Teacher], float] | None = None,
) -> Teacher:
    """Returns the teacher that a reference names, or an ensemble of those that `REF+REF...` names.

    Args:
        ref: as `load_teacher` takes it, or several of them with `+` between; an existing path is never split.
        weights: see `WEIGHTS_HELP`; `equal` for one teacher.
        game: the game to play.
        trust_pickle: as for `load_teacher`, for all of them.
        measure: returns the mean episodic return of a member of which none is reported, for weights by return.

    Raises:
        ValueError: as `load_teacher`; weights that are malformed, or not one for each teacher; a missing return.
        OSError: the Hub cannot be reached and its cache has no copy.
    """
    if isinstance(ref, Path) or "+" not in ref or Path(ref).exists():
        if weights != "equal":
            raise ValueError(f"{ref}: --teacher-weights {weights} is for several teachers; give REF+REF, or leave it")
        return load_teacher(ref, game=game, trust_pickle=trust_pickle)
    if not all(refs := ref.split("+")):
        raise ValueError(f"{ref}: a teacher is missing beside a +; give REF+REF")
    teachers = [load_teacher(r, game=game, trust_pickle=trust_pickle) for r in refs]
    return make_ensemble(teachers, _weights(weights, teachers, game, measure))


def _weights(
    text: str, teachers: Sequence[Teacher], game: str | None, measure: Callable[[Teacher], float] | None
) -> Weights:
    if text == "equal":
        return FixedWeights((1.0,) * len(teachers))
    if text == "confidence":
        return ConfidenceWeights()
    if text == "return":
        silent = [t.ref for t in teachers if t.reported_return is None]
        if silent and measure is None:
            raise ValueError(f"{', '.join(silent)}: no return is reported of it; give numbers as --teacher-weights")
        returns = [measure(t) if t.reported_return is None and measure else t.reported_return for t in teachers]
        random, _ = RANDOM_AND_HUMAN_SCORES.get(canonical_name(game), (0.0, 0.0)) if game else (0.0, 0.0)
        return ReturnWeights(tuple(float(r or 0.0) for r in returns), random)
    try:
        return FixedWeights(tuple(float(number) for number in text.split(",")))
    except ValueError as error:
        raise ValueError(
            f"--teacher-weights {text}: give equal, return, confidence, or numbers from 0 up such as 0.7,0.3"
        ) from error
