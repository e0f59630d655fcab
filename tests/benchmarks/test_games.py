"""The table of many games: one tiny run that is interrupted, resumed and skipped, and tables of made-up returns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import games
import games_table
import pytest

from policykd.evaluation.evaluate import PROTOCOLS, Evaluation
from policykd.evaluation.results import PolicyResult, summarise_episodes
from policykd.runs import distill_run as distill_run_module
from policykd.runs.config import DistillRunConfig
from policykd.runs.folder import RunResult
from policykd.storage.checkpoints import save_checkpoint

TINY = "--student 0.1% --rounds 1 --states-per-round 160 --updates-per-round 5 --eval-episodes 1 --eval-every 0"
NAME = "games-bundled-ppo-0.3pct-seed0"


def words(folder: Path, *more: str) -> list[str]:
    return ["--only", "Pong", "--size", "0.3%", "--folder", str(folder), *more, "--", *TINY.split(), "--threads", "1"]


def refuse(config: object) -> None:
    raise AssertionError("a finished cell was run again")


def test_a_cell_is_interrupted_resumed_and_then_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []

    def save_and_stop(state: Any, *args: Any, **kwargs: Any) -> None:
        save_checkpoint(state, *args, **kwargs)
        rounds.append(state.round)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_run_module, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt, match="policykd resume"):
        games.main(words(tmp_path))
    run = tmp_path / "Pong" / NAME
    assert not (run / "results.json").exists()
    games.main(words(tmp_path, "--table"))
    assert (tmp_path / "games.md").read_text().endswith(f"\n- {run}: not finished\n")

    # The round that was saved is not done again.
    monkeypatch.setattr(distill_run_module, "save_checkpoint", lambda *args, **kwargs: rounds.append(-1))
    games.main(words(tmp_path))
    assert rounds == [1]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1

    monkeypatch.setattr(games, "distill_run", refuse)
    games.main(words(tmp_path))
    text = (tmp_path / "games.md").read_text()
    assert "\n| Pong (bundled:ppo) | 0.3% | 1 of 1 | 1 | " in text
    assert "not finished" not in text
    assert (tmp_path / "games.svg").read_text().startswith("<?xml")

    # Other settings are an error of the cell, and are not in the table.
    with pytest.raises(ValueError, match="1 of 1 cells failed"):
        games.main([*words(tmp_path), "--batch-size", "8"])
    assert f"- {run}: made with other settings (batch_size)" in (tmp_path / "games.md").read_text()


def test_a_failed_cell_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []

    def run(config: DistillRunConfig) -> None:
        if config.game == "Breakout":
            raise ValueError("missing.zip: file or folder\nnot found")
        finished.append(config.game)

    monkeypatch.setattr(games, "distill_run", run)
    more = ["--teacher", "Breakout=missing.zip", "--teacher", "pong=bundled:dqn", "--seed", "0", "--size", "1%"]
    with pytest.raises(ValueError, match="1 of 3 cells failed"):
        games.main(["--folder", str(tmp_path), *more])
    assert finished == ["Pong", "Pong"]
    folder = tmp_path / "Breakout" / "games-missing-1pct-seed0"
    assert f"- {folder}: ValueError: missing.zip: file or folder not found\n" in (tmp_path / "games.md").read_text()
    # The error is gone once the cell succeeds.
    monkeypatch.setattr(games, "distill_run", lambda config: None)
    games.main(["--folder", str(tmp_path), *more])
    assert f"- {folder}: not finished\n" in (tmp_path / "games.md").read_text()


def test_cells_are_default_commands(tmp_path: Path) -> None:
    args = games.Args(folder=tmp_path, teacher=("Breakout=some/agent.zip",))
    found = games.cells(args, ["--threads", "1"])
    assert len(found) == 9 * len(games.tasks(args.teacher))
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    assert [task.label for task in games.tasks(args.teacher)][-1] == "Breakout, public (agent.zip)"
    (first,) = (cell for cell in found if (cell.task.game, cell.size, cell.seed) == ("Pong", "7%", 2))
    default = DistillRunConfig(game="Pong", teacher="bundled:ppo", student="7%", seed=2, eval_episodes=100)
    assert first.config == replace(default, name=first.config.name, folder=tmp_path, resume=True, threads=1)
    with pytest.raises(ValueError, match="same file name"):
        games.cells(games.Args(teacher=("Breakout=a/agent.zip", "Breakout=b/agent.zip")), [])
    with pytest.raises(ValueError, match=r"--teacher Breakout: give GAME=FILE\.zip"):
        games.tasks(["Breakout"])
    with pytest.raises(ValueError, match="no cell"):
        games.main(["--only", "Breakout"])


def policy(returns: Sequence[float]) -> PolicyResult:
    episodes = summarise_episodes(Evaluation(tuple(returns), (9,) * len(returns), 0))
    return PolicyResult(num_parameters=9, num_macs=9, num_bytes=4, protocols=dict.fromkeys(PROTOCOLS, episodes))


def result(student: Sequence[float], teacher: Sequence[float] = (20.0,)) -> RunResult:
    return RunResult(teacher=policy(teacher), student=policy(student), random=policy([0.0]), comparison={})


def test_the_table_has_every_game_and_the_statistics_over_games() -> None:
    rows = [
        games_table.Row("Pong", "7%", [result([20.0, 20.0]), result([10.0, 10.0])]),
        games_table.Row("Pong", "1%", [result([5.0, 5.0])]),
        games_table.Row("Qbert", "7%", [result([40.0, 40.0]), result([20.0, 20.0])]),
        games_table.Row("Qbert", "1%", [result([30.0, 30.0])]),
        games_table.Row("Enduro", "7%", [result([20.0]), None]),
        games_table.Row("Enduro", "1%", [None]),
        # Its teacher is no better than random play.
        games_table.Row("Breakout", "1%", [result([1.0], teacher=[0.0])]),
    ]
    lines = games_table.table(rows).splitlines()
    assert lines[2] == "| Pong | 7% | 2 of 2 | 2 | " + " | ".join(["75.0% [50.0%, 100.0%] | 2 of 4"] * 2) + " |"
    assert lines[5] == "| Qbert | 1% | 1 of 1 | 2 | " + " | ".join(["150.0% [150.0%, 150.0%] | 1 of 2"] * 2) + " |"
    assert lines[6].startswith("| Enduro | 7% | 1 of 2 | 1 | 100.0% ")
    assert lines[7].startswith("| Breakout | 1% | 1 of 1 | 1 | not defined | 1 of 1 |")
    (large, small) = lines[13:15]
    # Games whose runs are all finished: scores 1, 0.5, 2, 1, and 0.25, 1.5.
    values = [cell.strip().partition(" [")[0] for cell in large.strip("|").split("|")]
    assert values == ["7%", "2 of 4", "100.0%", "112.5%", "112.5%", "12.5%", "106.1%", "101.7%", "75.0%"]
    values = [cell.strip().partition(" [")[0] for cell in small.strip("|").split("|")]
    assert values == ["1%", "2 of 4", "87.5%", "87.5%", "87.5%", "37.5%", "61.2%", "", "not defined"]
    assert len({line.count("|") for line in lines[11:15]}) == 1


def test_episodes_on_a_card_count_once() -> None:
    shared = games_table.Row("Pong", "7%", [result([1.0], teacher=[20.0, 18.0])] * 3)
    assert shared.returns("noop_sampled").teacher == [20.0, 18.0]
    own = games_table.Row("Pong", "7%", [result([1.0], teacher=[20.0]), result([1.0], teacher=[18.0])])
    assert own.returns("noop_sampled").teacher == [20.0, 18.0]


def test_the_picture_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    rows = [games_table.Row("Pong", "7%", [result([20.0, 10.0])]), games_table.Row("Pong", "0.3%", [None])]
    for name in ("a.svg", "b.svg"):
        games_table.draw(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
