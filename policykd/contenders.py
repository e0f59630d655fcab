"""Policies as a user names them on a command line: the folder of a run, or a teacher, in the game that they play."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policykd.agents.ensemble import load_teachers
from policykd.agents.files import BadFile
from policykd.agents.references import PRETRAINED, find_teacher
from policykd.agents.student import Student, load_student
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.teacher_check import check_fits


@dataclass(frozen=True)
class Contender:
    """A policy that is set beside others."""

    ref: str
    """what the user called it"""
    name: str
    """what tables and films call it"""
    policy: Student | Teacher
    temperature: float
    """what its scores are divided by to get its policy"""

    @property
    def run(self) -> Path | None:
        """The folder of the run whose student it is; None for a teacher."""
        return run_of(self.ref)


def run_of(ref: str) -> Path | None:
    """Returns the folder of the run that a reference names, or None where it names a teacher."""
    path = Path(ref)
    folder = path.parent if path.name == "student.json" else path
    return folder if (folder / "student.json").is_file() else None


def load_contender(ref: str, game: str, *, trust_pickle: bool = False) -> Contender:
    """Returns what a reference names, once it fits the game.

    Raises:
        ValueError: nothing is there, or nothing that plays this game.
    """
    run = run_of(ref)
    if run is None:
        policy: Student | Teacher = load_teachers(ref, game=game, trust_pickle=trust_pickle)
        name, temperature = ref, policy.temperature
    else:
        policy, name, temperature = load_student(run), run.resolve().name, 1.0
    with closing(make_atari(game, 1, 0)) as envs:
        check_fits(policy, envs, ref, game)
    return Contender(ref, name, policy, temperature)


def teacher_of(run: Path, *, trust_pickle: bool = False) -> Contender:
    """Returns the teacher that a run learned from, the very archive.

    Raises:
        BadFile: the run does not say which; another archive lies there now.
        ValueError: nothing lies there any more.
    """
    said = _said(run)
    try:
        teacher, game = said["teacher"], str(said["game"])
        ref, revision, sha256 = (str(teacher[key]) for key in ("ref", "revision", "sha256"))
    except (LookupError, TypeError) as error:
        raise BadFile(f"{run}/student.json: does not say who its teacher was; give --against REF or none") from error
    pinned = f"{ref}@{revision}" if revision and "@" not in ref else ref
    try:
        found = load_contender(pinned, game, trust_pickle=trust_pickle)
    except BadFile:
        raise
    except ValueError as error:
        raise ValueError(f"{run}: its teacher is not found ({error}); or give --against REF or none") from error
    if not isinstance(found.policy, Teacher) or found.policy.sha256 != sha256:
        raise BadFile(f"{pinned}: not the archive that {run} learned from any more; give --against REF or none")
    return found


def game_of(refs: Sequence[str], given: str = "") -> str:
    """Returns the canonical name of the game that policies play: the one `given`, or what the first of them says.

    Raises:
        ValueError: none says it.
    """
    if given:
        return canonical_name(given)
    for ref in refs:
        run = run_of(ref)
        if game := _said(run).get("game") if run else _played_by(ref):
            return canonical_name(str(game))
    raise ValueError(f"{refs[0]}: it does not say which game it plays; give --game")


def _said(run: Path) -> dict[str, Any]:
    try:
        said = json.loads((run / "student.json").read_text())
    except (OSError, ValueError) as error:
        raise BadFile(f"{run}/student.json: cannot be read ({error}); give the folder of a finished run") from error
    if not isinstance(said, dict):
        raise BadFile(f"{run}/student.json: not what a run writes; give the folder of a finished run")
    return said


def _played_by(ref: str) -> str | None:
    if ref.partition(":")[0] in ("auto", "bundled"):
        games = {path.stem.partition("-")[2] for path in PRETRAINED.glob("*.zip")}
        return games.pop() if len(games) == 1 else None
    if ref.startswith("hub:") and "/" not in ref:
        return None
    card = find_teacher(ref.partition("+")[0]).card
    return str(card["game"]) if "game" in card else None
