"""The acting network of an SB3 agent, and its critic, rebuilt from the names and shapes of its tensors.

What the archive's readable JSON says beside them (spaces, scaling, activation, classes) must agree, or be what SB3
takes when nothing is said; what cannot be reproduced faithfully is refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policykd.agents.archive import Archive
from policykd.agents.networks import ATARI_OBS_SHAPE, MLP, ConvNet
from policykd.io.files import BadFile

Algorithm = Literal["PPO", "A2C", "DQN", "QRDQN"]

_KERNELS = ((8, 8), (4, 4), (3, 3))
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
_TRUST = "--trust-pickle loads it with SB3, if the file is your own"


def rebuild(archive: Archive) -> tuple[ConvNet | MLP, Algorithm]:
    """Returns the acting network that the archive describes, and what trained it.

    Raises:
        BadFile: not one of SB3's own CnnPolicy and MlpPolicy with discrete actions; one line, expected and found.
    """
    kwargs = _checked_kwargs(archive)
    algorithm, extractors, sequential = _family(archive)
    on_policy = algorithm in ("PPO", "A2C")
    dense = [*_layers(archive, sequential), *(["action_net."] if on_policy else [])]
    convolutions, dense = _with_extractor(archive, extractors, dense)
    _check_all_are_read(archive, [*convolutions, *dense])
    weights, biases = _dense_tensors(archive, dense)
    if algorithm == "QRDQN":
        weights[-1], biases[-1] = _mean_over_quantiles(archive, kwargs, weights[-1], biases[-1])
    expected = described_num_actions(archive.data)
    if expected not in (None, len(biases[-1])):
        raise BadFile(f"{archive.path}: expected {expected} actions as its `data` says, found {len(biases[-1])}")
    return _network(archive, kwargs, convolutions, weights, biases, nn.Tanh if on_policy else nn.ReLU), algorithm


def rebuild_critic(archive: Archive) -> ConvNet | MLP:
    """Returns the value network of a PPO or A2C archive: the acting network's kind, with one score, the value.

    Raises:
        BadFile: none is there, or it is not one of SB3's own; one line, expected and found.
    """
    kwargs, dense = _checked_kwargs(archive), [*_layers(archive, "mlp_extractor.value_net."), "value_net."]
    convolutions, dense = _with_extractor(archive, ("vf_features_extractor.", "features_extractor."), dense)
    weights, biases = _dense_tensors(archive, dense)
    if len(biases[-1]) != 1:
        raise BadFile(f"{archive.path}: value_net expected one output, found {len(biases[-1])}; {_TRUST}")
    return _network(archive, kwargs, convolutions, weights, biases, nn.Tanh)


def described_shape(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of an observation that an archive's readable attributes give, or None."""
    space = _entry(data, "observation_space")
    shape = space.get("_shape", space.get("shape"))
    if isinstance(shape, str):
        return tuple(int(n) for n in re.findall(r"\d{1,9}", shape))
    return tuple(shape) if isinstance(shape, list) and all(type(n) is int for n in shape) else None


def described_num_actions(data: Mapping[str, Any]) -> int | None:
    """Returns the number of discrete actions that an archive's readable attributes give, or None."""
    n = _entry(data, "action_space").get("n")
    return int(n) if isinstance(n, int | str) and re.fullmatch(r"[0-9]{1,9}", str(n)) else None


def described_kind(data: Mapping[str, Any], space: str) -> str | None:
    """Returns the class of a space, such as `Box`, or None."""
    found = re.search(r"(\w+)'>$", text(_entry(data, space).get(":type:")))
    return found[1] if found else None


def text(value: Any) -> str:
    """Returns a text as it is and anything else by its kind: the text of nested lists could be endless."""
    return value if isinstance(value, str) else f"a {type(value).__name__}"


def _entry(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    entry = data.get(name)
    return entry if isinstance(entry, dict) else {}


def _checked_kwargs(archive: Archive) -> Mapping[str, Any]:
    """Returns the readable policy_kwargs of a policy that is SB3's own on spaces that are read here."""
    data = archive.data
    for space, expected in (("observation_space", "Box"), ("action_space", "Discrete")):
        if (found := described_kind(data, space)) not in (None, expected):
            raise BadFile(f"{archive.path}: expected a {expected} as {space}, found {found}; use another teacher")
    kwargs = _entry(data, "policy_kwargs")
    module = text(_entry(data, "policy_class").get("__module__", _POLICIES[0]))
    extractor = text(kwargs.get("features_extractor_class", _EXTRACTORS[0]))
    if module not in _POLICIES:
        raise BadFile(f"{archive.path}: expected a policy of SB3, found one of {module!r:.80}; {_TRUST}")
    if extractor not in _EXTRACTORS:
        raise BadFile(f"{archive.path}: expected SB3's features extractor, found {extractor!r:.80}; {_TRUST}")
    return kwargs


def _family(archive: Archive) -> tuple[Algorithm, tuple[str, ...], str]:
    """Returns the algorithm, where its features extractor may be and where its dense layers are."""
    names, data = archive.tensors.keys(), archive.data
    if any(name.startswith("lstm_") for name in names):
        raise BadFile(f"{archive.path}: a recurrent policy; only SB3's CnnPolicy and MlpPolicy are read")
    if "action_net.weight" in names and "cg_damping" not in data:
        algorithm: Algorithm = "PPO" if "clip_range" in data else "A2C"
        # before SB3 1.7 there was one extractor; since then the actor's has its own name
        return algorithm, ("pi_features_extractor.", "features_extractor."), "mlp_extractor.policy_net."
    if any(n.startswith("q_net.q_net.") for n in names):
        return "DQN", ("q_net.features_extractor.",), "q_net.q_net."
    if any(n.startswith("quantile_net.quantile_net.") for n in names):
        return "QRDQN", ("quantile_net.features_extractor.",), "quantile_net.quantile_net."
    raise BadFile(
        f"{archive.path}: expected a PPO, A2C, DQN or QR-DQN policy, found tensors such as {next(iter(names))!r:.80}; "
        f"{_TRUST}"
    )


def _with_extractor(archive: Archive, extractors: Sequence[str], dense: list[str]) -> tuple[list[str], list[str]]:
    """Returns the convolutions of the first features extractor that is there, if any, and all dense layers."""
    extractor = next((p for p in extractors if f"{p}cnn.0.weight" in archive.tensors), None)
    if extractor is None:
        return [], dense
    return [f"{extractor}cnn.{i}." for i in (0, 2, 4)], [f"{extractor}linear.0.", *dense]


def _layers(archive: Archive, prefix: str) -> list[str]:
    """Returns the prefixes of a Sequential's dense layers: every second of its modules, activations between."""
    found = {n[len(prefix) :].split(".")[0] for n in archive.tensors if n.startswith(prefix)}
    numbers = sorted(found, key=lambda n: (len(n), n))
    if numbers != [str(2 * i) for i in range(len(numbers))]:
        raise BadFile(
            f"{archive.path}: expected dense layers {prefix}0, 2, 4..., found {', '.join(numbers)[:80]!r}; {_TRUST}"
        )
    return [f"{prefix}{n}." for n in numbers]


def _check_all_are_read(archive: Archive, layers: Sequence[str]) -> None:
    read = {f"{layer}{part}" for layer in layers for part in ("weight", "bias")}
    # SB3 saves the actor's or the shared extractor under its old name too
    again = ("features_extractor.",) if any(name.startswith("pi_features_extractor.") for name in read) else ()
    idle = (*_NOT_ACTING, *again)
    unread = [name for name in archive.tensors if name not in read and not name.startswith(idle)]
    if unread:
        raise BadFile(
            f"{archive.path}: expected only layers of SB3's CnnPolicy or MlpPolicy, found {unread[0]!r:.80}; {_TRUST}"
        )


def _tensor(archive: Archive, name: str, num_dimensions: int) -> Tensor:
    tensor = archive.tensors.get(name)
    if tensor is None or tensor.dim() != num_dimensions:
        found = "nothing" if tensor is None else tuple(tensor.shape)
        raise BadFile(f"{archive.path}: {name} expected in {num_dimensions} dimensions, found {found}; {_TRUST}")
    return tensor


def _dense_tensors(archive: Archive, layers: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the weights and biases of dense layers that fit each other."""
    weights = [_tensor(archive, f"{layer}weight", 2) for layer in layers]
    biases = [_tensor(archive, f"{layer}bias", 1) for layer in layers]
    inputs = [w.shape[1] for w in weights[1:]]
    for layer, weight, bias, width in zip(layers, weights, biases, [*inputs, None], strict=True):
        if len(weight) != len(bias) or width not in (None, len(weight)):
            found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise BadFile(f"{archive.path}: {layer} expected weight and bias of {width or len(bias)}, found {found}")
    if len({t.data_ptr() for t in [*weights, *biases]}) < 2 * len(layers):
        raise BadFile(f"{archive.path}: unsafe archive, two layers share their numbers; do not use it")
    return weights, biases


def _mean_over_quantiles(
    archive: Archive, kwargs: Mapping[str, Any], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the last layer that gives mean Q-values: the mean of linear layers is a linear layer."""
    num_actions = described_num_actions(archive.data)
    num_quantiles = kwargs.get("n_quantiles", archive.data.get("n_quantiles", 200))
    if num_actions is None or type(num_quantiles) is not int or num_actions * num_quantiles != len(bias):
        raise BadFile(
            f"{archive.path}: expected n_quantiles times the number of actions ({num_actions}), as its `data` says, "
            f"found {len(bias)} outputs; {_TRUST}"
        )
    return (
        weight.reshape(num_quantiles, num_actions, -1).mean(dim=0),
        bias.reshape(num_quantiles, num_actions).mean(dim=0),
    )


def _activation(archive: Archive, kwargs: Mapping[str, Any], default: type[nn.Module]) -> type[nn.Module]:
    """Returns the activation that the archive's readable policy_kwargs name, or SB3's default."""
    if "activation_fn" not in kwargs:
        return default
    found = text(kwargs["activation_fn"])
    named = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", found)
    if named is None or named[1] not in _ACTIVATIONS:
        raise BadFile(
            f"{archive.path}: expected an activation of {', '.join(_ACTIVATIONS)}, found {found!r:.80}; {_TRUST}"
        )
    return _ACTIVATIONS[named[1]]


def _network(
    archive: Archive,
    kwargs: Mapping[str, Any],
    convolutions: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    default: type[nn.Module],
) -> ConvNet | MLP:
    activation = _activation(archive, kwargs, default)
    if convolutions:
        return _conv_net(archive, kwargs, convolutions, weights, biases, activation)
    return _mlp(archive, weights, biases, activation)


def _conv_net(
    archive: Archive,
    kwargs: Mapping[str, Any],
    convolutions: Sequence[str],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: type[nn.Module],
) -> ConvNet:
    kernels = [_tensor(archive, f"{layer}weight", 4) for layer in convolutions]
    shape, kind = described_shape(archive.data), text(_entry(archive.data, "observation_space").get("dtype", "uint8"))
    if shape not in (None, ATARI_OBS_SHAPE) or kind != "uint8":
        raise BadFile(
            f"{archive.path}: expected observations uint8 {ATARI_OBS_SHAPE}, found {kind!r:.20} {shape}; {_TRUST}"
        )
    if tuple(tuple(k.shape[2:]) for k in kernels) != _KERNELS or kernels[0].shape[1] != ATARI_OBS_SHAPE[0]:
        shapes = ", ".join(str(tuple(k.shape)) for k in kernels)
        raise BadFile(f"{archive.path}: expected SB3's NatureCNN on 4 stacked 84x84 frames, found {shapes}; {_TRUST}")
    if len(weights) > 2 and activation is not nn.ReLU:
        raise BadFile(
            f"{archive.path}: expected ReLU between the dense layers after the convolutions, found "
            f"{activation.__name__}; {_TRUST}"
        )
    with torch.device("meta"):
        net = ConvNet([len(k) for k in kernels], [len(b) for b in biases[:-1]], len(biases[-1]))
    scale = 1.0 if kwargs.get("normalize_images") is False else 255.0
    state = {"centre": torch.zeros(()), "scale": torch.tensor(scale)}
    for i, (layer, kernel) in enumerate(zip(convolutions, kernels, strict=True), start=1):
        state |= {f"conv{i}.weight": kernel, f"conv{i}.bias": _tensor(archive, f"{layer}bias", 1)}
    _fill(archive, net, state, weights, biases)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _mlp(archive: Archive, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: type[nn.Module]) -> MLP:
    shape, found = described_shape(archive.data), weights[0].shape[1]
    if shape not in (None, (found,)):
        raise BadFile(f"{archive.path}: expected observations {shape} as its `data` says, found {(found,)}; {_TRUST}")
    with torch.device("meta"):
        net = MLP(found, [len(b) for b in biases[:-1]], len(biases[-1]), activation=activation)
    _fill(archive, net, {}, weights, biases)
    return net


def _fill(
    archive: Archive, net: nn.Module, state: dict[str, Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> None:
    """Makes the tensors the network's own; nothing is copied."""
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        state |= {f"dense.{i}.weight": weight, f"dense.{i}.bias": bias}
    for name, expected in net.state_dict().items():
        if state[name].shape != expected.shape:
            raise BadFile(
                f"{archive.path}: {name} expected {tuple(expected.shape)}, found {tuple(state[name].shape)}; {_TRUST}"
            )
    net.load_state_dict(state, assign=True)
