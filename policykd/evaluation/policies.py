"""Policies as a user names them on a command line: the folder of a run, or a teacher, in the game that they play."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policykd.agents.ensemble import load_teachers
from policykd.agents.references import PRETRAINED, find_teacher
from policykd.agents.student import Student, load_student
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation.teacher_check import check_fits, measured_return
from policykd.io.files import BadFile


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


def load_contender(
    ref: str, game: str, *, weights: str = "equal", seed: int = 0, trust_pickle: bool = False
) -> Contender:
    """Returns what a reference names, once it fits the game.

    Args:
        ref: a run's folder, or a teacher.
        game: what it plays.
        weights: of several teachers.
        seed: of games that are played where these weights are by return, and none is reported.
        trust_pickle: as for `load_teacher`.

    Raises:
        ValueError: nothing is there, or nothing that plays this game.
    """
    run = run_of(ref)
    if run is None:
        policy: Student | Teacher = load_teachers(
            ref,
            weights,
            game=game,
            trust_pickle=trust_pickle,
            measure=lambda member: measured_return(member, game, seed=seed),
        )
        name, temperature = ref, policy.temperature
    else:
        if (own := str(_said(run).get("game", game))) and canonical_name(own) != canonical_name(game):
            raise BadFile(f"{ref}: it was made for another game, {own}; leave out --game, or take a run of {game}")
        policy, name, temperature = load_student(run), run.resolve().name, 1.0
    with closing(make_atari(game, 1, 0)) as envs:
        check_fits(policy, envs, ref, game)
    return Contender(ref, name, policy, temperature)


def teacher_of(
    run: Path, *, ref: str = "", instead: str = "give --against REF or none", trust_pickle: bool = False
) -> Contender:
    """Returns the teacher that a run learned from: the very archive, or the very archives with their weights.

    Args:
        run: its folder.
        ref: where the teacher lies now; by default where it lay then, at the commit that was taken.
        instead: what else a user may do, for the message of an error.
        trust_pickle: as for `load_teacher`.

    Raises:
        BadFile: the run does not say which; another archive lies there now.
        ValueError: nothing lies there any more.
    """
    said = _said(run)
    try:
        teacher, game = said["teacher"], str(said["game"])
        then, revision, sha256 = (_text(teacher[key]) for key in ("ref", "revision", "sha256"))
    except (LookupError, TypeError) as error:
        raise BadFile(f"{run}/student.json: does not say who its teacher was; {instead}") from error
    pinned = ref or (f"{then}@{revision}" if revision and "@" not in then else then)
    try:
        found = load_contender(pinned, game, **_mixed_by(run, pinned), trust_pickle=trust_pickle)
    except BadFile:
        raise
    except ValueError as error:
        raise ValueError(f"{run}: its teacher is not found ({error}); or {instead}") from error
    if not isinstance(found.policy, Teacher) or found.policy.sha256 != sha256:
        raise BadFile(f"{pinned}: not the archive that {run} learned from any more; {instead}")
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _mixed_by(run: Path, ref: str) -> dict[str, Any]:
    """Returns how a run weighed several teachers, and the seed of games that were played for it."""
    try:
        settings = json.loads((run / "config.json").read_text())["settings"]
        how = {"weights": str(settings["teacher_weights"]), "seed": int(settings["seed"])}
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # no run of a command, but a student that was saved
    return how if "+" in ref else {}


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
    return find_teacher(ref.partition("+")[0]).card.game or None
