"""Policies by the names that users give them: the folder of a run, a teacher's reference, or `random`."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from policykd.agents.references import PRETRAINED, find_teacher
from policykd.agents.student import Student, load_student, read_student_card
from policykd.agents.teacher import Teacher, load_teachers
from policykd.envs.atari import make_atari
from policykd.envs.games import canonical_name
from policykd.evaluation.teacher_check import check_fits, measured_return
from policykd.io.files import BadFile
from policykd.io.typed import read_json

RANDOM = "random"
"""reference of the policy that takes every action with the same probability"""


@dataclass(frozen=True)
class NamedPolicy:
    """A policy with the names under which users and tables refer to it."""

    ref: str
    """reference that the user gave"""
    name: str
    """name in tables and films"""
    policy: Student | Teacher


def find_run(ref: str) -> Path | None:
    """Returns the folder of the run that a reference names, or None if it names a teacher."""
    path = Path(ref)
    folder = path.parent if path.name == "student.json" else path
    return folder if (folder / "student.json").is_file() else None


def load_named_policy(
    ref: str, game: str, *, weights: str = "equal", seed: int = 0, trust_pickle: bool = False
) -> NamedPolicy:
    """Returns the policy of a reference, once it fits the game.

    Args:
        ref: a run's folder or its student.json, or a teacher (docs/teachers.md).
        game: the Atari game to play.
        weights: weights of several teachers.
        seed: seed of the games that are played if those weights are by return and none is reported.
        trust_pickle: as in `load_teacher`.

    Raises:
        ValueError: not found.
        BadFile: damaged, or made for another game.
    """
    policy: Student | Teacher
    run = find_run(ref)
    if run is None:
        policy = load_teachers(
            ref,
            weights,
            game=game,
            trust_pickle=trust_pickle,
            measure=lambda member: measured_return(member, game, seed=seed),
        )
        name = ref
    else:
        card = read_student_card(run / "student.json")
        own_game = "" if card.heads else card.game
        if own_game and canonical_name(own_game) != canonical_name(game):
            raise BadFile(f"{ref}: it was made for another game, {own_game}; leave out --game, or give a run of {game}")
        policy = load_student(run, game=canonical_name(game))
        name = run.resolve().name
    # Before anything is played or measured: a policy of another game would fail later, or play nonsense.
    with closing(make_atari(game, 1, 0)) as envs:
        check_fits(policy, envs, ref, game)
    return NamedPolicy(ref, name, policy)


def load_run_teacher(
    run: Path, *, ref: str = "", alternative: str = "give --against REF or none", trust_pickle: bool = False
) -> NamedPolicy:
    """Returns the teacher of a run: the same archive, or the same archives with the same weights.

    `ref` is where the teacher is now; by default where the run found it, at the same revision. `alternative` is what
    else the user may do, for error messages.

    Raises:
        BadFile: the run does not record its teacher, or another archive is there now.
        ValueError: not found.
    """
    card = read_student_card(run / "student.json")
    recorded = card.teacher
    if recorded is None or not card.game:
        raise BadFile(f"{run}/student.json: does not record its teacher; {alternative}")
    # Without the revision the Hub would give the newest archive.
    pinned = ref or recorded.ref
    if not ref and recorded.revision and "@" not in pinned:
        pinned = f"{pinned}@{recorded.revision}"
    # Several teachers are one only with the weights of the run.
    weights, seed = _teacher_weights(run) if "+" in pinned else ("equal", 0)
    try:
        found = load_named_policy(pinned, card.game, weights=weights, seed=seed, trust_pickle=trust_pickle)
    except BadFile:
        raise
    except ValueError as error:
        raise ValueError(f"{run}: teacher not found ({error}); or {alternative}") from error
    if not isinstance(found.policy, Teacher) or found.policy.sha256 != recorded.sha256:
        raise BadFile(f"{pinned}: not the archive that {run} was distilled from; {alternative}")
    return found


@dataclass(frozen=True, kw_only=True)
class _Settings:
    teacher_weights: str = "equal"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _RunConfig:
    settings: _Settings = field(default_factory=_Settings)


def _teacher_weights(run: Path) -> tuple[str, int]:
    """Returns how a run weighted several teachers, and its seed; equal weights without a config.json."""
    path = run / "config.json"
    settings = read_json(_RunConfig, path).settings if path.is_file() else _Settings()
    return settings.teacher_weights, settings.seed


def infer_game(refs: Sequence[str], given: str = "") -> str:
    """Returns the canonical name of the game that policies play: the one given, or that of the first which records it.

    Raises:
        ValueError: none records it.
    """
    if given:
        return canonical_name(given)
    for ref in refs:
        run = find_run(ref)
        card = read_student_card(run / "student.json") if run else None
        if card and card.heads:
            raise ValueError(f"{ref}: plays {', '.join(card.heads)}; give --game, or the folder of one, {ref}/GAME")
        game = card.game if card else _game_of_teacher(ref)
        if game:
            return canonical_name(game)
    raise ValueError(f"{refs[0]}: its game is not recorded; give --game")


def _game_of_teacher(ref: str) -> str:
    """Returns the game of a teacher's card, or an empty string."""
    # The bundled teachers all play one game; the algorithms on the Hub (hub:dqn) play any.
    if ref.partition(":")[0] in ("auto", "bundled"):
        games = {path.stem.partition("-")[2] for path in PRETRAINED.glob("*.zip")}
        return games.pop() if len(games) == 1 else ""
    if ref == RANDOM or (ref.startswith("hub:") and "/" not in ref):
        return ""
    return find_teacher(ref.partition("+")[0]).card.game
