"""Teachers: SB3's PPO, A2C, DQN and QR-DQN agents and ONNX files, loaded from whatever a reference names."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from policykd.agents.card import Card, TeacherRecord
from policykd.agents.networks import MLP, Activations, ConvNet
from policykd.agents.policy import PolicyNet, policy_temperature
from policykd.io.files import BadFile

if TYPE_CHECKING:
    from policykd.agents.references import Source

TEACHER_HELP = (
    "`auto` (the one bundled for the game, else hub:ppo), `bundled` or `bundled:ALGO`, an SB3 .zip or its"
    " unpacked folder, an rl-zoo folder (ALGO/ENV_1), an .onnx file, `hub:ALGO[@REVISION]` (the rl-zoo agent for the"
    " game), `hub:OWNER/NAME[@REVISION]`, or several joined by `+`; ALGO is ppo, a2c, dqn or qrdqn; no code in the file"
    " is executed"
)
WEIGHTS_HELP = (
    "weights of several teachers: `equal`, `return` (each teacher's reported return above random play), `confidence`"
    " (per state, the teachers of lower entropy count more), or numbers such as 0.7,0.3"
)

Algorithm = Literal["PPO", "A2C", "DQN", "QRDQN", "ONNX", "ENSEMBLE"]
_FILE_ALGORITHMS = get_args(Algorithm)[:-1]


@dataclass(frozen=True)
class Teacher:
    """A trained agent as a `Policy`, with its temperature and its origin."""

    net: PolicyNet
    algorithm: Algorithm
    path: Path
    """archive or file on this machine"""
    sha256: str
    """hash of the archive"""
    card: Card = field(default_factory=Card)
    """metadata from the JSON card next to the archive, the zoo's YAML and the Hub's results.json"""
    ref: str = ""
    """reference that `load_teacher` takes to find it again, such as `hub:sb3/dqn-PongNoFrameskip-v4`"""
    revision: str = ""
    """commit on the Hub, empty elsewhere"""
    session: PolicyNet | None = None
    """`net` run by ONNX Runtime, if `policykd.export.compiled.compile_policy` made this teacher"""

    @property
    def num_actions(self) -> int:
        """Number of outputs."""
        return self.net.num_actions

    @property
    def obs_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self.net.obs_shape

    @property
    def temperature(self) -> float:
        """Divisor of the outputs that gives the logits of the teacher's policy: 0.01 for Q-values, else 1."""
        return policy_temperature(self.algorithm)

    @property
    def record(self) -> TeacherRecord:
        """Identity of the teacher, for the files of a run."""
        where = {"ref": self.ref, "revision": self.revision, "file": self.path.name}
        return TeacherRecord(**where, sha256=self.sha256, algorithm=self.algorithm)

    @property
    def reported_return(self) -> float | None:
        """Mean episodic return from its card, the Hub or the zoo's benchmark, or None."""
        protocol = self.card.protocols.get("noop_sampled")
        return self.card.reported_return if protocol is None else protocol.mean

    @property
    def backend(self) -> str:
        """Library that computes the outputs, with its version; another one's differ in the last bits."""
        return str(getattr(self.session or self.net, "backend", f"torch {torch.__version__}"))

    def take_metrics(self) -> dict[str, float]:
        """Returns means over the states since the previous call, by name: those of an ensemble, none otherwise."""
        take: Callable[[], dict[str, float]] = getattr(self.net, "take_metrics", dict)
        return take()

    def to(self, device: torch.device | str) -> "Teacher":
        """Moves the weights to a device and returns the teacher."""
        self.net.to(device)
        if "critic" in self.__dict__:
            self.critic.to(device)
        return self

    @cached_property
    def critic(self) -> nn.Linear | ConvNet | MLP:
        """Value network of PPO or A2C, read from the archive when it is first used.

        A linear layer on the last hidden activations of `net`, where actor and critic share them (SB3's CnnPolicy).

        Raises:
            ValueError: no critic.
            BadFile: the archive changed since the teacher was loaded.
        """
        if self.algorithm not in ("PPO", "A2C") or not isinstance(self.net, ConvNet | MLP):
            raise ValueError(
                f"{self.ref or self.path}: no critic, only SB3 archives of PPO and A2C that are read without"
                " --trust-pickle have one here; give another teacher"
            )
        from policykd.agents.archive import read_archive
        from policykd.agents.rebuild import rebuild_critic

        # Most users never need the critic, so it is read on first use, from the same file.
        archive = read_archive(self.path)
        if archive.sha256 != self.sha256:
            raise BadFile(f"{self.path}: changed since it was loaded; start again")
        critic = rebuild_critic(archive).eval().requires_grad_(False).to(next(self.net.parameters()).device)
        return critic.dense[-1] if _share_features(critic, self.net) else critic  # type: ignore[return-value]

    @torch.inference_mode()
    def values(self, obs_BCHW: Tensor, activations: Activations | None = None) -> Tensor:
        """Returns the states' values, float32 `(batch,)`: PPO's or A2C's critic, max_a Q of DQN and QR-DQN.

        Their unit is the one of training: discounted sums of rewards, clipped to [-1, 1] on Atari.

        Args:
            obs_BCHW: observations.
            activations: `net.activations` of them if already computed, which saves a forward pass.

        Raises:
            ValueError: no critic and no Q-values.
        """
        # V(s) = max_a Q(s, a) for the greedy policy that these agents follow.
        if self.algorithm in ("DQN", "QRDQN"):
            return (self(obs_BCHW) if activations is None else activations.outputs_BA).amax(dim=-1)
        critic = self.critic
        if not isinstance(critic, nn.Linear):
            return critic(obs_BCHW).squeeze(-1)  # type: ignore[no-any-return]
        assert isinstance(self.net, ConvNet | MLP)
        hidden_BF = (activations or self.net.activations(obs_BCHW)).hidden_BF
        return critic(hidden_BF).squeeze(-1)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def __call__(self, obs_BCHW: Tensor) -> Tensor:
        """Returns logits (PPO, A2C) or Q-values (DQN, QR-DQN's mean), float32 `(batch, num_actions)`."""
        return (self.session or self.net)(obs_BCHW)


def load_teacher(ref: str | Path = "auto", *, game: str | None = None, trust_pickle: bool = False) -> Teacher:
    """Returns the agent that a reference names; no code in its files is executed unless `trust_pickle` is set.

    Args:
        ref: see `TEACHER_HELP` or docs/teachers.md.
        game: game to play; a teacher whose card or zoo files name another one is refused.
        trust_pickle: load the archive with SB3 itself, which executes code in it; for custom policies of your own.

    Raises:
        ValueError: malformed reference, or nothing found.
        BadFile: truncated, foreign or unsafe archive; another algorithm or game.
        OSError: the Hub cannot be reached and its cache has no copy.
    """
    from policykd.agents.references import find_teacher, played_game

    source = find_teacher(ref, game=game)
    trained_on = source.card.game
    # Other games can have the same number of actions, so shapes do not find this out.
    if game and trained_on and played_game(trained_on) != played_game(game):
        raise BadFile(
            f"{source.path}: this teacher plays {played_game(trained_on)}, not {played_game(game)}; give another"
            " --teacher"
        )
    net, algorithm, sha256 = _load(source, trust_pickle=trust_pickle)
    return Teacher(net, algorithm, source.path, sha256, source.card, source.ref, source.revision)


def load_teachers(
    ref: str | Path = "auto",
    weights: str = "equal",
    *,
    game: str | None = None,
    trust_pickle: bool = False,
    measure: Callable[[Teacher], float] | None = None,
) -> Teacher:
    """Returns the teacher that a reference names, or the ensemble that `REF+REF...` names.

    Args:
        ref: as `load_teacher` takes it, or several joined by `+`; an existing path is never split.
        weights: see `WEIGHTS_HELP`; `equal` for one teacher.
        game: game to play.
        trust_pickle: as for `load_teacher`, for every member.
        measure: returns a member's mean episodic return where none is reported, for weights by return.

    Raises:
        ValueError: as `load_teacher`; malformed weights, another number of weights, or an unknown return.
        OSError: the Hub cannot be reached and its cache has no copy.
    """
    if isinstance(ref, Path) or "+" not in ref or Path(ref).exists():
        if weights != "equal":
            raise ValueError(f"{ref}: --teacher-weights {weights} is for several teachers; give REF+REF, or leave it")
        return load_teacher(ref, game=game, trust_pickle=trust_pickle)
    # Each member has its own card, hash and game check.
    refs = ref.split("+")
    if not all(refs):
        raise ValueError(f"{ref}: no teacher before or after a +; give REF+REF")
    from policykd.agents.ensemble import make_ensemble, parse_weights

    teachers = [load_teacher(r, game=game, trust_pickle=trust_pickle) for r in refs]
    return make_ensemble(teachers, parse_weights(weights, teachers, game, measure))


def _load(source: "Source", *, trust_pickle: bool) -> tuple[PolicyNet, Algorithm, str]:
    """Returns network, algorithm and sha256; the hash is compared with the card's before any code could run."""
    # Each kind of file has a reader of its own, imported only for that kind.
    if source.path.suffix == ".onnx":
        from policykd.agents.onnx_policy import OnnxPolicy

        policy = OnnxPolicy(source.path)
        _check_hash(source, policy.sha256)
        # Outputs alone do not tell Q-values from logits: the card names the algorithm, and so the temperature.
        named = source.card.algorithm.upper() or "ONNX"
        if named not in _FILE_ALGORITHMS:
            raise BadFile(
                f"{source.path}: unknown algorithm {named!r} in its card; give one of {', '.join(_FILE_ALGORITHMS)}"
            )
        return policy, cast(Algorithm, named), policy.sha256
    from policykd.agents.archive import read_archive, read_members

    # The very bytes that were hashed are executed, not the file read again.
    if trust_pickle:
        from policykd.agents.trusted import load_with_sb3

        sha256, members = read_members(source.path)
        _check_hash(source, sha256)
        trusted, algorithm = load_with_sb3(source.path, members)
        return trusted.requires_grad_(False), algorithm, sha256
    from policykd.agents.rebuild import rebuild

    archive = read_archive(source.path)
    _check_hash(source, archive.sha256)
    net, algorithm = rebuild(archive)
    return net.eval().requires_grad_(False), algorithm, archive.sha256


def _check_hash(source: "Source", sha256: str) -> None:
    if (expected := source.card.sha256) not in ("", sha256):
        raise BadFile(f"{source.path}: sha256 {sha256[:12]}... is not its card's {expected[:12]}...; get it again")


def _share_features(critic: ConvNet | MLP, actor: ConvNet | MLP) -> bool:
    """Returns whether two networks have the same weights up to their last hidden activations."""
    last_layer = f"dense.{len(critic.dense) - 1}."
    ours = {name: t for name, t in actor.state_dict().items() if not name.startswith(last_layer)}
    theirs = {name: t for name, t in critic.state_dict().items() if not name.startswith(last_layer)}
    return (
        type(critic) is type(actor)
        and ours.keys() == theirs.keys()
        and all(torch.equal(t, theirs[name]) for name, t in ours.items())
    )
