"""`policykd evaluate`: prints the statistics that it writes, and refuses invalid arguments before it plays."""

from pathlib import Path

import pytest

from policykd.agents.card import Provenance
from policykd.agents.student import make_student, save_student
from policykd.cli.evaluate import EvaluationFile
from policykd.cli.main import execute
from policykd.evaluation.evaluate import AtariOptions, evaluate_on_atari
from policykd.evaluation.results import summarise_episodes
from policykd.io.files import BadFile
from policykd.io.typed import read_json


def test_the_printed_statistics_are_those_of_the_file_and_of_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = make_student("0.1%", 6)
    save_student(student, tmp_path / "run", Provenance(game="Pong"))
    out = tmp_path / "games.json"
    execute("evaluate", [str(tmp_path / "run"), "--episodes", "2", "--protocol", "sticky_greedy", "--json", str(out)])
    found = read_json(EvaluationFile, out)
    assert (found.game, list(found.protocols)) == ("Pong", ["sticky_greedy"])
    games = evaluate_on_atari(student, "Pong", "sticky_greedy", 2, options=AtariOptions(num_envs=16))
    assert found.protocols["sticky_greedy"] == summarise_episodes(games)
    printed = capsys.readouterr().out
    assert f"Pong, sticky_greedy: mean {games.mean_return:.2f} [" in printed
    assert "different returns in 2 games" in printed


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (["random"], ValueError, "random: its game is not recorded; give --game"),
        (["random", "--game", "Pnog"], ValueError, "unknown game 'Pnog'"),
        (["random", "--game", "Pong", "--episodes", "0"], ValueError, "--episodes must be at least 1, not 0"),
        (["random", "--game", "Pong", "--json", "none-such/g.json"], ValueError, "folder not found; create it first"),
        (["FOLDER", "--game", "Pong"], BadFile, "expected policy.pth and data"),
        (["FOLDER/four", "--game", "Pong"], BadFile, "4 actions and observations (4, 84, 84), but Pong has 6"),
    ],
)
def test_invalid_arguments_are_one_line(
    arguments: list[str], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    save_student(make_student("0.1%", 4), tmp_path / "four")
    with pytest.raises(error) as raised:
        execute("evaluate", [word.replace("FOLDER", str(tmp_path)) for word in arguments])
    assert "\n" not in str(raised.value)
    assert reason in str(raised.value)
