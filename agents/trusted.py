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

from policykd.agents.archive import read_data
from policykd.agents.rebuild import Algorithm, described_kind, described_num_actions, described_shape, text

_EXECUTED = ("policy_class", "policy_kwargs")
_SMALL = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0, "train_freq": 4}
_LITTLE_MEMORY = {"n_envs": 1, "n_steps": 1, "buffer_size": 1, "optimize_memory_usage": False}


class Sb3Scores(nn.Module):
    """The policy of an SB3 model, whatever its class, as a map from observations to scores."""

    def __init__(self, policy: nn.Module, algorithm: Algorithm, obs_shape: tuple[int, ...], num_actions: int) -> None:
        super().__init__()
        self.policy, self.algorithm = policy, algorithm
        self.obs_shape, self.num_actions = obs_shape, num_actions

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits or mean Q-values, float32 `(batch, num_actions)`, of frames or vectors as SB3 takes them."""
        policy: Any = self.policy
        if self.algorithm == "DQN":
            scores_BA: Tensor = policy.q_net(obs_BCHW)
        elif self.algorithm == "QRDQN":
            scores_BA = policy.quantile_net(obs_BCHW).mean(dim=1)
        else:
            scores_BA = policy.get_distribution(obs_BCHW).distribution.logits
        return scores_BA.float()


def load_with_sb3(path: str | Path) -> tuple[Sb3Scores, Algorithm]:
    """Loads an archive with SB3, and says on standard error that this executes code in it.

    Raises:
        ValueError: SB3 cannot load it, or the policy does not score discrete actions; one line.
    """
    path = Path(path)
    data = read_data(path)
    algorithm = _algorithm(path, data)
    print(f"warning: {path}: loaded with SB3, which executes code in the file (--trust-pickle)", file=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Could not deserialize")  # SB3 would go on with the default
            model = _actor_class(algorithm).load(_acting_part(path), device="cpu", custom_objects=_instead(data))
        net = Sb3Scores(model.policy, algorithm, tuple(model.observation_space.shape), int(model.action_space.n))
    except Exception as error:  # the file's code may raise anything
        reason = (str(error).splitlines() or [""])[0][:160]
        raise ValueError(
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
    raise ValueError(f"{path}: expected a PPO, A2C, DQN or QR-DQN archive, found another; use another teacher")


def _actor_class(algorithm: Algorithm) -> Any:
    """Returns SB3's class of an algorithm, content with an archive that holds no optimizer."""
    library = importlib.import_module("sb3_contrib" if algorithm == "QRDQN" else "stable_baselines3")
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


def _acting_part(path: Path) -> io.BytesIO:
    """Returns the archive, zipped or not, without its optimizer."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for member in ("data", "policy.pth"):
            if path.is_dir():
                archive.write(path / member, member)
            else:
                with zipfile.ZipFile(path) as whole:
                    archive.writestr(member, whole.read(member))
    packed.seek(0)
    return packed
