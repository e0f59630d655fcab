"""A student as the policy of a Stable-Baselines3 agent, which goes on learning by reinforcement, and back.

SB3 divides frames by 255; a student has an input scaling of its own, without which a small network sits on a plateau
(docs/log.md). So the features extractor is the student's own network up to its last hidden layer, scaling included, and
SB3's `normalize_images` is off.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policykd.agents.networks import Design, FrameNet, Net, UserNet
from policykd.agents.student import Shape, Student, make_net

try:
    from gymnasium import spaces
    from stable_baselines3 import A2C, DQN, PPO
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.dqn.policies import DQNPolicy
except ModuleNotFoundError as error:
    raise ValueError(f"a student in SB3 needs SB3 ({error}); pip install 'policykd[sb3]'") from error

AlgorithmName = Literal["PPO", "A2C", "DQN"]
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"PPO": PPO, "A2C": A2C, "DQN": DQN}


class StudentFeatures(BaseFeaturesExtractor):
    """A student's network up to its last hidden layer, as SB3's features extractor; needs `normalize_images=False`."""

    def __init__(
        self,
        observation_space: spaces.Box,
        widths: tuple[int, ...],
        hidden: tuple[int, ...],
        *,
        temperature: float = 1.0,
        design: Design = "nature",
        rank: int = 0,
    ) -> None:
        """Builds it with new weights.

        Args:
            observation_space: of stacks `(4, 84, 84)`, uint8, or of vectors.
            widths: as in a student's `Shape`.
            hidden: likewise; not empty.
            temperature: the policy's outputs divided by it are not these but the student's scores; see `to_sb3`.
            design: as in a student's `Shape`.
            rank: likewise.

        Raises:
            ValueError: observations that such a student does not see, or a student without a hidden layer.
        """
        if not hidden:
            raise ValueError("a student without a hidden layer has no features for SB3; make one with a dense layer")
        super().__init__(observation_space, hidden[-1])
        self.widths, self.hidden, self.temperature = tuple(widths), tuple(hidden), temperature
        self.design, self.rank = design, rank
        *inner, last = hidden
        self.net = make_net(Shape(self.widths, tuple(inner), last, observation_space.shape, design=design, rank=rank))
        if observation_space.shape != self.net.obs_shape:
            raise ValueError(
                f"the environment's observations are {observation_space.shape}, the student's {self.net.obs_shape};"
                " give the environment that it was made for"
            )

    def forward(self, observations: Tensor) -> Tensor:
        """Returns features, float32 `(batch, hidden[-1])`, of what SB3 hands over: bytes as floats from 0 to 255."""
        obs = observations.to(torch.uint8) if isinstance(self.net, FrameNet) else observations
        return F.relu(self.net(obs))


def to_sb3(
    student: Student,
    env: Any = None,
    algorithm: AlgorithmName | type[BaseAlgorithm] = "PPO",
    *,
    temperature: float | None = None,
    **kwargs: Any,
) -> BaseAlgorithm:
    """Returns an SB3 agent whose policy is the student, to train further with `learn` or to save.

    PPO and A2C: the policy's logits are the student's scores. The critic is the student's value head on the shared
    features; without one it starts at zero, and what it then learns also moves the shared features: lower SB3's
    `vf_coef`, or give `policy_kwargs={"share_features_extractor": False}`, where the critic starts as a copy.

    DQN: Q-values are `temperature` times the student's scores, in the target network too. A student that was fitted by
    a KL divergence knows Q-values up to a constant for each state only, one that was regressed (`ScoreMSE`) knows them
    whole. SB3's DQN begins with random play unless told otherwise: give a low `exploration_initial_eps`.

    Args:
        student: stays as it is; weights are copied.
        env: what SB3 takes: a VecEnv such as `SB3VecEnv`, an environment or its id, frames first or last; None for an
            agent that only plays and is saved, on the spaces of policykd's own environments (`buffer_size` 1).
        algorithm: a name, or a class of that kind, such as policykd's own or your own.
        temperature: of a DQN; by default the student's own, so that Q-values are what its network gives. 0.01 makes
            Q-values of what was distilled from a DQN teacher at that temperature (Rusu et al., 2015).
        **kwargs: SB3's, for the algorithm, by keyword.

    Raises:
        ValueError: another kind of algorithm, observations or number of actions, a temperature that does not fit, or
            `policy_kwargs` that are the student's.
    """
    chosen = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else algorithm
    kind = getattr(chosen, "policy_aliases", {}).get("MlpPolicy")
    if chosen is None or kind not in (ActorCriticPolicy, DQNPolicy):
        raise ValueError(
            f"{algorithm} has no policy that a student fits in; give {', '.join(ALGORITHMS)} or a subclass"
        )
    if kind is ActorCriticPolicy and temperature not in (None, 1.0):
        raise ValueError(
            f"temperature {temperature} is a DQN's; {chosen.__name__}'s logits are the scores: leave it out"
        )
    if student.shape.module:
        raise ValueError(f"{student.shape.module}: a module of your own is no SB3 policy; write SB3 a policy class")
    if temperature is None:
        temperature = student.shape.temperature if kind is DQNPolicy else 1.0
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, not {temperature}; 0.01 makes Q-values of scores")
    policy_kwargs = _policy_kwargs(student, temperature, kwargs.get("policy_kwargs") or {})
    if kind is ActorCriticPolicy:
        policy_kwargs = {"ortho_init": False, **policy_kwargs}  # it cannot view weights that lie channels-last
    arguments = {**kwargs, "policy_kwargs": policy_kwargs}
    model = _without_env(chosen, student, arguments) if env is None else _made(chosen, env, arguments)
    num_actions = student.shape.num_actions
    if getattr(model.action_space, "n", None) != num_actions:
        raise ValueError(
            f"the environment's actions are {model.action_space}, the student scores {num_actions}; give the"
            " environment that it was made for"
        )
    _load(model.policy, student, temperature)
    return model


@torch.no_grad()
def from_sb3(model: BaseAlgorithm, like: Student) -> Student:
    """Returns a student with the weights of an SB3 agent that `to_sb3` made: what it has learned since.

    Its scores are those that `to_sb3` started from, a DQN's Q-values divided by the temperature given there. A value
    head gets the critic's weights; where there is no critic on the student's features, a warning says that it stays.

    Args:
        model: trained further, or loaded from its `.zip`.
        like: the student that it was made of, or one of the same shape; stays as it is.

    Raises:
        ValueError: not an agent of `to_sb3`, or one of another shape.
    """
    policy = model.policy
    extractor = getattr(policy.q_net if isinstance(policy, DQNPolicy) else policy, "features_extractor", None)
    if not isinstance(extractor, StudentFeatures):
        raise ValueError(f"this {type(model).__name__} was not made by to_sb3; give one whose policy is a student")
    head, shape = _heads(policy)[0], like.shape
    found = *_said(extractor), head.out_features
    if found != (expected := (*_said(shape), shape.num_actions)):
        words = "convolutions {}, dense layers {}, design {}, rank {} and {} actions"
        raise ValueError(
            f"this {type(model).__name__} has {words.format(*found)}, `like` {words.format(*expected)}; give one of the"
            " same shape"
        )
    student, ratio = copy.deepcopy(like), like.shape.temperature / extractor.temperature
    last = {name: w * ratio for name, w in zip(_last_layer(student.net), head.parameters(), strict=True)}
    student.net.load_state_dict({**extractor.net.state_dict(), **last})
    if student.value_head is not None:
        if isinstance(policy, ActorCriticPolicy) and policy.share_features_extractor:
            student.value_head.load_state_dict(policy.value_net.state_dict())
        else:
            warnings.warn(
                "the student's value head stays as it was: the agent has no critic on its features", stacklevel=2
            )
    return student.eval()


def _policy_kwargs(student: Student, temperature: float, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what makes SB3 build a policy of the student's shape, with what else a user wants of it.

    Raises:
        ValueError: the user wants another shape.
    """
    names = ("widths", "hidden", "design", "rank")
    features = {**dict(zip(names, _said(student.shape), strict=True)), "temperature": temperature}
    ours = {"net_arch": [], "normalize_images": False}
    ours |= {"features_extractor_class": StudentFeatures, "features_extractor_kwargs": features}
    if clash := sorted(ours.keys() & given.keys()):
        raise ValueError(f"policy_kwargs {', '.join(clash)} are the student's; leave them out")
    return {**given, **ours}


def _made(algorithm: Any, env: Any, arguments: Mapping[str, Any]) -> BaseAlgorithm:
    model: BaseAlgorithm = algorithm("MlpPolicy", env, **arguments)
    return model


def _without_env(algorithm: Any, student: Student, arguments: Mapping[str, Any]) -> BaseAlgorithm:
    """Returns an agent that has spaces but no environment, as SB3's `load` does."""
    little = {"buffer_size": 1} if issubclass(algorithm, DQN) else {}
    model = _made(algorithm, None, {**little, **arguments, "_init_setup_model": False})
    low, high, dtype = (0, 255, np.uint8) if isinstance(student.net, FrameNet) else (-np.inf, np.inf, np.float32)
    model.observation_space = spaces.Box(low, high, student.shape.obs_shape, dtype)
    model.action_space = spaces.Discrete(student.shape.num_actions)
    model.n_envs = 1
    model._setup_model()
    return model


@torch.no_grad()
def _load(policy: nn.Module, student: Student, temperature: float) -> None:
    """Copies a student's weights into an SB3 policy in place: the optimizer holds the same tensors as before."""
    last = _last_layer(student.net)
    features = {name: t for name, t in student.net.state_dict().items() if name not in last}
    for extractor in [m for m in policy.modules() if isinstance(m, StudentFeatures)]:
        extractor.net.load_state_dict(features)
    for head in _heads(policy):
        for weight, source in zip(head.parameters(), last.values(), strict=True):
            weight.copy_(source * (temperature / student.shape.temperature))
    if isinstance(policy, ActorCriticPolicy):
        if student.value_head is not None:
            policy.value_net.load_state_dict(student.value_head.state_dict())
        else:
            for weight in policy.value_net.parameters():
                weight.zero_()


def _heads(policy: Any) -> list[nn.Linear]:
    """Returns the layers of an SB3 policy that score actions, the acting one first."""
    if isinstance(policy, DQNPolicy):
        nets: Any = policy.q_net, policy.q_net_target
        return [net.q_net[-1] for net in nets]
    head: nn.Linear = policy.action_net
    return [head]


def _said(shape: Shape | StudentFeatures) -> tuple[object, ...]:
    """Returns what the network up to its last hidden layer is."""
    return shape.widths, shape.hidden, shape.design, shape.rank


def _last_layer(net: Net) -> dict[str, Tensor]:
    """Returns weight and bias of the layer that scores actions, by their names in the network's state dict."""
    assert not isinstance(net, UserNet)
    last = len(net.dense) - 1
    return {f"dense.{last}.{name}": weight for name, weight in net.dense[last].named_parameters()}
