"""`policykd distill --game GAME,GAME`: whole, interrupted, resumed, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from policykd.agents.student import load_student
from policykd.cli.main import execute
from policykd.evaluation.policies import infer_game, load_named_policy
from policykd.losses import LogitMSE
from policykd.report.page import read_run
from policykd.runs import finish
from policykd.runs import multi_game_run as module
from policykd.runs.config import DistillRunConfig, check_config, from_settings
from policykd.runs.distill_run import distill_run
from policykd.runs.folder import load_results, load_run_config
from policykd.runs.multi_game_run import distill_games_run
from policykd.states import DatasetStates

GAMES = "Pong,Qbert"
PRETRAINED = Path(module.__file__).parents[1] / "agents" / "pretrained"


@pytest.fixture
def two_games(tiny: DistillRunConfig, tmp_path: Path, flickers: None) -> DistillRunConfig:
    """Two games with six actions each; the second teacher is a copy without a card."""
    copied = shutil.copy(PRETRAINED / "ppo-Pong.zip", tmp_path / "other.zip")
    return replace(tiny, game=GAMES, teacher=f"bundled:ppo,{copied}", allow_weak_teacher=True)


def learned(run: Path) -> list[bytes]:
    """Returns what must not depend on interruptions."""
    names = ["student.safetensors", "student.json"]
    names += [f"{game}/{name}" for game in GAMES.split(",") for name in ("metrics.jsonl", "evaluations.npz")]
    return [(run / name).read_bytes() for name in names if name != "student.json"]


def test_a_run_leaves_a_shared_student_and_an_ordinary_run_per_game(two_games: DistillRunConfig) -> None:
    results = distill_games_run(two_games)
    run = two_games.folder / GAMES / "r"
    shared = load_student(run)
    assert shared.shape.num_actions == 12
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    for i, game in enumerate(GAMES.split(",")):
        assert load_results(run / game) == results[game]
        own = load_student(run / game)
        torch.testing.assert_close(own(obs), shared(obs)[:, 6 * i : 6 * i + 6])
        torch.testing.assert_close(load_named_policy(str(run), game).policy(obs), own(obs))
        files = read_run(run / game)
        assert files.game == game
        assert {"train/kl", "data/new_kl", "eval/mean_reward"} <= files.curves.keys()
        assert "report.html" in {path.name for path in (run / game).iterdir()}
        rows = [json.loads(line) for line in (run / game / "metrics.jsonl").read_text().splitlines()]
        assert [(row["num_states"], row["num_updates"]) for row in rows] == [(32, 4), (64, 8), (96, 12)]
        assert (results[game].num_states_labelled, results[game].num_updates) == (96, 12)
    teachers = [load_results(run / game).teacher.protocols for game in GAMES.split(",")]  # type: ignore[union-attr]
    assert teachers[0]["noop_sampled"].num_episodes == 200  # of the card of Pong's; the other has none
    assert teachers[1]["noop_sampled"].num_episodes == 2
    assert "| geometric mean |" in (run / "results.md").read_text()
    assert load_run_config(run / "Pong").teacher_check is not None
    with pytest.raises(ValueError, match=f"plays Pong, Qbert; give --game, or the folder of one, {run}/GAME"):
        infer_game([str(run)])

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    execute("resume", [str(run)])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    with pytest.raises(ValueError, match="holds a run already"):
        distill_games_run(two_games)


def test_both_games_share_one_head_of_all_actions(two_games: DistillRunConfig) -> None:
    distill_games_run(replace(two_games, heads="shared"))
    run = two_games.folder / GAMES / "r"
    settings = load_run_config(run / "Qbert").settings
    check_config(from_settings(DistillRunConfig, settings, "config.json"))  # a game alone can be repeated from it
    shared = load_student(run)
    assert shared.shape.num_actions == 13  # up to LEFTFIRE, Pong's last in ALE's order
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    # Pong: NOOP FIRE RIGHT LEFT RIGHTFIRE LEFTFIRE; Q*bert: NOOP FIRE UP RIGHT LEFT DOWN.
    torch.testing.assert_close(load_student(run / "Pong")(obs), shared(obs)[:, [0, 1, 3, 4, 11, 12]])
    torch.testing.assert_close(load_student(run / "Qbert")(obs), shared(obs)[:, [0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize(("step", "call"), [("save_checkpoint", 2), ("periodic_evaluation", 1), ("finish_run", 1)])
def test_an_interrupted_run_resumes_with_the_same_bytes(
    step: str, call: int, two_games: DistillRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill_games_run(replace(two_games, folder=tmp_path / "whole"))
    owner = module if hasattr(module, step) else finish
    function: Callable[..., Any] = getattr(owner, step)
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"resume with: policykd resume .*{GAMES}/r"):
            distill_games_run(two_games)
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    execute("resume", [str(moved / GAMES / "r")])
    assert learned(moved / GAMES / "r") == learned(tmp_path / "whole" / GAMES / "r")
    assert (moved / GAMES / "r/results.md").is_file()


def test_a_games_folder_is_not_resumed_by_itself(two_games: DistillRunConfig) -> None:
    distill_games_run(two_games)
    with pytest.raises(ValueError, match="move the folder of a run to"):
        execute("resume", [str(two_games.folder / GAMES / "r" / "Pong")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"game": "Pong,pong"}, "--game Pong,pong: a game is named twice"),
        ({"teacher": "bundled:ppo"}, "--teacher bundled:ppo: give one per game, 2 references joined by commas"),
        ({"loss": LogitMSE()}, "--loss: not for several games at once"),
        ({"state_weighting": "gap"}, "--state-weighting: not for several games"),
        ({"states": DatasetStates(Path("x")), "states_per_round": 8000, "num_envs": 16}, "--states: not for several"),
        ({"budget": "quick", "eval_every": 5}, "--budget: not for several games"),
        ({"game": "Pong", "teacher": "auto", "heads": "shared"}, "--heads shared: for several games"),
    ],
)
def test_what_several_games_cannot_do_is_refused(
    changes: dict[str, Any], message: str, two_games: DistillRunConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(replace(two_games, **changes))


def test_one_game_and_several_have_their_own_function(two_games: DistillRunConfig) -> None:
    with pytest.raises(ValueError, match="several; call policykd"):
        distill_run(two_games)
    assert not two_games.folder.exists()


def test_the_geometric_mean_needs_positive_shares() -> None:
    assert module._geometric_mean([0.5, 2.0]) == "100.0%"
    assert module._geometric_mean([0.25, 1.0, 1.0]) == "63.0%"
    assert module._geometric_mean([1.0, -0.1]) == "-"
