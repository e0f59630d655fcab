"""Whether a teacher has anything to teach, asked before it is used: does it fit the game, and does it beat chance?

A wrong archive, a wrong preprocessing or a training that failed (the zoo's A2C scores 0.0 on Enduro, as random play
does) would otherwise show after hours, as a student that plays at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from policykd.agents.policy import Policy
from policykd.agents.teacher import Teacher
from policykd.envs.atari import make_atari
from policykd.envs.games import RANDOM_AND_HUMAN_SCORES, canonical_name
from policykd.envs.vector import VectorEnv
from policykd.evaluation.evaluate import PROTOCOLS, AtariOptions, RandomPolicy, evaluate, evaluate_on_atari
from policykd.evaluation.statistics import bootstrap_interval, difference_interval
from policykd.io.files import BadFile

NUM_GAMES, FEWEST_GAMES = 8, 4
MAX_STEPS = 2500
"""agent steps after which a game of the check is cut off; Pong's last 1,600 to 2,400 for a good teacher"""
ENOUGH_ON_CARD = 30
"""games on a card that make a check of their own needless"""
LEVEL = 0.99
"""of the interval of the advantage over random play; the bootstrap of a few games is too sure of itself at 0.95"""
LEAST_SHARE_OF_REPORTED = 0.5
"""of the reported return, counted from random play, below which there is a warning"""


@dataclass(frozen=True)
class TeacherCheck:
    """How a teacher plays beside random play, and beside what is reported of it; no-op starts, sampled actions."""

    source: Literal["card", "played"]
    """the games on its card and the table of random scores, or games played now by both"""
    mean: float
    """of its episodic returns; where games were cut off, of what both brought up to there"""
    interval: tuple[float, float]
    """95 % bootstrap of that mean"""
    random_mean: float
    """the same of random play"""
    advantage: tuple[float, float]
    """99 % bootstrap interval of the difference to random play"""
    num_games: int
    num_unfinished: int
    """of its games, cut off after `max_steps`"""
    max_steps: int | None
    reported_return: float | None

    @property
    def is_weak(self) -> bool:
        """Whether it may be no better than random play."""
        return self.advantage[0] <= 0.0

    @property
    def warning(self) -> str | None:
        """What to say where whole games bring far less than is reported."""
        if self.reported_return is None or self.num_unfinished:
            return None
        least = self.random_mean + LEAST_SHARE_OF_REPORTED * (self.reported_return - self.random_mean)
        if self.interval[1] >= least:
            return None
        return f"plays far below what is reported, as if it saw other frames than it was trained on: {self}"

    def goal(self, game: str) -> tuple[float | None, float]:
        """Returns the mean returns of the teacher and of play at random, of whole games under one protocol.

        The teacher's is None where no return is reported and the games of the check were cut off.
        """
        table = RANDOM_AND_HUMAN_SCORES.get(canonical_name(game))
        of_teacher = self.reported_return
        if of_teacher is None and not self.num_unfinished:
            of_teacher = self.mean
        return of_teacher, table[0] if table else self.random_mean

    def __str__(self) -> str:
        """Returns the figures as part of one line."""
        cut = f", {self.num_unfinished} of them cut off after {self.max_steps} steps" if self.num_unfinished else ""
        reported = "none" if self.reported_return is None else f"{self.reported_return:.2f}"
        return (
            f"{self.mean:.2f} [{self.interval[0]:.2f}, {self.interval[1]:.2f}] in {self.num_games} games"
            f"{' of its card' if self.source == 'card' else ''}{cut}; random play {self.random_mean:.2f},"
            f" reported {reported}"
        )


def check_fits(policy: Policy, envs: VectorEnv, ref: str, game: str) -> None:
    """Compares the actions that a policy scores and the observations that it takes with the game's.

    Args:
        policy: a teacher, a student, or any callable; one that does not say its shape is asked with a blank screen.
        envs: the game.
        ref: what the user called the policy.
        game: what the user called the game.

    Raises:
        BadFile: they differ; the line says what was expected and found.
    """
    described = getattr(policy, "shape", policy)  # a student's shape says both
    obs_shape = tuple(getattr(described, "obs_shape", envs.obs_shape))
    num_actions = getattr(described, "num_actions", None)
    if num_actions is None:
        num_actions = _asked_num_actions(policy, envs, ref)
    if (num_actions, obs_shape) != (envs.num_actions, envs.obs_shape):
        raise BadFile(
            f"{ref}: scores {num_actions} actions on {obs_shape}, {game} has {envs.num_actions} on {envs.obs_shape};"
            " it was made for another game"
        )


def _asked_num_actions(policy: Policy, envs: VectorEnv, ref: str) -> int:
    blank = torch.zeros((1, *envs.obs_shape), dtype=torch.uint8 if len(envs.obs_shape) == 3 else torch.float32)
    scores = policy(blank)
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2 or len(scores) != 1:
        found = f"a tensor {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise BadFile(f"{ref}: returns {found} for one observation, expected a tensor (1, {envs.num_actions})")
    if not scores.isfinite().all():
        raise BadFile(f"{ref}: scores a blank screen with NaN or infinity; mend it first")
    return scores.shape[1]


def compare_with_random(
    policy: Policy,
    envs: VectorEnv,
    *,
    seed: int,
    temperature: float = 1.0,
    reported_return: float | None = None,
    max_steps: int = MAX_STEPS,
    device: torch.device | str = "cpu",
) -> TeacherCheck:
    """Plays one game in every environment with a policy, then at random, and compares what they bring.

    A game is cut off after `max_steps`, so that a slow one does not take minutes and a policy that gets stuck ends.
    What both have got by then is compared; it is not an episodic return, so it is not compared with the reported one.

    Args:
        policy: scores observations; its actions are drawn from softmax(scores / temperature).
        envs: at least 4; a game is played in each.
        seed: of the actions.
        temperature: of the policy.
        reported_return: of whole games, by its maker.
        max_steps: agent steps of a game.
        device: where the policy lives.
    """
    if envs.num_envs < FEWEST_GAMES:
        raise ValueError(f"{envs.num_envs} games do not tell a policy from chance; give {FEWEST_GAMES} environments")
    generator = torch.Generator().manual_seed(seed)
    play = partial(
        evaluate, envs=envs, num_episodes=envs.num_envs, deterministic=False, seed=generator, max_steps=max_steps
    )
    played = play(policy)
    chance = play(RandomPolicy(envs.num_actions))
    brought, by_chance = (games.returns + games.unfinished for games in (played, chance))
    return TeacherCheck(
        source="played",
        mean=float(np.mean(brought)),
        interval=bootstrap_interval(brought, np.mean),
        random_mean=float(np.mean(by_chance)),
        advantage=difference_interval(brought, by_chance, level=LEVEL)[1:],
        num_games=len(brought),
        num_unfinished=len(played.unfinished),
        max_steps=max_steps,
        reported_return=reported_return,
    )


def read_card(teacher: Teacher, game: str) -> TeacherCheck | None:
    """Returns what the card says of this very file, or None where it says too little or random play is not known."""
    protocol = teacher.card.protocols.get("noop_sampled")
    row = RANDOM_AND_HUMAN_SCORES.get(canonical_name(game))
    if protocol is None or not row or len(protocol.returns) < ENOUGH_ON_CARD:
        return None
    low, high = bootstrap_interval(protocol.returns, np.mean, level=LEVEL)
    return TeacherCheck(
        source="card",
        mean=float(np.mean(protocol.returns)),
        interval=bootstrap_interval(protocol.returns, np.mean),
        random_mean=row[0],
        advantage=(low - row[0], high - row[0]),
        num_games=len(protocol.returns),
        num_unfinished=0,
        max_steps=None,
        reported_return=teacher.reported_return,
    )


def check_teacher(
    teacher: Teacher,
    game: str,
    *,
    seed: int,
    allow_weak: bool = False,
    play: bool = False,
    num_games: int = NUM_GAMES,
    max_steps: int = MAX_STEPS,
    device: torch.device | str = "cpu",
    kept: Mapping[str, Any] | None = None,
) -> TeacherCheck:
    """Returns how a teacher plays beside random play: from its card if that has enough games, else from games of both.

    Args:
        teacher: of this game.
        game: any name of it.
        seed: of starts and actions.
        allow_weak: go on with a teacher that may be no better than random play.
        play: play even if the card has enough games.
        num_games: to play, at least 4.
        max_steps: agent steps after which a game is cut off.
        device: where the teacher lives.
        kept: the fields of an earlier check of this run, which then is the answer.

    Raises:
        BadFile: it may be no better than random play; `kept` is no such check.
    """
    if kept is not None:
        return _kept(kept)
    check = None if play else read_card(teacher, game)
    if check is None:
        envs = make_atari(
            game,
            num_games,
            int(np.random.SeedSequence([seed, 2]).generate_state(1)[0]),  # neither the collected nor the final games'
            noop_max=PROTOCOLS["noop_sampled"].noop_max,
        )
        check = compare_with_random(
            teacher,
            envs,
            seed=seed,
            temperature=teacher.temperature,
            reported_return=teacher.reported_return,
            max_steps=max_steps,
            device=device,
        )
    if check.is_weak and not allow_weak:
        raise BadFile(
            f"{teacher.ref or teacher.path}: plays {canonical_name(game)} no better than chance: {check}; give another"
            " --teacher, or go on with --allow-weak-teacher"
        )
    return check


def measured_return(teacher: Teacher, game: str, *, seed: int, num_games: int = NUM_GAMES) -> float:
    """Returns the mean episodic return of a teacher in whole games, no-op starts, sampled actions."""
    options = AtariOptions(num_envs=num_games)
    games = evaluate_on_atari(teacher, game, "noop_sampled", num_games, seed=seed, options=options)
    return float(np.mean(games.returns))


def _kept(fields: Mapping[str, Any]) -> TeacherCheck:
    try:
        return TeacherCheck(**fields)
    except TypeError as error:
        raise BadFile(f"config.json: its teacher_check is damaged ({error}); give another --name") from error
