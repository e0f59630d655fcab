"""Teachers: SB3 PPO, A2C and DQN agents rebuilt from the tensors of their archives."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policykd.agents.archive import Archive, read_archive
from policykd.agents.networks import MLP, ConvNet
from policykd.envs.games import canonical_name

PRETRAINED = Path(__file__).parent / "pretrained"
_KERNELS = ((8, 8), (4, 4), (3, 3))


@dataclass(frozen=True)
class Teacher:
    """A trained agent as a `Policy`, with where it came from."""

    net: ConvNet | MLP
    algorithm: Literal["PPO", "A2C", "DQN"]
    path: Path
    sha256: str
    """of the archive"""
    card: Mapping[str, Any] = field(default_factory=dict)
    """the JSON beside the archive, or empty"""

    @property
    def num_actions(self) -> int:
        """How many actions it scores."""
        return self.net.num_actions

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """The shape of one observation."""
        return self.net.obs_shape

    @property
    def temperature(self) -> float:
        """What its scores are divided by to get its policy: 1 for logits, 0.01 for Q-values (Rusu et al., 2015)."""
        return 0.01 if self.algorithm == "DQN" else 1.0

    def to(self, device: torch.device | str) -> "Teacher":
        """Moves its weights to a device and returns it."""
        self.net.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits (PPO, A2C) or Q-values (DQN), float32 `(batch, num_actions)`."""
        scores_BA: Tensor = self.net(obs_BCHW)
        return scores_BA


def load_teacher(ref: str | Path = "bundled", *, game: str | None = None) -> Teacher:
    """Returns the agent of an SB3 archive, or the one bundled for a game; nothing in the file is executed.

    Args:
        ref: the path of an SB3 `.zip` archive, or `bundled`.
        game: the game to play; a teacher whose card names another is refused.

    Raises:
        ValueError: missing, truncated, foreign or unsafe archive, another algorithm, another game.
    """
    path = _bundled(game) if str(ref) == "bundled" else Path(ref)
    archive = read_archive(path)
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text()) if card_path.is_file() else {}
        _check_card(card)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{card_path}: the teacher's card cannot be read ({error}); mend or remove it") from error
    if "sha256" in card and card["sha256"] != archive.sha256:
        raise ValueError(
            f"{path}: sha256 {archive.sha256[:12]}... is not its card's {card['sha256'][:12]}...; get it again"
        )
    if game and "game" in card and canonical_name(card["game"]) != canonical_name(game):
        raise ValueError(
            f"{path}: this teacher plays {card['game']}, not {canonical_name(game)}; give another --teacher"
        )
    net, algorithm = _rebuild(archive)
    return Teacher(net.eval().requires_grad_(False), algorithm, path, archive.sha256, card)


def _check_card(card: Any) -> None:
    """Raises ValueError, TypeError or KeyError for a card that does not say what a card says."""
    if not isinstance(card, dict) or not all(isinstance(card.get(k, ""), str) for k in ("game", "sha256")):
        raise ValueError("it is not an object with the texts `game` and `sha256`")
    if "protocols" in card and "sha256" not in card:
        raise ValueError("it has results but no sha256 of the archive that they are of")
    for name, protocol in dict(card.get("protocols", {})).items():
        if not protocol["returns"] or len(protocol["interval"]) != 2:
            raise ValueError(f"its protocol {name!r} has no returns")
        float(protocol["mean"])


def _bundled(game: str | None) -> Path:
    if game is None:
        raise ValueError("which bundled teacher? name its game, or give the path of an SB3 .zip archive")
    found = sorted(PRETRAINED.glob(f"*-{canonical_name(game)}.zip"))
    if not found:
        have = sorted({p.stem.split("-", 1)[1] for p in PRETRAINED.glob("*.zip")})
        raise ValueError(
            f"no teacher is bundled for {canonical_name(game)}, only for {', '.join(have)}; give --teacher FILE.zip"
        )
    return found[-1]


def _rebuild(archive: Archive) -> tuple[ConvNet | MLP, Literal["PPO", "A2C", "DQN"]]:
    """Returns the acting network that the tensors' names and shapes describe."""
    names = archive.tensors.keys()
    if any(name.startswith("lstm_") for name in names):
        raise ValueError(f"{archive.path}: a recurrent policy; only SB3's CnnPolicy and MlpPolicy are read")
    if "action_net.weight" in names:
        algorithm: Literal["PPO", "A2C", "DQN"] = "PPO" if "clip_range" in archive.data else "A2C"
        prefixes: tuple[str, ...] = ("pi_features_extractor.", "features_extractor.")
        dense = [*_layers(archive, "mlp_extractor.policy_net."), "action_net."]
    elif any(n.startswith("q_net.q_net.") for n in names):
        algorithm, prefixes = "DQN", ("q_net.features_extractor.",)
        dense = _layers(archive, "q_net.q_net.")
    else:
        raise ValueError(
            f"{archive.path}: holds no PPO, A2C or DQN policy (its tensors start with {next(iter(names), None)!r})"
        )
    extractor = next((p for p in prefixes if f"{p}cnn.0.weight" in names), None)
    if extractor:
        convolutions = [f"{extractor}cnn.{i}." for i in (0, 2, 4)]
        dense = [f"{extractor}linear.0.", *dense]
        return _fill_conv_net(archive, convolutions, dense), algorithm
    return _fill_mlp(archive, dense, _activation(archive, nn.ReLU if algorithm == "DQN" else nn.Tanh)), algorithm


def _activation(archive: Archive, default: type[nn.Module]) -> type[nn.Module]:
    """Returns the activation that the archive's readable policy_kwargs name, or SB3's default."""
    kwargs = archive.data.get("policy_kwargs")
    named = str(kwargs["activation_fn"]) if isinstance(kwargs, dict) and "activation_fn" in kwargs else ""
    known: dict[str, type[nn.Module]] = {".ReLU": nn.ReLU, ".Tanh": nn.Tanh, ".ELU": nn.ELU, ".LeakyReLU": nn.LeakyReLU}
    found = [layer for name, layer in known.items() if name in named]
    if named and not found:
        raise ValueError(
            f"{archive.path}: its activation {named} is not one of {', '.join(known)}; use another teacher"
        )
    return found[0] if found else default


def _layers(archive: Archive, prefix: str) -> list[str]:
    numbers = {int(n[len(prefix) :].split(".")[0]) for n in archive.tensors if n.startswith(prefix)}
    return [f"{prefix}{i}." for i in sorted(numbers)]


def _fill_conv_net(archive: Archive, convolutions: Sequence[str], dense: Sequence[str]) -> ConvNet:
    kernels = [_weight(archive, layer, 4) for layer in convolutions]
    if tuple(tuple(k.shape[2:]) for k in kernels) != _KERNELS or kernels[0].shape[1] != 4:
        shapes = ", ".join(str(tuple(k.shape)) for k in kernels)
        raise ValueError(f"{archive.path}: its convolutions {shapes} are not SB3's NatureCNN on 4 stacked 84x84 frames")
    if len(dense) > 2:
        raise ValueError(
            f"{archive.path}: a custom net_arch of {len(dense)} dense layers; only SB3's default CnnPolicy is read"
        )
    sizes = [_weight(archive, layer, 2).shape[0] for layer in dense]
    net = ConvNet([k.shape[0] for k in kernels], sizes[:-1], sizes[-1])
    targets: list[nn.Module] = [net.conv1, net.conv2, net.conv3, *net.dense]
    _fill(archive, [*convolutions, *dense], targets)
    return net


def _fill_mlp(archive: Archive, dense: Sequence[str], activation: type[nn.Module]) -> MLP:
    weights = [_weight(archive, layer, 2) for layer in dense]
    net = MLP(weights[0].shape[1], [w.shape[0] for w in weights[:-1]], weights[-1].shape[0], activation=activation)
    _fill(archive, dense, list(net.dense))
    return net


def _weight(archive: Archive, layer: str, num_dimensions: int) -> Tensor:
    weight = archive.tensors.get(f"{layer}weight")
    if weight is None or weight.dim() != num_dimensions:
        found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise ValueError(f"{archive.path}: {layer}weight {found}; not an SB3 CnnPolicy or MlpPolicy")
    return weight


def _fill(archive: Archive, layers: Sequence[str], targets: Sequence[nn.Module]) -> None:
    for layer, target in zip(layers, targets, strict=True):
        for name, parameter in target.named_parameters():
            tensor = archive.tensors.get(f"{layer}{name}")
            if tensor is None or tensor.shape != parameter.shape:
                found = "nothing" if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{archive.path}: {layer}{name} expected {tuple(parameter.shape)}, found {found}")
            parameter.data.copy_(tensor)
