"""SB3's own load, for archives whose policy is a class of their own. It executes code in the file.

Only the two pickles that make a policy what it is are executed (`policy_class`, `policy_kwargs`). The spaces are built
from the readable JSON, since those of archives before SB3 2.0 are pickles of `gym`, which no longer installs beside
it; schedules, buffers and last observations are not needed to act.
"""

import importlib
import io
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from policykd.agents.archive import parse_data
from policykd.agents.rebuild import Algorithm, described_kind, described_num_actions, described_shape, text
from policykd.io.files import BadFile
from policykd.io.signals import interruptible

_EXECUTED = ("policy_class", "policy_kwargs")
_SMALL = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0, "train_freq": 4}
_LITTLE_MEMORY = {"n_envs": 1, "n_steps": 1, "buffer_size": 1, "optimize_memory_usage": False}


class Sb3Scores(nn.Module):
    """The policy of an SB3 model, whatever its class, as a map from observations to scores."""

    def __init__(self, policy: nn.Module, algorithm: Algorithm, obs_shape: tuple[int, ...], num_actions: int) -> None:
        super().__init__()
        acting = {"DQN": "q_net", "QRDQN": "quantile_net"}.get(algorithm)
        self.net = getattr(policy, acting) if acting else policy
        self.algorithm, self.obs_shape, self.num_actions = algorithm, obs_shape, num_actions

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits or mean Q-values, float32 `(batch, num_actions)`, of frames or vectors as SB3 takes them."""
        net: Any = self.net
        if self.algorithm == "DQN":
            scores_BA: Tensor = net(obs_BCHW)
        elif self.algorithm == "QRDQN":
            scores_BA = net(obs_BCHW).mean(dim=1)
        else:
            scores_BA = net.get_distribution(obs_BCHW).distribution.logits
        return scores_BA.float()


def load_with_sb3(path: Path, members: Mapping[str, io.BytesIO]) -> tuple[Sb3Scores, Algorithm]:
    """Loads an archive with SB3, and says on standard error that this executes code in it.

    Args:
        path: where it came from; not read again, so that what is executed is what was hashed.
        members: its `data` and `policy.pth`, see `read_members`.

    Raises:
        ValueError: SB3 is missing; one line.
        BadFile: SB3 cannot load it, or the policy does not score discrete actions; one line.
    """
    data = parse_data(path, members["data"].getvalue())
    algorithm = _algorithm(path, data)
    actor_class = _actor_class(path, algorithm)
    print(f"warning: {path}: loaded with SB3, which executes code in the file (--trust-pickle)", file=sys.stderr)
    try:
        with interruptible(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Could not deserialize")  # SB3 would go on with the default
            model = actor_class.load(_acting_part(members), device="cpu", custom_objects=_instead(data))
        _drop_critic(model.policy)
        net = Sb3Scores(model.policy, algorithm, tuple(model.observation_space.shape), int(model.action_space.n))
    except Exception as error:  # the file's code may raise anything
        reason = (str(error).splitlines() or [""])[0][:160]
        raise BadFile(
            f"{path}: SB3 cannot load it ({type(error).__name__}: {reason}); its classes must be importable: put their "
            "module on PYTHONPATH"
        ) from error
    return net.eval(), algorithm


def _algorithm(path: Path, data: Mapping[str, Any]) -> Algorithm:
    kwargs, policy = data.get("policy_kwargs"), data.get("policy_class")
    module = text(policy.get("__module__")) if isinstance(policy, dict) else ""
    if "exploration_fraction" in data:
        told = "n_quantiles" in data or "qrdqn" in module or (isinstance(kwargs, dict) and "n_quantiles" in kwargs)
        return "QRDQN" if told else "DQN"
    if "gae_lambda" in data and "cg_damping" not in data and "_last_lstm_states" not in data:
        return "PPO" if "clip_range" in data else "A2C"
    raise BadFile(f"{path}: expected a PPO, A2C, DQN or QR-DQN archive, found another; use another teacher")


def _actor_class(path: Path, algorithm: Algorithm) -> Any:
    """Returns SB3's class of an algorithm, content with an archive that holds no optimizer."""
    try:
        library = importlib.import_module("sb3_contrib" if algorithm == "QRDQN" else "stable_baselines3")
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: --trust-pickle needs SB3 ({error}); pip install 'policykd[sb3]'") from error
    return type(algorithm, (getattr(library, algorithm),), {"_get_torch_save_params": lambda self: (["policy"], [])})


def _instead(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what SB3 is to take instead of the archive's own entries."""
    from gymnasium import spaces

    pickles = [name for name, entry in data.items() if isinstance(entry, dict) and ":serialized:" in entry]
    instead: dict[str, Any] = dict.fromkeys(name for name in pickles if name not in _EXECUTED)
    instead |= {name: value for name, value in (_SMALL | _LITTLE_MEMORY).items() if name in data}
    shape, num_actions = described_shape(data), described_num_actions(data)
    if shape and described_kind(data, "observation_space") == "Box":
        space = data["observation_space"]
        low, high = (0, 255) if space.get("dtype") == "uint8" else (float("-inf"), float("inf"))
        instead["observation_space"] = spaces.Box(low, high, shape, space.get("dtype", "float32"))
    if num_actions and described_kind(data, "action_space") == "Discrete":
        instead["action_space"] = spaces.Discrete(num_actions)
    return instead


def _drop_critic(policy: Any) -> None:
    """Takes the value network out of an actor-critic policy, where it has SB3's names: it does not act."""
    for module in (policy, getattr(policy, "mlp_extractor", None)):
        for name in {"value_net", "vf_features_extractor"} & getattr(module, "_modules", {}).keys():
            delattr(module, name)


def _acting_part(members: Mapping[str, io.BytesIO]) -> io.BytesIO:
    """Returns an archive of these members: one without an optimizer."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.getbuffer())
    packed.seek(0)
    return packed
