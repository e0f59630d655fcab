"""What `--teacher REF` means: one grammar for bundled, local and Hub teachers, and where the named file lies."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policykd.agents.zoo import BENCHMARK, describe
from policykd.envs.games import canonical_name
from policykd.io.files import BadFile

PRETRAINED = Path(__file__).parent / "pretrained"
ALGORITHMS = ("ppo", "a2c", "dqn", "qrdqn")
"""in the order in which `bundled` prefers them"""
TEACHER_HELP = (
    "teacher: `auto` (the one bundled for the game, else hub:ppo), `bundled` or `bundled:ALGO`, an SB3 .zip or its"
    " unpacked folder, an rl-zoo folder (ALGO/ENV_1), an .onnx file, `hub:ALGO[@REVISION]` (the rl-zoo agent for the"
    " game), `hub:OWNER/NAME[@REVISION]`, or several joined by `+`; ALGO is ppo, a2c, dqn or qrdqn; no code in the file"
    " is executed"
)

_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"(?!.*(?:\.\.|//))[A-Za-z0-9_](?:[\w./-]*[A-Za-z0-9_-])?"


@dataclass(frozen=True)
class Source:
    """Where a teacher's archive lies, and what is said about it there."""

    ref: str
    """canonical, without the revision; `load_teacher` takes it again"""
    path: Path
    revision: str = ""
    """the commit on the Hub"""
    card: Mapping[str, Any] = field(default_factory=dict)


def find_teacher(ref: str | Path, *, game: str | None = None) -> Source:
    """Returns where a reference points; fetches what is on the Hub.

    Args:
        ref: as in `TEACHER_HELP`; a `Path` is always a local file or folder.
        game: the game to play, which `auto`, `bundled` and `hub:ALGO` need.

    Raises:
        ValueError: a malformed reference, or nothing where it points.
        BadFile: what lies there is no teacher, or its card cannot be read.
        OSError: the Hub cannot be reached.
    """
    word, colon, rest = ("", "", "") if isinstance(ref, Path) else ref.partition(":")
    if word == "auto" and not colon:
        bundled = game and any(_bundled_archive(algorithm, game).is_file() for algorithm in ALGORITHMS)
        word, colon, rest = ("hub", ":", "ppo") if game and not bundled else ("bundled", "", "")
    if word == "bundled" and (rest or not colon):
        return _bundled(rest, game)
    if word == "hub" and colon:
        return _on_hub(str(ref), rest, game)
    return _local(str(ref), Path(ref))


def _bundled_archive(algorithm: str, game: str) -> Path:
    return PRETRAINED / f"{algorithm}-{canonical_name(game)}.zip"


def _bundled(algorithm: str, game: str | None) -> Source:
    if algorithm and algorithm not in ALGORITHMS:
        raise ValueError(f"bundled:{algorithm}: the algorithms are {', '.join(ALGORITHMS)}")
    if game is None:
        raise ValueError("which bundled teacher? name its game, or give the path of an SB3 .zip archive")
    for name in (algorithm,) if algorithm else ALGORITHMS:
        if (path := _bundled_archive(name, game)).is_file():
            return Source(f"bundled:{name}", path, card=_card_beside(path))
    have = ", ".join(sorted(path.stem for path in PRETRAINED.glob("*.zip")))
    raise ValueError(
        f"no {algorithm.upper() or 'teacher'} is bundled for {canonical_name(game)}, only {have};"
        f" give --teacher FILE.zip or hub:{algorithm or 'ppo'}"
    )


def _on_hub(ref: str, rest: str, game: str | None) -> Source:
    from policykd.agents import hub

    repo, at, revision = rest.partition("@")
    if at and not re.fullmatch(_REVISION, revision, re.ASCII):
        raise ValueError(f"{ref!r}: {revision!r} is no revision; give a branch, a tag or a commit, as in hub:dqn@main")
    if "/" not in repo:
        if repo not in ALGORITHMS:
            raise ValueError(f"{ref}: the algorithms are {', '.join(ALGORITHMS)}; or name a repository, hub:OWNER/NAME")
        if game is None:
            raise ValueError(f"{ref}: which game? name it, or name a repository, as in hub:sb3/dqn-PongNoFrameskip-v4")
        repo = f"sb3/{repo}-{canonical_name(game)}NoFrameskip-v4"
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo, re.ASCII):
        raise ValueError(f"{ref!r}: {repo!r} is no repository; give OWNER/NAME, as in hub:sb3/dqn-PongNoFrameskip-v4")
    snapshot = hub.fetch(repo, revision)
    card = describe(repo.split("/")[1], snapshot.folder)
    if repo.startswith("sb3/"):
        card = _with_benchmark(card)
    return Source(f"hub:{repo}", snapshot.archive, snapshot.revision, card)


def _local(ref: str, path: Path) -> Source:
    if not path.exists():
        raise ValueError(f"{ref}: {_why_nothing_is_there(ref)}")
    if not path.is_dir():
        zoo = path.with_suffix("")  # Env.zip and Env/config.yml, as the zoo writes them
        about = _with_benchmark(describe("", zoo)) if (zoo / "config.yml").is_file() else {}
        return Source(ref, path, card={**about, **_card_beside(path)})
    if (path / "policy.pth").is_file():
        return Source(ref, path, card=_card_beside(path))
    archives = [file for file in sorted(path.glob("*.zip")) if file.with_suffix("").is_dir()]
    if len(archives) != 1:
        found = ", ".join(file.name for file in archives) or "none"
        raise BadFile(
            f"{ref}: expected policy.pth and data, or an rl-zoo agent's ENV.zip beside its folder ENV, found {found};"
            " give ALGO/ENV_1 or the .zip itself"
        )
    archive = archives[0]
    card = _with_benchmark(describe(archive.stem, archive.with_suffix(""), path))
    return Source(ref, archive, card={**card, **_card_beside(archive)})


def _with_benchmark(card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a zoo agent's card with the return that the zoo reports, where its own files report none."""
    benchmark = BENCHMARK.get((card.get("algorithm", ""), card.get("game", "")))
    return dict(card) if benchmark is None else {"reported_return": benchmark, **card}


def _card_beside(path: Path) -> dict[str, Any]:
    file = path.with_name(f"{path.name}.json") if path.is_dir() else path.with_suffix(".json")
    try:
        card = json.loads(file.read_text()) if file.is_file() else {}
        _check_card(card)
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise BadFile(f"{file}: the teacher's card cannot be read ({error}); mend or remove it") from error
    return dict(card)


def _check_card(card: Any) -> None:
    """Raises ValueError, TypeError or KeyError for a card that does not say what a card says."""
    texts = ("game", "algorithm", "sha256")
    if not isinstance(card, dict) or not all(isinstance(card.get(k, ""), str) for k in texts):
        raise ValueError(f"it is not an object with the texts {', '.join(texts)}")
    if "protocols" in card and "sha256" not in card:
        raise ValueError("it has results but no sha256 of the archive that they are of")
    protocols = card.get("protocols", {})
    if not isinstance(protocols, dict):
        raise ValueError("its protocols are no object")
    for name, protocol in protocols.items():
        if not protocol["returns"] or not all(map(_is_return, [protocol["mean"], *protocol["returns"]])):
            raise ValueError(f"its protocol {name!r} has no returns, or some that are no numbers")
    if not _is_return(card.get("reported_return", 0.0)):
        raise ValueError("its reported_return is no number")


def _is_return(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e12  # nan is not


def _why_nothing_is_there(ref: str) -> str:
    if "://" in ref:
        return f"addresses are not read; give hub:{'/'.join(ref.split('://')[1].split('/')[1:3]) or 'OWNER/NAME'}"
    known = ["auto", "bundled", *(f"{kind}:{name}" for kind in ("bundled", "hub") for name in ALGORITHMS)]
    if near := difflib.get_close_matches(ref.lower(), known, n=2):
        return f"no such file or folder; did you mean {' or '.join(near)}?"
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:", ref):
        return (
            f"unknown kind {ref.split(':')[0]!r}; a teacher is auto, bundled, hub:... or the path of a file or folder"
        )
    if re.fullmatch(f"{_NAME}/{_NAME}", ref, re.ASCII) and not Path(ref).parent.exists():
        return f"no such file or folder; did you mean hub:{ref}?"
    return "no such file or folder; give the path of an SB3 .zip archive, bundled, or hub:ALGO"
