"""Metadata that RL Baselines3 Zoo writes next to an agent: its environment, its preprocessing, its return."""

import re
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from policykd.agents.card import Card, Return
from policykd.envs.games import canonical_name
from policykd.io.files import BadFile
from policykd.io.typed import one_line, read_bounded, read_json

MAX_BYTES = 1 << 14

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
    if kwargs_path := _find("env_kwargs.yml", folders):
        _warn_of_env_kwargs(kwargs_path)
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


def _warn_of_env_kwargs(path: Path) -> None:
    kwargs = _read_yaml(path)
    # render_mode changes nothing that an agent sees.
    known = {**_KNOWN_KWARGS, "render_mode": kwargs.get("render_mode")}
    if unknown := {key: value for key, value in kwargs.items() if key not in known or known[key] != value}:
        warnings.warn(f"{path}: trained with {_SHORT.repr(unknown)}, policykd plays without", stacklevel=6)


def _reported_return(folders: tuple[Path, ...]) -> float | None:
    """Returns mean_reward of results.json; an invalid file is a warning, since nothing else depends on it."""
    if not (path := _find("results.json", folders)):
        return None
    try:
        return read_json(_Results, path, max_bytes=MAX_BYTES).mean_reward
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
    content = read_bounded(path, MAX_BYTES, next_step=next_step)
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
