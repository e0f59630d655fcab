"""What RL Baselines3 Zoo wrote beside an agent: the game it was trained on, with which frames, and its return."""

import json
import re
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policykd.envs.games import canonical_name
from policykd.io.files import BadFile

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
"""(algorithm, game) -> mean episodic return of the zoo's agents, unclipped, actions drawn (its benchmark.md)"""

_KNOWN_KWARGS = {"full_action_space": False, "repeat_action_probability": 0.0, "frameskip": 1, "obs_type": "rgb"}
"""env_kwargs that say what policykd does anyway"""
_WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"
_SHORT = reprlib.Repr()  # YAML's aliases can make a small file's repr endless
_SHORT.maxstring = 100


def describe(name: str, *folders: Path) -> dict[str, Any]:
    """Returns the card entries of a zoo agent: game, algorithm and reported return, as far as they are known.

    Args:
        name: such as `dqn-PongNoFrameskip-v4`; what it says counts where `args.yml` is missing.
        folders: where `args.yml`, `config.yml`, `env_kwargs.yml` and `results.json` may lie; the first one counts.

    Raises:
        BadFile: a file that is damaged or unsafe, or frames that policykd does not make.
    """
    args, _ = _read("args.yml", folders)
    config, config_path = _read("config.yml", folders)
    env_kwargs, kwargs_path = _read("env_kwargs.yml", folders)
    results, results_path = _read("results.json", folders)
    named = re.fullmatch(r"(ppo|a2c|dqn|qrdqn)-(.+)", name)
    algorithm, env_id = (args.get(key) or (named and named[i]) or "" for i, key in ((1, "algo"), (2, "env")))
    if not (isinstance(algorithm, str) and isinstance(env_id, str)):
        raise BadFile(f"args.yml of {name or folders[0]}: algo and env are no names; mend or remove the file")
    if config_path:
        _check_observations(config_path, config, env_id)
    known = {**_KNOWN_KWARGS, "render_mode": env_kwargs.get("render_mode")}
    if unknown := {key: value for key, value in env_kwargs.items() if key not in known or known[key] != value}:
        warnings.warn(f"{kwargs_path}: trained with {_SHORT.repr(unknown)}, policykd plays without", stacklevel=5)
    reported = results.get("mean_reward")
    if reported is not None and not (isinstance(reported, int | float) and abs(reported) < 1e12):
        warnings.warn(f"{results_path}: mean_reward is no number, so it counts for nothing", stacklevel=5)
        reported = None
    card = {"game": played_game(env_id), "algorithm": algorithm.upper(), "reported_return": reported}
    return {key: value for key, value in card.items() if value not in (None, "")}


def played_game(env_id: str) -> str:
    """Returns a game's name as papers write it, or what is no Atari game unchanged."""
    try:
        return canonical_name(re.sub("^ALE-", "ALE/", env_id))
    except ValueError:
        return env_id


def _check_observations(path: Path, config: Mapping[str, Any], env_id: str) -> None:
    normalize = config.get("normalize")
    if normalize and not (isinstance(normalize, str) and re.search(r"norm_obs\W+False", normalize)):
        raise BadFile(
            f"{path}: expected plain observations, found normalize: {_SHORT.repr(normalize)}; give another --teacher"
        )
    if not re.search("NoFrameskip|^ALE[/-]", env_id):
        return
    if (found := config.get("frame_stack", 1)) != 4:
        raise BadFile(f"{path}: expected frame_stack: 4, found {_SHORT.repr(found)}; give another --teacher")
    wrapper = config.get("env_wrapper")
    if wrapper not in (_WRAPPER, [_WRAPPER]) or "NoFrameskip-v4" not in env_id:
        trained = f"{env_id} with env_wrapper {_SHORT.repr(wrapper)}"
        warnings.warn(f"{path}: trained on {trained}; policykd plays NoFrameskip-v4 as AtariWrapper does", stacklevel=6)


def _read(name: str, folders: tuple[Path, ...]) -> tuple[dict[str, Any], Path | None]:
    """Returns what the first file of that name says, and its path; ({}, None) where there is none."""
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return {}, None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, the zoo writes less than {MAX_BYTES:,}")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _safe_yaml(text)
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not names and values")
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(f"{path}: {' '.join(str(error).split())[:200]}; mend or remove the file") from error
    return content, path


def _safe_yaml(text: str) -> Any:
    """Returns plain data; of YAML's Python tags only the zoo's OrderedDict is known, as a dict."""
    import yaml

    # the zoo writes neither; merged keys double with every line, nested brackets take PyYAML quadratic time
    if "<<" in text or text.count("[") + text.count("{") > 100:
        raise ValueError("not the YAML of an rl-zoo agent (merged keys or too many brackets)")
    loader: Any = type("ZooLoader", (yaml.SafeLoader,), {})  # its own class: constructors are the class's
    loader.add_constructor(
        "tag:yaml.org,2002:python/object/apply:collections.OrderedDict",
        lambda loader, node: dict(loader.construct_sequence(node, deep=True)[0]),
    )
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not the YAML of an rl-zoo agent ({error})") from error
