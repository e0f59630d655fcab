"""Check of a teacher before it is used: does it fit the game, and is it better than a random policy?

A wrong archive, a wrong preprocessing or a failed training (the zoo's A2C scores 0.0 on Enduro, as random play does)
would otherwise show hours later, as a student that plays at random.
"""

from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from policykd.agents.policy import Policy, check_outputs
from policykd.agents.teacher import Teacher
from policykd.envs.games import RANDOM_AND_HUMAN_SCORES, canonical_name
from policykd.envs.vector import VectorEnv
from policykd.evaluation.evaluate import (
    PROTOCOLS,
    RandomPolicy,
    derived_seed,
    evaluate,
    evaluate_on_atari,
)
from policykd.evaluation.results import protocols_of_card
from policykd.evaluation.statistics import bootstrap_interval, difference_interval
from policykd.io.files import BadFile

NUM_GAMES = 8
MIN_GAMES = 4
MAX_STEPS = 2500
"""agent steps after which a game of the check is cut off; a good teacher's games of Pong last 1,600 to 2,400"""
MIN_CARD_GAMES = 30
"""number of games on a card that makes playing unnecessary"""
ADVANTAGE_LEVEL = 0.99
"""level of the interval of the advantage over random play; with a few games the bootstrap is overconfident at 0.95"""
MIN_SHARE_OF_REPORTED = 0.5
"""share of the reported return, measured from random play, below which there is a warning"""


@dataclass(frozen=True)
class TeacherCheck:
    """Returns of a teacher, of random play and of the teacher's own report; no-op starts, sampled actions."""

    source: Literal["card", "played"]
    """games on the teacher's card and the table of random scores, or games played now by both"""
    mean: float
    """mean return of the teacher; where games were cut off, of the rewards up to there"""
    interval: tuple[float, float]
    """95 % bootstrap interval of that mean"""
    random_mean: float
    """the same mean for random play"""
    advantage: tuple[float, float]
    """99 % bootstrap interval of the difference from random play"""
    num_games: int
    num_unfinished: int
    """games of the teacher that were cut off after `max_steps`"""
    max_steps: int | None
    reported_return: float | None

    @property
    def is_weak(self) -> bool:
        """Whether the teacher may be no better than random play."""
        return self.advantage[0] <= 0.0

    @property
    def warning(self) -> str | None:
        """Text for the user if full games return far less than reported, which hints at a wrong preprocessing."""
        if self.reported_return is None or self.num_unfinished:
            return None
        # Compared with the upper end of the interval: a few unlucky games are no reason for a warning.
        expected = self.random_mean + MIN_SHARE_OF_REPORTED * (self.reported_return - self.random_mean)
        if self.interval[1] >= expected:
            return None
        return f"plays far below its reported return, as if its preprocessing were another: {self}"

    def goal(self, game: str) -> tuple[float | None, float]:
        """Returns the mean returns of full games of the teacher and of random play.

        The teacher's is None if no return is reported and the games of the check were cut off.
        """
        table = RANDOM_AND_HUMAN_SCORES.get(canonical_name(game))
        teacher_return = self.reported_return
        if teacher_return is None and not self.num_unfinished:
            teacher_return = self.mean
        return teacher_return, table[0] if table else self.random_mean

    def __str__(self) -> str:
        """Returns the figures as part of one line."""
        source = " of its card" if self.source == "card" else ""
        cut_off = f", {self.num_unfinished} of them cut off after {self.max_steps} steps" if self.num_unfinished else ""
        reported = "none" if self.reported_return is None else f"{self.reported_return:.2f}"
        return (
            f"{self.mean:.2f} [{self.interval[0]:.2f}, {self.interval[1]:.2f}] in {self.num_games} games"
            f"{source}{cut_off}; random play {self.random_mean:.2f}, reported {reported}"
        )


def check_fits(policy: Policy, envs: VectorEnv, ref: str, game: str) -> None:
    """Compares the actions and observations of a policy with those of the game.

    A policy without a known shape, such as a function, is called with a blank observation. `ref` and `game` are the
    user's names, for the error message.

    Raises:
        ValueError: they differ; the message has both.
    """
    shape = getattr(policy, "shape", policy)  # a student's shape has both
    num_actions: int | None = getattr(shape, "num_actions", None)
    if num_actions is None:  # a function
        blank = torch.zeros((1, *envs.obs_shape), dtype=torch.uint8 if len(envs.obs_shape) == 3 else torch.float32)
        if not check_outputs(policy(blank), 1, envs.num_actions, ref).isfinite().all():
            raise BadFile(f"{ref} returns NaN or infinity for a blank observation; fix it first")
        return
    obs_shape = tuple(getattr(shape, "obs_shape", envs.obs_shape))
    if (num_actions, obs_shape) != (envs.num_actions, envs.obs_shape):
        raise BadFile(
            f"{ref}: {num_actions} actions and observations {obs_shape}, but {game} has {envs.num_actions} and"
            f" {envs.obs_shape}; it was made for another game"
        )


def compare_with_random(
    policy: Policy, envs: VectorEnv, *, seed: int, reported_return: float | None = None, max_steps: int = MAX_STEPS
) -> TeacherCheck:
    """Plays one game in every environment with a policy, then with random actions, and compares the returns.

    The policy's actions are sampled at its own temperature. A game is cut off after `max_steps` agent steps, so that a
    slow game does not take minutes and a policy that gets stuck ends. Then the rewards up to there are compared; they
    are not episodic returns, so no warning refers to the `reported_return`, the mean of full games.

    Raises:
        ValueError: fewer than 4 environments.
    """
    if envs.num_envs < MIN_GAMES:
        raise ValueError(f"{envs.num_envs} games are too few to compare with random play; give {MIN_GAMES}")
    # One generator for both, so that random play does not repeat the policy's draws.
    generator = torch.Generator().manual_seed(seed)
    of_policy, of_random = (
        evaluate(player, envs, envs.num_envs, deterministic=False, seed=generator, max_steps=max_steps)
        for player in (policy, RandomPolicy(envs.num_actions))
    )
    # Games that were cut off count with what they had collected, for both sides alike.
    rewards = of_policy.returns + of_policy.unfinished
    random_rewards = of_random.returns + of_random.unfinished
    return TeacherCheck(
        source="played",
        mean=float(np.mean(rewards)),
        interval=bootstrap_interval(rewards, np.mean),
        random_mean=float(np.mean(random_rewards)),
        advantage=difference_interval(rewards, random_rewards, level=ADVANTAGE_LEVEL)[1:],
        num_games=len(rewards),
        num_unfinished=of_policy.num_unfinished,
        max_steps=max_steps,
        reported_return=reported_return,
    )


def check_from_card(teacher: Teacher, game: str) -> TeacherCheck | None:
    """Returns the check from the games on a teacher's card; None with too few, or for a game outside the table."""
    protocol = protocols_of_card(teacher).get("noop_sampled")
    table = RANDOM_AND_HUMAN_SCORES.get(canonical_name(game))
    if protocol is None or table is None or protocol.num_episodes < MIN_CARD_GAMES:
        return None
    random_mean = table[0]
    # The table has a mean of many games, whose own uncertainty is small.
    low, high = bootstrap_interval(protocol.returns, np.mean, level=ADVANTAGE_LEVEL)
    return TeacherCheck(
        source="card",
        mean=protocol.mean,
        interval=protocol.interval,
        random_mean=random_mean,
        advantage=(low - random_mean, high - random_mean),
        num_games=protocol.num_episodes,
        num_unfinished=0,
        max_steps=None,
        reported_return=teacher.reported_return,
    )


def check_teacher(teacher: Teacher, game: str, *, seed: int, allow_weak: bool = False) -> TeacherCheck:
    """Returns how a teacher compares with random play: from its card if that has enough games, else from new games.

    Raises:
        BadFile: the teacher may be no better than random play, and `allow_weak` is not given.
    """
    check = check_from_card(teacher, game)
    if check is None:
        from policykd.envs.atari import make_atari

        noop_max = PROTOCOLS["noop_sampled"].noop_max
        with closing(make_atari(game, NUM_GAMES, derived_seed(seed, 2), noop_max=noop_max)) as envs:
            reported = teacher.reported_return
            check = compare_with_random(teacher, envs, seed=seed, reported_return=reported, max_steps=MAX_STEPS)
    if check.is_weak and not allow_weak:
        raise BadFile(
            f"{teacher.ref or teacher.path}: plays {canonical_name(game)} no better than chance: {check}; give"
            " another --teacher, or accept this one with --allow-weak-teacher"
        )
    return check


def measured_return(teacher: Teacher, game: str, *, seed: int) -> float:
    """Returns a teacher's mean episodic return in full games, no-op starts, sampled actions."""
    return evaluate_on_atari(teacher, game, "noop_sampled", NUM_GAMES, seed=seed).mean_return
