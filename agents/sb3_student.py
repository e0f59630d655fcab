"""A student as the policy of a Stable-Baselines3 agent, which continues to learn by reinforcement, and back.

SB3 divides frames by 255. A student has an input scaling of its own, without which a small network stays on a plateau
for long (docs/log.md). So the features extractor is the student's own network up to its last hidden layer, scaling
included, and SB3's `normalize_images` is off.
"""

import copy
import math
import warnings
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policykd.agents.networks import Design, FrameNet, UserNet
from policykd.agents.student import Shape, Student, make_net

try:
    from gymnasium import spaces
    from stable_baselines3 import A2C, DQN, PPO
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
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
        """Builds the network of a student's `Shape` with new weights; for `temperature` see `to_sb3`.

        Raises:
            ValueError: observations of another shape, or a student without a hidden layer.
        """
        if not hidden:
            raise ValueError("a student without a hidden layer has no features for SB3; make one with a dense layer")
        super().__init__(observation_space, hidden[-1])
        self.shape = Shape(tuple(widths), tuple(hidden), 0, observation_space.shape, design=design, rank=rank)
        self.temperature = temperature
        # The network of a student whose outputs are the last hidden layer.
        self.net = make_net(replace(self.shape, hidden=self.shape.hidden[:-1], num_actions=hidden[-1]))
        if observation_space.shape != self.net.obs_shape:
            raise ValueError(
                f"the environment's observations are {observation_space.shape}, the student's {self.net.obs_shape};"
                " give the environment that it was made for"
            )

    def forward(self, observations: Tensor) -> Tensor:
        """Returns features, float32 `(batch, hidden[-1])`, of SB3's observations: bytes as floats from 0 to 255."""
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

    PPO and A2C: the policy's logits are the student's. The critic is the student's value head on the shared features;
    without one it starts at zero, and training it also changes the shared features: lower SB3's `vf_coef`, or give
    `policy_kwargs={"share_features_extractor": False}`, where the critic's features start as a copy.

    DQN: Q-values are `temperature` times the student's logits. A student that was trained with a KL divergence knows
    Q-values only up to a constant per state, one trained by regression (`LogitMSE`) completely. SB3's DQN starts with
    random actions: give a low `exploration_initial_eps`.

    Args:
        student: its weights are copied.
        env: whatever SB3 takes; None for an agent that only plays and is saved (`buffer_size` 1).
        algorithm: a name, or a class of that kind, such as policykd's own or your own.
        temperature: factor from logits to Q-values; None takes the student's own, with which Q-values are the outputs
            of its network. 0.01 fits logits distilled from a DQN teacher at that temperature (Rusu et al., 2015).
        **kwargs: SB3's arguments for the algorithm, by keyword.

    Raises:
        ValueError: an unsupported algorithm, other observations or actions than the student's, an invalid temperature,
            or `policy_kwargs` that the student determines.
    """
    # The kind of policy decides what the student's outputs become: logits or Q-values.
    chosen: Any = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else algorithm
    kind = getattr(chosen, "policy_aliases", {}).get("MlpPolicy")
    if kind not in (ActorCriticPolicy, DQNPolicy):
        raise ValueError(f"{algorithm}: no policy that a student fits in; give {', '.join(ALGORITHMS)} or a subclass")
    if kind is ActorCriticPolicy and temperature not in (None, 1.0):
        raise ValueError(f"temperature {temperature} is for DQN; {chosen.__name__}'s outputs are logits: leave it out")
    if student.shape.module:
        raise ValueError(f"{student.shape.module}: your own module is not an SB3 policy; write a policy class for SB3")
    if temperature is None:
        temperature = student.shape.temperature if kind is DQNPolicy else 1.0
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, not {temperature}; 0.01 makes Q-values of logits")

    # What makes SB3 build a policy of the student's shape.
    shape = student.shape
    features = {"widths": shape.widths, "hidden": shape.hidden, "design": shape.design, "rank": shape.rank}
    ours: dict[str, Any] = {
        "net_arch": [],
        "normalize_images": False,
        "features_extractor_class": StudentFeatures,
        "features_extractor_kwargs": {**features, "temperature": temperature},
    }
    given = kwargs.pop("policy_kwargs", None) or {}
    if clash := sorted(ours.keys() & given.keys()):
        raise ValueError(f"policy_kwargs {', '.join(clash)} are the student's; leave them out")
    if kind is ActorCriticPolicy:
        ours["ortho_init"] = given.get("ortho_init", False)  # it fails on channels-last weights
    kwargs["policy_kwargs"] = {**given, **ours}

    if env is None:
        model = agent_without_env(chosen, "MlpPolicy", shape.obs_shape, shape.num_actions, **kwargs)
    else:
        model = chosen("MlpPolicy", env, **kwargs)
    if getattr(model.action_space, "n", None) != shape.num_actions:
        raise ValueError(
            f"the environment's actions are {model.action_space}, the student's {shape.num_actions}; give the"
            " environment that it was made for"
        )
    _copy_weights(student, model.policy, temperature)
    return model


@torch.no_grad()
def from_sb3(model: BaseAlgorithm, like: Student) -> Student:
    """Returns a student with the current weights of an SB3 agent that `to_sb3` made.

    Its logits correspond to those that `to_sb3` was given: a DQN's Q-values divided by the temperature given there. A
    value head gets the critic's weights; if no critic uses the student's features, it stays, with a warning.

    `like` is the student that the agent was made of, or one of the same shape; it is not changed.

    Raises:
        ValueError: not an agent of `to_sb3`, or one of another shape.
    """
    policy = model.policy
    extractor = getattr(policy.q_net if isinstance(policy, DQNPolicy) else policy, "features_extractor", None)
    if not isinstance(extractor, StudentFeatures):
        raise ValueError(f"this {type(model).__name__} was not made by to_sb3; give one whose policy is a student")
    head = _action_heads(policy)[0]
    found = replace(extractor.shape, num_actions=head.out_features)
    expected = replace(like.shape, value=False, temperature=1.0)
    if found != expected:
        raise ValueError(f"the agent's student has {found}, `like` has {expected}; give one of the same shape")

    # The extractor's weights as they are, the head's from Q-values back to the student's own units.
    student = copy.deepcopy(like)
    ratio = like.shape.temperature / extractor.temperature
    last = zip(_last_layer(student), head.parameters(), strict=True)
    student.net.load_state_dict({**extractor.net.state_dict(), **{name: weight * ratio for name, weight in last}})
    if student.value_head is not None:
        if isinstance(policy, ActorCriticPolicy) and policy.share_features_extractor:
            student.value_head.load_state_dict(policy.value_net.state_dict())
        else:
            warnings.warn("the student's value head stays: no critic uses the student's features", stacklevel=2)
    return student.eval()


def agent_without_env(
    algorithm: Any, policy: str, obs_shape: tuple[int, ...], num_actions: int, **kwargs: Any
) -> BaseAlgorithm:
    """Returns an SB3 agent that has spaces but no environment, as SB3's `load` does; it cannot learn."""
    kwargs |= {"policy": policy, "env": None, "_init_setup_model": False}
    if issubclass(algorithm, OffPolicyAlgorithm):
        kwargs.setdefault("buffer_size", 1)  # the default would allocate gigabytes
    model: BaseAlgorithm = algorithm(**kwargs)
    low, high, dtype = (0, 255, np.uint8) if len(obs_shape) == 3 else (-np.inf, np.inf, np.float32)
    model.observation_space = spaces.Box(low, high, obs_shape, dtype)
    model.action_space = spaces.Discrete(num_actions)
    model.n_envs = 1
    model._setup_model()
    return model


@torch.no_grad()
def _copy_weights(student: Student, policy: nn.Module, temperature: float) -> None:
    """Copies a student's weights into an SB3 policy in place, so that the optimizer still holds the same tensors."""
    last = _last_layer(student)
    features = {name: weight for name, weight in student.net.state_dict().items() if name not in last}
    for extractor in [module for module in policy.modules() if isinstance(module, StudentFeatures)]:
        extractor.net.load_state_dict(features)
    # Outputs of the student's network are temperature times its logits; the policy's are another multiple of them.
    for head in _action_heads(policy):
        for weight, source in zip(head.parameters(), last.values(), strict=True):
            weight.copy_(source * (temperature / student.shape.temperature))
    # Without a value head the critic starts at zero, not at random values that would push the shared features about.
    if isinstance(policy, ActorCriticPolicy):
        if student.value_head is not None:
            policy.value_net.load_state_dict(student.value_head.state_dict())
        else:
            for weight in policy.value_net.parameters():
                weight.zero_()


def _action_heads(policy: Any) -> list[nn.Linear]:
    """Returns the output layers of an SB3 policy, the acting one first."""
    if isinstance(policy, DQNPolicy):
        nets: list[Any] = [policy.q_net, policy.q_net_target]
        return [net.q_net[-1] for net in nets]
    return [policy.action_net]


def _last_layer(student: Student) -> dict[str, Tensor]:
    """Returns weight and bias of the student's output layer, by their names in the network's state dict."""
    assert not isinstance(student.net, UserNet)
    last = len(student.net.dense) - 1
    return {f"dense.{last}.{name}": weight for name, weight in student.net.dense[last].named_parameters()}
