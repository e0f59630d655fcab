"""Films of real games: what is shown is what was played."""

import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.atari import make_atari
from policykd.evaluation.evaluate import RandomPolicy
from policykd.viewer import animation, colours
from policykd.viewer.animation import Player, VideoSettings, encode_animation, play, render_video
from policykd.viewer.scoreboard import Moment, Scoreboard, _dim

ACTIONS = ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
RIGHT = 2
VIDEO = VideoSettings("Pong", num_steps=60)


def always(action: int, score: float = 9.0) -> Callable[[Tensor], Tensor]:
    """A policy that is sure of one action of six."""
    scores = torch.zeros(6)
    scores[action] = score
    return lambda obs: scores.expand(len(obs), 6)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("bundled:ppo", game="Pong")


def test_moments_are_those_of_the_same_game_stepped_here(teacher: Teacher) -> None:
    moments = list(islice(play(Player("t", teacher), "Pong", seed=3, protocol="sticky_greedy"), 80))
    envs = make_atari("Pong", 1, 3, noop_max=0, repeat_action_probability=0.25)
    obs = envs.reset()
    episodic_return = 0.0
    for moment in moments:
        scores = teacher(obs)
        assert moment.action == scores.argmax()
        assert np.allclose(moment.probabilities_A, scores.softmax(1)[0], atol=1e-6)
        assert moment.episodic_return == episodic_return
        assert (moment.screen == envs.screens()[0]).all()
        step = envs.step(torch.tensor([moment.action]))
        obs = step.obs
        episodic_return += float(step.rewards_B)
    assert len({m.action for m in moments}) > 2


def test_a_finished_game_is_counted_and_the_next_begins() -> None:
    """A player that stands still loses 21 points in some 760 steps."""
    games = play(Player("still", always(0)), "Pong", seed=0, protocol="sticky_greedy")
    moments = list(islice(games, 800))
    ended = next(i for i, m in enumerate(moments) if m.finished)
    assert moments[ended].finished == (-21.0,)
    assert moments[ended].episodic_return == 0.0
    assert moments[ended - 1].episodic_return == -20.0


def test_the_temperature_makes_q_values_probabilities() -> None:
    player = Player("q", always(RIGHT, 0.02), temperature=0.01)
    moment = next(play(player, "Pong", seed=0, protocol="noop_sampled"))
    assert moment.probabilities_A[RIGHT] == pytest.approx(np.exp(2) / (np.exp(2) + 5))


def test_sampled_play_repeats_itself_with_its_seed_and_differs_with_another() -> None:
    def actions(seed: int) -> list[int]:
        player = Player("random", RandomPolicy(6))
        return [m.action for m in islice(play(player, "Pong", seed=seed, protocol="noop_sampled"), 30)]

    assert actions(0) == actions(0) != actions(1)


def test_players_on_one_seed_have_the_same_start_and_the_same_random_numbers() -> None:
    """So that what differs between them is the policies' doing: the same policy twice is the same picture twice."""
    same = [Player("x", RandomPolicy(6)), Player("x", RandomPolicy(6))]
    for picture in render_video(same, VideoSettings("Pong", 5, 40, 13, "noop_sampled")):
        half = (picture.width - 16) // 2
        left, right = picture.crop((0, 0, half, 600)), picture.crop((half, 0, 2 * half, 600))
        assert left.tobytes() == right.tobytes()


def test_outputs_that_are_not_finite_name_the_player() -> None:
    player = Player("broken", lambda obs: torch.full((len(obs), 6), torch.nan))
    with pytest.raises(FloatingPointError, match="broken: outputs that are not finite"):
        next(play(player, "Pong", seed=0, protocol="sticky_greedy"))


@pytest.fixture(scope="module")
def pictures(teacher: Teacher) -> list[Image.Image]:
    players = [Player("teacher", teacher), Player("random", RandomPolicy(6), colour=colours.STUDENT)]
    return list(render_video(players, VIDEO))


@pytest.mark.parametrize("format", ["WEBP", "GIF"])
def test_an_animation_plays_at_the_games_speed_and_is_small(
    format: Literal["WEBP", "GIF"], pictures: list[Image.Image]
) -> None:
    content = encode_animation(pictures, 2, format)
    assert len(content) * 300 / 60 < 1.5e6  # as 20 seconds
    film: Any = Image.open(io.BytesIO(content))  # in memory, nothing to close
    seconds = []
    for i in range(film.n_frames):
        film.seek(i)
        film.load()
        seconds.append(film.info["duration"] / 1000)
    assert film.info.get("loop") == 0
    assert sum(seconds) == pytest.approx(60 / 15, abs=0.006)  # a GIF counts hundredths, and must not drift
    assert film.n_frames > 20
    shown = np.asarray(film.convert("RGB"), int)  # the last
    assert np.abs(shown - np.asarray(pictures[-1], int)).mean() < (0.01 if format == "WEBP" else 2.0)


@pytest.mark.parametrize(("tick", "every"), [(10, 1), (10, 2), (1, 1)])
def test_a_long_film_does_not_drift(tick: int, every: int) -> None:
    durations = animation._durations(900, every, tick=tick)
    assert {d % tick for d in durations} == {0}
    assert sum(durations) == 900 * every * 1000 / 15
    assert max(durations) - min(durations) == tick


def test_an_animation_needs_a_picture() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        encode_animation([], 2)


@pytest.mark.parametrize("num_actions", [3, 6, 18])
def test_bars_are_as_long_as_probabilities(num_actions: int) -> None:
    """Counts coloured pixels: half as probable is half as long, and the chosen one alone is in full colour."""
    share = np.zeros(num_actions, np.float32)
    share[[0, 2]] = 2 / 3, 1 / 3
    draw = Scoreboard([""], [colours.STUDENT], [f"A{i}" for i in range(num_actions)])
    picture = np.asarray(draw([Moment(np.zeros((210, 160, 3), np.uint8), share, 0, 0.0)], ""))
    full = (picture == Image.new("RGB", (1, 1), colours.STUDENT).getpixel((0, 0))).all(-1)
    dim = (picture == _dim(colours.STUDENT)).all(-1)
    lengths = [int(mask.sum(1).max()) for mask in (full, dim)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=2)
    assert lengths[1] > 15
    assert full[:452].sum() == 0  # not on the screen


def test_tall_screens_and_many_actions_fit() -> None:
    (picture,) = render_video(
        [Player("a", RandomPolicy(18)), Player("b", RandomPolicy(18))], VideoSettings("Seaquest", num_steps=1)
    )
    assert picture.mode == "RGB"
    assert picture.width == 2 * 320 + 3 * 16
    (tall,) = render_video(
        [Player("a", RandomPolicy(make_atari("Amidar", 1, 0).num_actions))], VideoSettings("Amidar", num_steps=1)
    )
    assert tall.height > 2 * 210


def test_text_can_be_read() -> None:
    """The contrast of all text on its background (WCAG 2: 4.5, 3 where it is large)."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (colours.INK, colours.FAINT, colours.TEACHER, colours.STUDENT):
        assert (luminance(colour) + 0.05) / (luminance(colours.PAPER) + 0.05) > 4.5, colour


def test_play_to_gif_shows_the_screen_alone(tmp_path: Path) -> None:
    animation.play_to_gif(RandomPolicy(6), "Pong", tmp_path / "s.gif", num_steps=20)
    with Image.open(tmp_path / "s.gif") as gif:
        assert gif.size == (160, 210)
        assert gif.n_frames > 3  # type: ignore[attr-defined]
    assert [p.name for p in tmp_path.iterdir()] == ["s.gif"]
