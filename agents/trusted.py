"""SB3's own load, for archives with a policy class of the user's. It executes code in the file.

Only the two pickles that define the policy are executed (`policy_class`, `policy_kwargs`). The spaces are built from
the readable JSON, since those of archives before SB3 2.0 are pickles of `gym`, which cannot be installed with it any
more; schedules, buffers and last observations are not needed to act.
"""

import importlib
import io
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from policykd.agents.archive import Sb3Data, parse_data, text
from policykd.agents.policy import policy_temperature
from policykd.agents.rebuild import Sb3Algorithm
from policykd.io.files import BadFile
from policykd.io.typed import one_line

_LIBRARIES = ("stable_baselines3", "sb3_contrib")
_EXECUTED = ("policy_class", "policy_kwargs")
_SCHEDULES = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0, "train_freq": 4}
_SMALL_BUFFERS = {"n_envs": 1, "n_steps": 1, "buffer_size": 1, "optimize_memory_usage": False}


class Sb3PolicyNet(nn.Module):
    """The policy of an SB3 model, whatever its class, as a map from observations to logits or Q-values."""

    def __init__(
        self, policy: nn.Module, algorithm: Sb3Algorithm, obs_shape: tuple[int, ...], num_actions: int
    ) -> None:
        super().__init__()
        # A Q-network acts without its target network; an actor-critic policy acts as a whole.
        acting_part = {"DQN": "q_net", "QRDQN": "quantile_net"}.get(algorithm)
        self.net = getattr(policy, acting_part) if acting_part else policy
        self.algorithm = algorithm
        self.obs_shape = obs_shape
        self.num_actions = num_actions
        self.temperature = policy_temperature(algorithm)

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits or mean Q-values, float32 `(batch, num_actions)`, of frames or vectors as SB3 takes them."""
        net: Any = self.net
        if self.algorithm == "DQN":
            outputs_BA: Tensor = net(obs_BCHW)
        elif self.algorithm == "QRDQN":
            outputs_BA = net(obs_BCHW).mean(dim=1)
        else:
            outputs_BA = net.get_distribution(obs_BCHW).distribution.logits
        return outputs_BA.float()


def policy_of_model(model: Any) -> Sb3PolicyNet:
    """Returns the acting network of an SB3 model in memory; its weights are shared.

    Raises:
        ValueError: another algorithm, other spaces, or observations that `VecNormalize` has to scale.
    """
    names = {kind.__name__: kind for kind in type(model).__mro__ if kind.__module__.split(".")[0] in _LIBRARIES}
    algorithm = next((name for name in get_args(Sb3Algorithm) if name in names), None)
    if algorithm is None or not hasattr(model.action_space, "n") or not model.observation_space.shape:
        supported = ", ".join(get_args(Sb3Algorithm))
        raise ValueError(
            f"a {type(model).__name__} model with {model.observation_space} and {model.action_space} is not supported;"
            f" give one of {supported} with a Box as observations and Discrete actions"
        )
    if model.get_vec_normalize_env() is not None:
        raise ValueError(
            f"this {algorithm} model was trained with VecNormalize, whose statistics are not applied here; give a"
            " function that scales the observations and calls the policy"
        )
    net = Sb3PolicyNet(model.policy, algorithm, tuple(model.observation_space.shape), int(model.action_space.n))
    return net.eval()


def load_with_sb3(path: Path, members: Mapping[str, io.BytesIO]) -> tuple[Sb3PolicyNet, Sb3Algorithm]:
    """Loads an archive with SB3, after a warning on standard error that this executes code in it.

    Args:
        path: origin of the archive; not read again, so that what is executed is what was hashed.
        members: its `data` and `policy.pth`, see `read_members`.

    Raises:
        ValueError: SB3 is not installed.
        BadFile: SB3 cannot load it, or the policy has no discrete actions.
    """
    data = parse_data(path, members["data"].getvalue())
    algorithm = _algorithm(path, data)
    actor_class = _actor_class(path, algorithm)
    print(f"warning: {path}: loaded with SB3, which executes code in the file (--trust-pickle)", file=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # SB3 only warns and would continue with its default policy.
            warnings.filterwarnings("error", message="Could not deserialize")
            model = actor_class.load(_archive_of(members), device="cpu", custom_objects=_replacements(data))
        _remove_critic(model.policy)
        net = policy_of_model(model)
    except Exception as error:  # the file's code may raise anything
        raise BadFile(
            f"{path}: SB3 cannot load it ({type(error).__name__}: {one_line(str(error))}); its classes must be"
            " importable: put their module on PYTHONPATH"
        ) from error
    return net, algorithm


def _algorithm(path: Path, data: Sb3Data) -> Sb3Algorithm:
    """Returns the algorithm whose hyperparameters the archive has."""
    entries = data.entries
    if "exploration_fraction" in entries:
        module = text(data.entry("policy_class").get("__module__"))
        is_quantile = "n_quantiles" in entries or "qrdqn" in module or "n_quantiles" in data.entry("policy_kwargs")
        return "QRDQN" if is_quantile else "DQN"
    # TRPO has cg_damping, RecurrentPPO has LSTM states.
    if "gae_lambda" in entries and "cg_damping" not in entries and "_last_lstm_states" not in entries:
        return "PPO" if "clip_range" in entries else "A2C"
    raise BadFile(f"{path}: expected a PPO, A2C, DQN or QR-DQN archive, found another; use another teacher")


def _actor_class(path: Path, algorithm: Sb3Algorithm) -> Any:
    """Returns SB3's class of an algorithm, changed to load archives without an optimizer."""
    try:
        library = importlib.import_module("sb3_contrib" if algorithm == "QRDQN" else "stable_baselines3")
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: --trust-pickle needs SB3 ({error}); pip install 'policykd[sb3]'") from error
    return type(algorithm, (getattr(library, algorithm),), {"_get_torch_save_params": lambda self: (["policy"], [])})


def _replacements(data: Sb3Data) -> dict[str, object]:
    """Returns SB3's `custom_objects`: values that replace the archive's own entries, which are then not unpickled."""
    from gymnasium import spaces

    # Replacing an entry is what keeps SB3 from unpickling it.
    pickled = [name for name in data.entries if ":serialized:" in data.entry(name)]
    replacements: dict[str, object] = {name: None for name in pickled if name not in _EXECUTED}
    # A buffer as large as in training, or a schedule, costs memory and does not act.
    replacements |= {name: value for name, value in (_SCHEDULES | _SMALL_BUFFERS).items() if name in data.entries}
    if data.obs_shape and data.space_kind("observation_space") == "Box":
        low, high = (0, 255) if data.obs_dtype == "uint8" else (float("-inf"), float("inf"))
        dtype: Any = data.obs_dtype or "float32"
        replacements["observation_space"] = spaces.Box(low, high, data.obs_shape, dtype)
    if data.num_actions and data.space_kind("action_space") == "Discrete":
        replacements["action_space"] = spaces.Discrete(data.num_actions)
    return replacements


def _remove_critic(policy: Any) -> None:
    """Deletes the value network of an actor-critic policy, where it has SB3's names: it does not act."""
    for module in (policy, getattr(policy, "mlp_extractor", None)):
        for name in {"value_net", "vf_features_extractor"} & getattr(module, "_modules", {}).keys():
            delattr(module, name)


def _archive_of(members: Mapping[str, io.BytesIO]) -> io.BytesIO:
    """Returns an archive of these members alone."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.getbuffer())
    packed.seek(0)
    return packed
