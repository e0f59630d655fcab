"""The acting network of an SB3 agent, and its critic, rebuilt from the names and shapes of its tensors.

What the archive's readable JSON describes (spaces, scaling, activation, classes) must agree with the tensors; where it
is silent, SB3's default is assumed. What cannot be reproduced exactly is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from policykd.agents.archive import Archive, text
from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, ConvNet
from policykd.io.files import BadFile

Sb3Algorithm = Literal["PPO", "A2C", "DQN", "QRDQN"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "Tanh": nn.Tanh, "ELU": nn.ELU, "LeakyReLU": nn.LeakyReLU}
_EXTRACTORS = tuple(
    f"<class 'stable_baselines3.common.torch_layers.{name}'>" for name in ("NatureCNN", "FlattenExtractor")
)
_POLICIES = ("stable_baselines3.common.policies", "stable_baselines3.dqn.policies", "sb3_contrib.qrdqn.policies")
_NOT_ACTING = (
    "value_net.",
    "mlp_extractor.value_net.",
    "vf_features_extractor.",
    "q_net_target.",
    "quantile_net_target.",
)
_DEFAULT_QUANTILES = 200
_TRUST = "--trust-pickle loads it with SB3, if the file is your own"


@dataclass(frozen=True)
class _Layers:
    """Parameters of a network: kernels and their biases, then the dense layers."""

    kernels: tuple[tuple[Tensor, Tensor], ...]
    dense: tuple[tuple[Tensor, Tensor], ...]

    @property
    def widths(self) -> list[int]:
        """Outputs of the dense layers."""
        return [len(bias) for _, bias in self.dense]


def rebuild(archive: Archive) -> tuple[ConvNet | MLP, Sb3Algorithm]:
    """Returns the acting network that the archive describes, and the algorithm that trained it.

    Raises:
        BadFile: not one of SB3's own CnnPolicy and MlpPolicy with discrete actions.
    """
    kwargs = _checked_kwargs(archive)
    algorithm, extractors, sequential = _family(archive)
    is_on_policy = algorithm in ("PPO", "A2C")
    dense = _dense_names(archive, sequential)
    if is_on_policy:
        dense.append("action_net.")
    # A tensor that is not read but might act would make another policy of it.
    convolutions, dense = _with_extractor(archive, extractors, dense)
    _check_all_are_read(archive, [*convolutions, *dense])
    layers = _layers(archive, convolutions, dense)
    if algorithm == "QRDQN":
        layers = _mean_over_quantiles(archive, kwargs, layers)
    expected = archive.data.num_actions
    if expected not in (None, layers.widths[-1]):
        raise _unexpected(archive, f"{expected} actions, as in its `data`", layers.widths[-1])
    return _network(archive, kwargs, layers, default=nn.Tanh if is_on_policy else nn.ReLU), algorithm


def rebuild_critic(archive: Archive) -> ConvNet | MLP:
    """Returns the value network of a PPO or A2C archive: of the acting network's kind, with one output.

    Raises:
        BadFile: no critic, or not one of SB3's own.
    """
    kwargs = _checked_kwargs(archive)
    dense = [*_dense_names(archive, "mlp_extractor.value_net."), "value_net."]
    convolutions, dense = _with_extractor(archive, ("vf_features_extractor.", "features_extractor."), dense)
    layers = _layers(archive, convolutions, dense)
    if layers.widths[-1] != 1:
        raise _unexpected(archive, "one output of value_net", layers.widths[-1])
    return _network(archive, kwargs, layers, default=nn.Tanh)


def _unexpected(archive: Archive, expected: str, found: object) -> BadFile:
    return BadFile(f"{archive.path}: expected {expected}, found {found!s:.200}; {_TRUST}")


def _checked_kwargs(archive: Archive) -> Mapping[str, JsonValue]:
    """Returns the readable policy_kwargs of one of SB3's own policies on supported spaces."""
    data = archive.data
    for space, expected in (("observation_space", "Box"), ("action_space", "Discrete")):
        if (found := data.space_kind(space)) not in (None, expected):
            raise BadFile(f"{archive.path}: expected a {expected} as {space}, found {found}; use another teacher")
    kwargs = data.entry("policy_kwargs")
    module = text(data.entry("policy_class").get("__module__", _POLICIES[0]))
    extractor = text(kwargs.get("features_extractor_class", _EXTRACTORS[0]))
    if module not in _POLICIES:
        raise _unexpected(archive, "a policy of SB3", f"one of {module!r}")
    if extractor not in _EXTRACTORS:
        raise _unexpected(archive, "SB3's features extractor", repr(extractor))
    return kwargs


def _family(archive: Archive) -> tuple[Sb3Algorithm, tuple[str, ...], str]:
    """Returns the algorithm, the possible prefixes of its features extractor and the prefix of its dense layers."""
    names = archive.tensors.keys()
    entries = archive.data.entries
    if any(name.startswith("lstm_") for name in names):
        raise BadFile(f"{archive.path}: a recurrent policy; only SB3's CnnPolicy and MlpPolicy are supported")
    if "action_net.weight" in names and "cg_damping" not in entries:  # which TRPO has
        algorithm: Sb3Algorithm = "PPO" if "clip_range" in entries else "A2C"
        # before SB3 1.7 there was one extractor; since then the actor's has its own name
        return algorithm, ("pi_features_extractor.", "features_extractor."), "mlp_extractor.policy_net."
    if any(n.startswith("q_net.q_net.") for n in names):
        return "DQN", ("q_net.features_extractor.",), "q_net.q_net."
    if any(n.startswith("quantile_net.quantile_net.") for n in names):
        return "QRDQN", ("quantile_net.features_extractor.",), "quantile_net.quantile_net."
    raise _unexpected(archive, "a PPO, A2C, DQN or QR-DQN policy", f"tensors such as {next(iter(names))!r}")


def _with_extractor(archive: Archive, extractors: Sequence[str], dense: list[str]) -> tuple[list[str], list[str]]:
    """Returns the convolutions of the first features extractor that exists, if any, and all dense layers."""
    extractor = next((p for p in extractors if f"{p}cnn.0.weight" in archive.tensors), None)
    if extractor is None:
        return [], dense
    return [f"{extractor}cnn.{i}." for i in (0, 2, 4)], [f"{extractor}linear.0.", *dense]


def _dense_names(archive: Archive, prefix: str) -> list[str]:
    """Returns the prefixes of a Sequential's dense layers: every second module, with activations between them."""
    found = {n[len(prefix) :].split(".")[0] for n in archive.tensors if n.startswith(prefix)}
    numbers = sorted(found, key=lambda n: (len(n), n))
    if numbers != [str(2 * i) for i in range(len(numbers))]:
        raise _unexpected(archive, f"dense layers {prefix}0, 2, 4...", repr(", ".join(numbers)))
    return [f"{prefix}{n}." for n in numbers]


def _check_all_are_read(archive: Archive, layers: Sequence[str]) -> None:
    """Raises BadFile for a tensor that may act and would be ignored."""
    read = {f"{layer}{part}" for layer in layers for part in ("weight", "bias")}
    # SB3 saves the actor's or the shared extractor under its old name too
    copies = ("features_extractor.",) if any(name.startswith("pi_features_extractor.") for name in read) else ()
    ignored = (*_NOT_ACTING, *copies)
    unread = [name for name in archive.tensors if name not in read and not name.startswith(ignored)]
    if unread:
        raise _unexpected(archive, "only layers of SB3's CnnPolicy or MlpPolicy", repr(unread[0]))


def _tensor(archive: Archive, name: str, num_dimensions: int) -> Tensor:
    tensor = archive.tensors.get(name)
    if tensor is None or tensor.dim() != num_dimensions:
        found = "nothing" if tensor is None else tuple(tensor.shape)
        raise _unexpected(archive, f"{name} in {num_dimensions} dimensions", found)
    return tensor


def _layers(archive: Archive, convolutions: Sequence[str], dense: Sequence[str]) -> _Layers:
    """Returns the parameters of layers by their prefixes; the dense ones share no numbers."""
    kernels = [(_tensor(archive, f"{p}weight", 4), _tensor(archive, f"{p}bias", 1)) for p in convolutions]
    linear = [(_tensor(archive, f"{p}weight", 2), _tensor(archive, f"{p}bias", 1)) for p in dense]
    # A small file could otherwise name one tensor hundreds of times, and every copy of the network would be large.
    if len({t.data_ptr() for pair in linear for t in pair}) < 2 * len(linear):
        raise BadFile(f"{archive.path}: unsafe archive, two layers share their numbers; do not use it")
    return _Layers(tuple(kernels), tuple(linear))


def _mean_over_quantiles(archive: Archive, kwargs: Mapping[str, JsonValue], layers: _Layers) -> _Layers:
    """Returns the layers with a last one that gives mean Q-values: the mean of linear layers is a linear layer."""
    num_actions = archive.data.num_actions
    num_quantiles = kwargs.get("n_quantiles", archive.data.entries.get("n_quantiles", _DEFAULT_QUANTILES))
    # sb3-contrib lays the outputs out as (quantiles, actions).
    *hidden, (weight, bias) = layers.dense
    found = {len(weight), len(bias)}
    if num_actions is None or type(num_quantiles) is not int or found != {num_actions * num_quantiles}:
        expected = f"n_quantiles times the number of actions ({num_actions}), as in its `data`"
        raise _unexpected(archive, expected, f"{len(bias)} outputs")
    mean = (
        weight.reshape(num_quantiles, num_actions, -1).mean(dim=0),
        bias.reshape(num_quantiles, num_actions).mean(dim=0),
    )
    return _Layers(layers.kernels, (*hidden, mean))


def _network(
    archive: Archive, kwargs: Mapping[str, JsonValue], layers: _Layers, *, default: type[nn.Module]
) -> ConvNet | MLP:
    """Returns the network of these layers; nothing is copied. `default` is the activation of SB3's policy class."""
    activation = _activation(archive, kwargs, default)
    net: ConvNet | MLP
    if layers.kernels:
        net, state = _conv_net(archive, kwargs, layers, activation)
    else:
        state = {}
        obs_size = layers.dense[0][0].shape[1]
        if archive.data.obs_shape not in (None, (obs_size,)):
            raise _unexpected(archive, f"observations {archive.data.obs_shape}, as in its `data`", (obs_size,))
        with torch.device("meta"):
            net = MLP(obs_size, layers.widths[:-1], layers.widths[-1], activation=activation)
    for i, (weight, bias) in enumerate(layers.dense):
        state |= {f"dense.{i}.weight": weight, f"dense.{i}.bias": bias}
    # The network's own shapes are the last check: layers that do not fit each other, or another kernel than SB3's.
    for name, expected in net.state_dict().items():
        if state[name].shape != expected.shape:
            raise _unexpected(archive, f"{name} of {tuple(expected.shape)}", tuple(state[name].shape))
    net.load_state_dict(state, assign=True)
    return net.to(memory_format=torch.channels_last) if layers.kernels else net  # type: ignore[call-overload]


def _activation(archive: Archive, kwargs: Mapping[str, JsonValue], default: type[nn.Module]) -> type[nn.Module]:
    """Returns the activation that the archive's readable policy_kwargs name, or SB3's default."""
    # An activation is a class, so SB3 pickles it; its readable text names it.
    if "activation_fn" not in kwargs:
        return default
    found = text(kwargs["activation_fn"])
    named = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", found)
    if named is None or named[1] not in _ACTIVATIONS:
        raise _unexpected(archive, f"an activation of {', '.join(_ACTIVATIONS)}", repr(found))
    return _ACTIVATIONS[named[1]]


def _conv_net(
    archive: Archive, kwargs: Mapping[str, JsonValue], layers: _Layers, activation: type[nn.Module]
) -> tuple[ConvNet, dict[str, Tensor]]:
    """Returns SB3's NatureCNN without memory for its weights, and the tensors before its dense layers."""
    shape = archive.data.obs_shape
    dtype = archive.data.obs_dtype or "uint8"
    if shape not in (None, ATARI_OBS_SHAPE) or dtype != "uint8":
        raise _unexpected(archive, f"observations uint8 {ATARI_OBS_SHAPE}", f"{dtype!r:.20} {shape}")
    if len(layers.dense) > 2 and activation is not nn.ReLU:
        expected = "ReLU between the dense layers after the convolutions"
        raise _unexpected(archive, expected, activation.__name__)
    # Without memory for weights: the tensors of the archive become the network's own.
    with torch.device("meta"):
        net = ConvNet([len(kernel) for kernel, _ in layers.kernels], layers.widths[:-1], layers.widths[-1])
    # SB3 divides frames by 255 unless policy_kwargs turn it off.
    scale = 1.0 if kwargs.get("normalize_images") is False else 255.0
    state = {"centre": torch.zeros(()), "scale": torch.tensor(scale)}
    for i, (kernel, bias) in enumerate(layers.kernels, start=1):
        state |= {f"conv{i}.weight": kernel, f"conv{i}.bias": bias}
    return net, state
