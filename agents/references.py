"""Grammar of `--teacher REF`: where bundled, local and Hub teachers are found, and the metadata next to them.

RL Baselines3 Zoo writes an agent's environment, preprocessing and return next to its archive.
"""

import difflib
import re
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from policykd.agents.card import MAX_CARD_BYTES, Card, Return
from policykd.envs.games import canonical_name
from policykd.io.files import BadFile
from policykd.io.typed import one_line, read_bounded, read_json

PRETRAINED = Path(__file__).parent / "pretrained"
ALGORITHMS = ("ppo", "a2c", "dqn", "qrdqn")
"""in the order in which `bundled` tries them"""

# Names and revisions that the Hub accepts; neither can contain a path out of the cache's folder.
_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"(?!.*(?:\.\.|//))[A-Za-z0-9_](?:[\w./-]*[A-Za-z0-9_-])?"

_MAX_ZOO_BYTES = 1 << 14
BENCHMARK: dict[tuple[str, str], float] = {
    ("PPO", "Asteroids"): 2156.0,
    ("PPO", "BeamRider"): 3397.0,
    ("PPO", "Breakout"): 398.0,
    ("PPO", "Enduro"): 996.0,
    ("PPO", "MsPacman"): 1754.0,
    ("PPO", "Pong"): 20.99,
    ("PPO", "Qbert"): 15627.0,
    ("PPO", "RoadRunner"): 40681.0,
    ("PPO", "Seaquest"): 1784.0,
    ("PPO", "SpaceInvaders"): 960.0,
    ("A2C", "Breakout"): 280.0,
    ("A2C", "Enduro"): 0.0,
    ("A2C", "Pong"): 17.29,
    ("DQN", "Breakout"): 358.0,
    ("DQN", "Enduro"): 831.0,
    ("DQN", "MsPacman"): 2683.0,
    ("DQN", "Pong"): 20.6,
    ("DQN", "Qbert"): 9497.0,
    ("DQN", "Seaquest"): 2000.0,
    ("QRDQN", "BeamRider"): 17123.0,
    ("QRDQN", "Breakout"): 394.0,
    ("QRDQN", "Enduro"): 3231.0,
    ("QRDQN", "Pong"): 20.49,
    ("QRDQN", "Seaquest"): 2558.0,
}
"""(algorithm, game) -> mean episodic return of the zoo's agents, unclipped, actions sampled (its benchmark.md)"""

_KNOWN_KWARGS = {"full_action_space": False, "repeat_action_probability": 0.0, "frameskip": 1, "obs_type": "rgb"}
"""env_kwargs with the values that policykd's environments have anyway"""
_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"
_SHORT = reprlib.Repr()  # aliases in YAML can make the repr of a small file endless
_SHORT.maxstring = 100


@dataclass(frozen=True)
class Source:
    """Location of a teacher's archive, with the metadata found next to it."""

    ref: str
    """canonical, without the revision; `load_teacher` takes it again"""
    path: Path
    revision: str = ""
    """commit on the Hub"""
    card: Card = field(default_factory=Card)


def find_teacher(ref: str | Path, *, game: str | None = None) -> Source:
    """Returns the location that a reference names; downloads it from the Hub if necessary.

    Args:
        ref: as in `policykd.agents.teacher.TEACHER_HELP`; a `Path` is always a local file or folder.
        game: game to play, required by `auto`, `bundled` and `hub:ALGO`.

    Raises:
        ValueError: malformed reference, or nothing found.
        BadFile: not a teacher, or an invalid card.
        OSError: the Hub cannot be reached.
    """
    kind, colon, rest = ("", "", "") if isinstance(ref, Path) else ref.partition(":")
    # `auto` prefers what needs no network.
    if kind == "auto" and not colon:
        if game and not any(_bundled_archive(algorithm, game).is_file() for algorithm in ALGORITHMS):
            return _on_hub("hub:ppo", game)
        return _bundled("", game)
    if kind == "bundled" and (rest or not colon):
        return _bundled(rest, game)
    if kind == "hub" and colon:
        return _on_hub(str(ref), game)
    return _local(str(ref), Path(ref))


def _bundled_archive(algorithm: str, game: str) -> Path:
    return PRETRAINED / f"{algorithm}-{canonical_name(game)}.zip"


def _bundled(algorithm: str, game: str | None) -> Source:
    if algorithm and algorithm not in ALGORITHMS:
        raise ValueError(f"bundled:{algorithm}: unknown algorithm; give one of {', '.join(ALGORITHMS)}")
    if game is None:
        raise ValueError("which bundled teacher? give its game, or the path of an SB3 .zip archive")
    for name in (algorithm,) if algorithm else ALGORITHMS:
        if (path := _bundled_archive(name, game)).is_file():
            return Source(f"bundled:{name}", path, card=_card_of(path))
    available = ", ".join(sorted(path.stem for path in PRETRAINED.glob("*.zip")))
    raise ValueError(
        f"no bundled {algorithm.upper() or 'teacher'} for {canonical_name(game)}, only {available};"
        f" give --teacher FILE.zip or hub:{algorithm or 'ppo'}"
    )


def _on_hub(ref: str, game: str | None) -> Source:
    from policykd.agents import hub

    repo, at, revision = ref.removeprefix("hub:").partition("@")
    if at and not re.fullmatch(_REVISION, revision, re.ASCII):
        raise ValueError(
            f"{ref!r}: invalid revision {revision!r}; give a branch, a tag or a commit, as in hub:dqn@main"
        )
    # A word is short for the zoo's agent of the game.
    if "/" not in repo:
        if repo not in ALGORITHMS:
            algorithms = ", ".join(ALGORITHMS)
            raise ValueError(f"{ref}: unknown algorithm; give one of {algorithms}, or a repository, hub:OWNER/NAME")
        if game is None:
            raise ValueError(f"{ref}: which game? give it, or a repository, as in hub:sb3/dqn-PongNoFrameskip-v4")
        repo = f"sb3/{repo}-{canonical_name(game)}NoFrameskip-v4"
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo, re.ASCII):
        raise ValueError(f"{ref!r}: invalid repository {repo!r}; give OWNER/NAME, as in hub:sb3/dqn-PongNoFrameskip-v4")
    snapshot = hub.fetch(repo, revision)
    # The benchmark is of the zoo's own agents, which only the organisation sb3 publishes.
    card = read_zoo_files(repo.split("/")[1], snapshot.folder, is_benchmarked=repo.startswith("sb3/"))
    return Source(f"hub:{repo}", snapshot.archive, snapshot.revision, card)


def _local(ref: str, path: Path) -> Source:
    if not path.exists():
        raise ValueError(f"{ref}: {_not_found(ref)}")
    if not path.is_dir():
        zoo = path.with_suffix("")  # the zoo writes ENV.zip and ENV/config.yml
        card = read_zoo_files("", zoo) if (zoo / "config.yml").is_file() else Card()
        return Source(ref, path, card=_card_of(path).with_defaults(card))
    if (path / "policy.pth").is_file():
        return Source(ref, path, card=_card_of(path))
    # A zoo folder may also hold best_model.zip and checkpoints, which have no folder of their name.
    archives = [file for file in sorted(path.glob("*.zip")) if file.with_suffix("").is_dir()]
    if len(archives) != 1:
        found = ", ".join(file.name for file in archives) or "none"
        raise BadFile(
            f"{ref}: expected policy.pth and data, or an rl-zoo agent's ENV.zip and its folder ENV, found {found};"
            " give ALGO/ENV_1 or the .zip itself"
        )
    (archive,) = archives
    card = read_zoo_files(archive.stem, archive.with_suffix(""), path)
    return Source(ref, archive, card=_card_of(archive).with_defaults(card))


def _card_of(path: Path) -> Card:
    """Returns the content of FILE.json next to FILE.zip, or an empty card without one."""
    file = path.with_name(f"{path.name}.json") if path.is_dir() else path.with_suffix(".json")
    if not file.exists():
        return Card()
    return read_json(Card, file, next_step="fix or remove the teacher's card", max_bytes=MAX_CARD_BYTES)


def _not_found(ref: str) -> str:
    """Returns the reason and the next step for a reference that names nothing, with the likely typing error."""
    if "://" in ref:
        repo = "/".join(ref.split("://")[1].split("/")[1:3])
        return f"web addresses are not supported; give hub:{repo or 'OWNER/NAME'}"
    known = ["auto", "bundled", *(f"{kind}:{name}" for kind in ("bundled", "hub") for name in ALGORITHMS)]
    if near := difflib.get_close_matches(ref.lower(), known, n=2):
        return f"file or folder not found; did you mean {' or '.join(near)}?"
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:", ref):
        kind = ref.split(":")[0]
        return f"unknown kind {kind!r}; give auto, bundled, hub:... or the path of a file or folder"
    if re.fullmatch(f"{_NAME}/{_NAME}", ref, re.ASCII) and not Path(ref).parent.exists():
        return f"file or folder not found; did you mean hub:{ref}?"
    return "file or folder not found; give the path of an SB3 .zip archive, bundled, or hub:ALGO"


@dataclass(frozen=True)
class _Results:
    """Content of results.json."""

    mean_reward: Return | None = None


def read_zoo_files(name: str, *folders: Path, is_benchmarked: bool = True) -> Card:
    """Returns the card of a zoo agent: game, algorithm and reported return, as far as they are known.

    Args:
        name: such as `dqn-PongNoFrameskip-v4`; used where `args.yml` is missing.
        folders: searched in order for `args.yml`, `config.yml`, `env_kwargs.yml` and `results.json`.
        is_benchmarked: whether `BENCHMARK` is of this agent; without results.json its return is the reported one.

    Raises:
        BadFile: a damaged or unsafe file, or preprocessing that policykd does not have.
    """
    named = re.fullmatch(r"(ppo|a2c|dqn|qrdqn)-(.+)", name)
    # args.yml is what the training command got; the name is a convention of the Hub.
    args = _read_yaml(_find("args.yml", folders))
    algorithm = args.get("algo") or (named[1] if named else "")
    env_id = args.get("env") or (named[2] if named else "")
    if not (isinstance(algorithm, str) and isinstance(env_id, str)):
        raise BadFile(f"args.yml of {name or folders[0]}: algo and env are not text; fix or remove the file")
    if config_path := _find("config.yml", folders):
        _check_preprocessing(config_path, env_id)
    # render_mode changes nothing that an agent sees.
    kwargs = _read_yaml(kwargs_path := _find("env_kwargs.yml", folders))
    known = {**_KNOWN_KWARGS, "render_mode": kwargs.get("render_mode")}
    if unknown := {key: value for key, value in kwargs.items() if key not in known or known[key] != value}:
        warnings.warn(f"{kwargs_path}: trained with {_SHORT.repr(unknown)}, policykd plays without", stacklevel=5)
    card = Card(game=played_game(env_id), algorithm=algorithm.upper(), reported_return=_reported_return(folders))
    if card.reported_return is None and is_benchmarked:
        return replace(card, reported_return=BENCHMARK.get((card.algorithm, card.game)))
    return card


def played_game(env_id: str) -> str:
    """Returns the canonical name of an Atari game, and the id of any other environment unchanged."""
    try:
        return canonical_name(re.sub("^ALE-", "ALE/", env_id))
    except ValueError:
        return env_id


def _check_preprocessing(path: Path, env_id: str) -> None:
    """Raises BadFile for observations that policykd does not produce; warns where they may differ."""
    config = _read_yaml(path)
    # VecNormalize's running statistics are a pickle next to the archive, which is not read.
    normalize = config.get("normalize")
    if normalize and not (isinstance(normalize, str) and re.search(r"norm_obs\W+False", normalize)):
        raise BadFile(
            f"{path}: expected plain observations, found normalize: {_SHORT.repr(normalize)}; give another --teacher"
        )
    # The other checks are about frames only.
    if not re.search("NoFrameskip|^ALE[/-]", env_id):
        return
    if (found := config.get("frame_stack", 1)) != 4:
        raise BadFile(f"{path}: expected frame_stack: 4, found {_SHORT.repr(found)}; give another --teacher")
    wrapper = config.get("env_wrapper")
    if wrapper not in (_WRAPPER, [_WRAPPER]) or "NoFrameskip-v4" not in env_id:
        trained = f"{one_line(env_id)} with env_wrapper {_SHORT.repr(wrapper)}"
        warnings.warn(f"{path}: trained on {trained}; policykd plays NoFrameskip-v4 with AtariWrapper", stacklevel=6)


def _reported_return(folders: tuple[Path, ...]) -> float | None:
    """Returns mean_reward of results.json; an invalid file is a warning, since nothing else depends on it."""
    if not (path := _find("results.json", folders)):
        return None
    try:
        return read_json(_Results, path, max_bytes=_MAX_ZOO_BYTES).mean_reward
    except BadFile as error:
        warnings.warn(f"{error}; the reported return is ignored", stacklevel=6)
        return None


def _find(name: str, folders: tuple[Path, ...]) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read_yaml(path: Path | None) -> Mapping[str, Any]:
    """Returns the plain data of a YAML file; the zoo's OrderedDict is the only Python tag that is accepted."""
    import yaml

    if path is None:
        return {}
    next_step = "fix or remove the file"
    content = read_bounded(path, _MAX_ZOO_BYTES, next_step=next_step)
    # The zoo writes neither: merged keys double with every line, nested brackets take PyYAML quadratic time.
    if b"<<" in content or content.count(b"[") + content.count(b"{") > 100:
        raise BadFile(f"{path}: not the YAML of an rl-zoo agent (merged keys or too many brackets); {next_step}")
    loader: Any = type("ZooLoader", (yaml.SafeLoader,), {})  # a class of its own: constructors belong to the class
    loader.add_constructor(
        "tag:yaml.org,2002:python/object/apply:collections.OrderedDict",
        lambda loader, node: dict(loader.construct_sequence(node, deep=True)[0]),
    )
    try:
        data = yaml.load(content, loader) or {}
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not the YAML of an rl-zoo agent ({one_line(str(error))}); {next_step}") from error
    if not isinstance(data, dict):
        raise BadFile(f"{path}: expected names and values, found a {type(data).__name__}; {next_step}")
    return data
