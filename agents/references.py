"""Grammar of `--teacher REF`: where bundled, local and Hub teachers are found, and the metadata next to them."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from policykd.agents.card import MAX_CARD_BYTES, Card
from policykd.agents.zoo import read_zoo_files
from policykd.envs.games import canonical_name
from policykd.io.files import BadFile
from policykd.io.typed import read_json

PRETRAINED = Path(__file__).parent / "pretrained"
ALGORITHMS = ("ppo", "a2c", "dqn", "qrdqn")
"""in the order in which `bundled` tries them"""
TEACHER_HELP = (
    "`auto` (the one bundled for the game, else hub:ppo), `bundled` or `bundled:ALGO`, an SB3 .zip or its"
    " unpacked folder, an rl-zoo folder (ALGO/ENV_1), an .onnx file, `hub:ALGO[@REVISION]` (the rl-zoo agent for the"
    " game), `hub:OWNER/NAME[@REVISION]`, or several joined by `+`; ALGO is ppo, a2c, dqn or qrdqn; no code in the file"
    " is executed"
)

# Names and revisions that the Hub accepts; neither can contain a path out of the cache's folder.
_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"(?!.*(?:\.\.|//))[A-Za-z0-9_](?:[\w./-]*[A-Za-z0-9_-])?"


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
        ref: as in `TEACHER_HELP`; a `Path` is always a local file or folder.
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
