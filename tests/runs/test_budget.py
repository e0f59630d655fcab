"""A run with a budget ends when its student is as good as its teacher or no longer improves, and says which."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policykd.cli.main import execute
from policykd.evaluation.evaluate import periodic_evaluation
from policykd.evaluation.teacher_check import TeacherCheck
from policykd.io.files import BadFile
from policykd.runs import budget as module
from policykd.runs import distill_run as distill_module
from policykd.runs.budget import BUDGETS, Budget, StageResult, decide, stage_ends
from policykd.runs.config import DistillRunConfig
from policykd.runs.distill_run import distill_run
from policykd.runs.folder import load_results


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([(0.99, 0.1)], "reached"),
        ([(1.2, 0.1)], "reached"),
        ([(0.5, 0.1)], None),
        ([(0.5, 0.1), (0.9, 0.05)], None),
        ([(0.5, 0.1), (0.51, 0.099)], "stalled"),
        ([(0.5, 0.1), (0.3, 0.2)], "stalled"),
        ([(0.5, 0.1), (0.51, 0.05)], None),  # the returns are noisy: the KL fell by half
        ([(0.5, 0.1), (0.51, float("nan"))], None),
        ([(0.2, 0.4), (0.4, 0.3), (0.6, 0.2), (0.8, 0.1)], "spent"),
        ([(0.2, 0.4), (0.4, 0.3), (0.6, 0.2), (0.98, 0.1)], "reached"),
    ],
)
def test_the_rule(stages: list[tuple[float, float]], reason: str | None) -> None:
    stop = decide([StageResult(*stage) for stage in stages], "standard", 5)
    assert (stop and stop.reason) == reason
    if stop:
        assert (stop.num_rounds, stop.max_rounds) == (5 * 2 ** (len(stages) - 1), 40)


def test_the_sentence_of_a_result_has_the_next_step() -> None:
    reached = decide([StageResult(0.991, 0.1)], "standard", 5)
    assert str(reached) == "Ended after 5 of at most 40 rounds: the student is within 2% of its teacher (99.1%)."
    stalled = decide([StageResult(0.5, 0.1), StageResult(0.5, 0.1)], "quick", 4)
    assert str(stalled) == (
        "Ended after 8 of at most 16 rounds: it no longer improves. The student keeps 50.0% of its teacher's score,"
        " less than the 95% asked for; try more --rounds or a larger --student."
    )
    spent = decide([StageResult(0.1 * k, 1.0 / k) for k in (1, 2, 3)], "quick", 4)
    assert "the budget is spent" in str(spent)
    assert str(spent).endswith("try --budget full.")


def test_an_unknown_budget_is_refused(tiny: DistillRunConfig) -> None:
    with pytest.raises(ValueError, match="--budget must be one of none, quick, standard, full, not 'huge'"):
        distill_run(replace(tiny, budget="huge"))  # type: ignore[arg-type]
    assert not tiny.folder.exists()


def test_a_larger_budget_begins_with_the_stages_of_a_smaller_one() -> None:
    ends = [stage_ends(name, 3) for name in BUDGETS]
    assert ends[0] == (3,)
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ends))


@pytest.fixture
def budgeted(tiny: DistillRunConfig) -> DistillRunConfig:
    return replace(tiny, rounds=1, budget="quick", eval_every=DistillRunConfig.eval_every)


def learned(run: Path) -> list[str]:
    names = ("student.safetensors", "metrics.jsonl", "evaluations.npz")
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names]


@pytest.mark.usefixtures("flickers")
def test_a_run_trains_stage_by_stage(budgeted: DistillRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_KL_DECREASE", -1e9)  # every stage improves
    result = distill_run(budgeted)
    run = budgeted.folder / "Pong/r"
    assert result.stop is not None
    assert (result.stop.reason, result.stop.num_rounds, result.num_updates) == ("spent", 4, 8)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_states"] for row in rows] == [32, 64, 96, 128]
    assert [row["learning_rate"] < 1e-9 for row in rows] == [True, True, False, True]  # 0 at the end of every stage
    with np.load(run / "evaluations.npz") as arrays:
        assert arrays["num_updates"].tolist() == [2, 4, 8]
        assert arrays["results"].shape == (3, distill_module.NUM_STAGE_EPISODES)
    assert load_results(run) == result
    assert str(result.stop) in (run / "results.md").read_text()
    # The same budget is shown again; a larger one continues, a smaller one or other rounds are refused.
    assert distill_run(replace(budgeted, resume=True)) == result
    execute("resume", [str(run), "--budget", "standard"])
    lengthened = load_results(run)
    assert lengthened is not None
    assert lengthened.stop is not None
    assert (lengthened.stop.budget, lengthened.num_updates) == ("standard", 16)
    with pytest.raises(ValueError, match=r"fewer rounds \(8 before, 4 now\)"):
        distill_run(replace(budgeted, resume=True))
    with pytest.raises(ValueError, match="leave it out, and raise --budget instead"):
        execute("resume", [str(run), "--rounds", "2"])
    with pytest.raises(ValueError, match="was started with --budget standard"):
        execute("resume", [str(run), "--budget", "none", "--rounds", "9"])


@pytest.mark.usefixtures("flickers")
def test_a_run_ends_early_when_its_student_is_good_enough(
    budgeted: DistillRunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUDGETS, "quick", Budget(0.9, 2))
    result = distill_run(budgeted)
    assert result.stop is not None
    assert (result.stop.reason, result.num_updates) == ("reached", 2)


@pytest.mark.usefixtures("flickers")
@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_an_interrupted_evaluation_changes_nothing(
    num_calls: int, budgeted: DistillRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first stage, in the second, before the last: the run continues with the same bytes."""
    monkeypatch.setattr(module, "MIN_KL_DECREASE", -1e9)
    distill_run(replace(budgeted, folder=tmp_path / "whole"))
    play: Callable[..., Any] = periodic_evaluation
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        return play(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "periodic_evaluation", interrupted)
        with pytest.raises(KeyboardInterrupt, match="resume with"):
            distill_run(budgeted)
    execute("resume", [str(budgeted.folder / "Pong/r")])
    assert learned(budgeted.folder / "Pong/r") == learned(tmp_path / "whole/Pong/r")


@pytest.mark.usefixtures("flickers")
def test_the_games_that_decide_are_not_those_of_the_result(
    budgeted: DistillRunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended because of a few lucky games would otherwise report them as its result."""
    monkeypatch.setitem(BUDGETS, "quick", Budget(0.9, 2))
    result = distill_run(replace(budgeted, eval_episodes=distill_module.NUM_STAGE_EPISODES))
    with np.load(budgeted.folder / "Pong/r/evaluations.npz") as arrays:
        assert tuple(arrays["results"][-1]) != result.student.protocols["noop_sampled"].returns


@pytest.mark.usefixtures("flickers")
def test_the_games_of_a_teacher_without_a_known_return_are_played_once(
    budgeted: DistillRunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TeacherCheck, "goal", lambda *_: (None, -100.0))
    monkeypatch.setitem(BUDGETS, "quick", Budget(0.9, 2))
    result = distill_run(budgeted)
    assert result.stop is not None
    assert result.stop.reason == "reached"
    assert f"playing {distill_module.NUM_STAGE_EPISODES} games, noop_sampled" in capsys.readouterr().out
    monkeypatch.setitem(BUDGETS, "standard", Budget(0.9, 3))
    execute("resume", [str(budgeted.folder / "Pong/r"), "--budget", "standard"])
    assert f"playing {distill_module.NUM_STAGE_EPISODES} games" not in capsys.readouterr().out


@pytest.mark.usefixtures("flickers")
def test_a_teacher_no_better_than_chance_is_no_goal(
    budgeted: DistillRunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TeacherCheck, "goal", lambda *_: (None, 1000.0))
    with pytest.raises(ValueError, match=r"--budget quick: the teacher's return .* is no better than a random policy"):
        distill_run(budgeted)
    assert not (budgeted.folder / "Pong/r/config.json").exists()


@pytest.mark.usefixtures("flickers")
def test_a_lost_evaluation_is_one_line(budgeted: DistillRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_KL_DECREASE", -1e9)
    distill_run(budgeted)
    run = budgeted.folder / "Pong/r"
    (run / "evaluations.npz").unlink()
    with pytest.raises(BadFile, match="lacks the evaluation after 1 rounds, by which the budget is decided"):
        execute("resume", [str(run), "--budget", "standard"])


def test_periodic_evaluations_are_those_of_the_stages(budgeted: DistillRunConfig) -> None:
    with pytest.raises(
        ValueError, match="--eval-every 3: --budget quick evaluates where the run may end; leave it at 5"
    ):
        distill_run(replace(budgeted, eval_every=3))
    assert not budgeted.folder.exists()
