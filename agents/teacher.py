"""Teachers: SB3's PPO, A2C, DQN and QR-DQN agents and ONNX files, from wherever a reference points."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from policykd.agents.archive import read_archive, read_members
from policykd.agents.card import TeacherRecord
from policykd.agents.networks import MLP, Activations, ConvNet
from policykd.agents.rebuild import rebuild, rebuild_critic
from policykd.agents.references import TEACHER_HELP, Source, find_teacher
from policykd.agents.zoo import played_game
from policykd.io.files import BadFile

__all__ = ["TEACHER_HELP", "Algorithm", "Teacher", "load_teacher"]

Algorithm = Literal["PPO", "A2C", "DQN", "QRDQN", "ONNX", "ENSEMBLE"]
_OF_A_FILE = get_args(Algorithm)[:-1]


class Net(Protocol):
    """What scores actions: a network, or a session of ONNX Runtime."""

    @property
    def num_actions(self) -> int:
        """How many actions it scores."""
        ...

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """The shape of one observation."""
        ...

    def __call__(self, obs_BCHW: Tensor, /) -> Tensor:
        """Returns scores, float32 `(batch, num_actions)`."""
        ...

    def to(self, device: Any, /) -> Any:
        """Moves it to a device."""
        ...


def policy_temperature(algorithm: Algorithm) -> float:
    """Returns what scores are divided by to get a policy: 1 for logits, 0.01 for Q-values (Rusu et al., 2015)."""
    return 0.01 if algorithm in ("DQN", "QRDQN") else 1.0


@dataclass(frozen=True)
class Teacher:
    """A trained agent as a `Policy`, with where it came from."""

    net: Net
    algorithm: Algorithm
    path: Path
    """of its archive or file on this machine"""
    sha256: str
    """of the archive"""
    card: Mapping[str, Any] = field(default_factory=dict)
    """what is said beside the archive: the JSON card, the zoo's YAML, the Hub's results.json; or empty"""
    ref: str = ""
    """what `load_teacher` takes to find it again, such as `hub:sb3/dqn-PongNoFrameskip-v4`"""
    revision: str = ""
    """the commit on the Hub, empty elsewhere"""
    session: Net | None = None
    """`net` run by ONNX Runtime, if `policykd.export.compiled.compile_policy` made this teacher"""

    @property
    def num_actions(self) -> int:
        """How many actions it scores."""
        return self.net.num_actions

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """The shape of one observation."""
        return self.net.obs_shape

    @property
    def record(self) -> TeacherRecord:
        """Identity of the teacher, for the files of a run."""
        return TeacherRecord(
            ref=self.ref,
            sha256=self.sha256,
            revision=self.revision,
            algorithm=self.algorithm,
            file=self.path.name,
        )

    @property
    def temperature(self) -> float:
        """What its scores are divided by to get its policy."""
        return policy_temperature(self.algorithm)

    @property
    def reported_return(self) -> float | None:
        """The mean episodic return that its card, the Hub or the zoo's benchmark reports, or None."""
        protocol = self.card.get("protocols", {}).get("noop_sampled")
        reported = protocol["mean"] if protocol else self.card.get("reported_return")
        return None if reported is None else float(reported)

    @property
    def backend(self) -> str:
        """What computes its scores, with its version; another backend's differ in the last bits."""
        return str(getattr(self.session or self.net, "backend", f"torch {torch.__version__}"))

    def to(self, device: torch.device | str) -> "Teacher":
        """Moves its weights to a device and returns it."""
        self.net.to(device)
        if "critic" in self.__dict__:
            self.critic.to(device)
        return self

    @cached_property
    def critic(self) -> nn.Linear | ConvNet | MLP:
        """PPO's and A2C's value network, read from the archive when first asked for; it does not act.

        A linear layer on the last hidden activations of `net`, where actor and critic share them (SB3's CnnPolicy).

        Raises:
            ValueError: it has none; the archive is not what it was when the teacher was loaded.
        """
        if self.algorithm not in ("PPO", "A2C") or not isinstance(self.net, ConvNet | MLP):
            raise ValueError(
                f"{self.ref or self.path}: no critic, only SB3 archives of PPO and A2C that are read without"
                " --trust-pickle have one here; give another teacher"
            )
        archive = read_archive(self.path)
        if archive.sha256 != self.sha256:
            raise BadFile(f"{self.path}: changed since it was loaded; start again")
        critic = rebuild_critic(archive).eval().requires_grad_(False).to(next(self.net.parameters()).device)
        return critic.dense[-1] if _same_but_last(critic, self.net) else critic  # type: ignore[return-value]

    @torch.inference_mode()
    def values(self, obs_BCHW: Tensor, seen: Activations | None = None) -> Tensor:
        """Returns the states' values, float32 `(batch,)`: of PPO's or A2C's critic, or max_a Q of DQN and QR-DQN.

        Their unit is what the agent was trained on: discounted sums of rewards, clipped to [-1, 1] on Atari.

        Args:
            obs_BCHW: observations.
            seen: `net.activations` of them, if at hand: spares a pass of the network.

        Raises:
            ValueError: no critic and no Q-values.
        """
        if self.algorithm in ("DQN", "QRDQN"):
            return (self(obs_BCHW) if seen is None else seen.outputs_BA).amax(dim=-1)
        critic, net = self.critic, self.net
        if not isinstance(critic, nn.Linear):
            return critic(obs_BCHW).squeeze(-1)  # type: ignore[no-any-return]
        assert isinstance(net, ConvNet | MLP)
        return critic((seen or net.activations(obs_BCHW)).hidden_BF).squeeze(-1)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def __call__(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits (PPO, A2C) or Q-values (DQN, QR-DQN's mean), float32 `(batch, num_actions)`."""
        return (self.session or self.net)(obs_BCHW)


def load_teacher(ref: str | Path = "auto", *, game: str | None = None, trust_pickle: bool = False) -> Teacher:
    """Returns the agent that a reference names; nothing in its files is executed, unless `trust_pickle` allows it.

    Args:
        ref: see `TEACHER_HELP` or docs/teachers.md.
        game: the game to play; a teacher whose card or zoo files name another is refused.
        trust_pickle: let SB3 itself load the archive, which runs the code in it; for custom policies of your own.

    Raises:
        ValueError: malformed reference, or nothing where it points.
        BadFile: truncated, foreign or unsafe archive; another algorithm or game.
        OSError: the Hub cannot be reached and its cache has no copy.
    """
    source = find_teacher(ref, game=game)
    played = source.card.get("game")
    if game and played and played_game(played) != played_game(game):
        raise BadFile(
            f"{source.path}: this teacher plays {played_game(played)}, not {played_game(game)}; give another --teacher"
        )
    net, algorithm, sha256 = _read(source, trust_pickle=trust_pickle)
    return Teacher(net, algorithm, source.path, sha256, source.card, source.ref, source.revision)


def _read(source: Source, *, trust_pickle: bool) -> tuple[Net, Algorithm, str]:
    if source.path.suffix == ".onnx":
        return _read_onnx(source)
    if trust_pickle:
        from policykd.agents.trusted import load_with_sb3

        sha256, members = read_members(source.path)
        _check_hash(source, sha256)  # before any code in the file runs
        net, algorithm = load_with_sb3(source.path, members)
        return net.requires_grad_(False), algorithm, sha256
    archive = read_archive(source.path)
    _check_hash(source, archive.sha256)
    rebuilt, algorithm = rebuild(archive)
    return rebuilt.eval().requires_grad_(False), algorithm, archive.sha256


def _read_onnx(source: Source) -> tuple[Net, Algorithm, str]:
    from policykd.agents.onnx_policy import OnnxPolicy

    policy = OnnxPolicy(source.path)
    _check_hash(source, policy.sha256)
    algorithm = str(source.card.get("algorithm", "ONNX")).upper()
    if algorithm not in _OF_A_FILE:
        raise BadFile(f"{source.path}: its card's algorithm {algorithm} is none of {', '.join(_OF_A_FILE)}")
    return policy, cast(Algorithm, algorithm), policy.sha256


def _check_hash(source: Source, sha256: str) -> None:
    if "sha256" in source.card and source.card["sha256"] != sha256:
        raise BadFile(
            f"{source.path}: sha256 {sha256[:12]}... is not its card's {source.card['sha256'][:12]}...; get it again"
        )


def _same_but_last(one: ConvNet | MLP, other: ConvNet | MLP) -> bool:
    """Whether two networks have the same weights up to their last hidden activations."""
    last = f"dense.{len(one.dense) - 1}."
    states = [{n: t for n, t in net.state_dict().items() if not n.startswith(last)} for net in (one, other)]
    return (
        type(one) is type(other)
        and states[0].keys() == states[1].keys()
        and all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    )
