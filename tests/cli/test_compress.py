"""`policykd compress` on a tiny budget, in this process."""

import json
from pathlib import Path

import pytest

from policykd.agents.card import Provenance
from policykd.agents.student import load_student, make_student, save_student
from policykd.agents.teacher import load_teacher
from policykd.cli.main import execute
from policykd.compression import comparison
from policykd.compression.comparison import read_comparison
from policykd.evaluation.evaluate import Evaluation
from policykd.evaluation.results import FinishedGames

SMALL = ["--updates", "20", "--batch-size", "8", "--held-out", "0.2"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, without states of its own."""
    run = tmp_path / "Pong" / "small"
    provenance = Provenance(game="Pong", teacher=load_teacher(game="Pong").record)
    save_student(make_student("0.3%", 6), run, provenance)
    return run


@pytest.fixture(autouse=True)
def few_calibration_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "CALIBRATION_STATES", 64)


def test_a_student_is_compressed_and_the_same_command_continues(
    run: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--states", str(dataset), "--episodes", "0", *SMALL]
    execute("compress", [*words, "--method", "structured+int8", "--sparsity", "0.3"])
    folder = run.parent / "compression"
    assert "| student+structured:0.3+int8 |" in capsys.readouterr().out
    assert load_student(folder / "student+structured-0.3+int8").shape.widths != load_student(run).shape.widths
    assert (folder / "student+structured-0.3+int8" / "policy.int8.onnx").is_file()
    assert not (folder / "pareto.svg").exists()
    execute("compress", [*words, "--method", "structured+int8", "--sparsity", "0.3"])
    assert "made in" not in capsys.readouterr().out


def test_several_recipes_give_one_table_and_one_picture(
    run: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FinishedGames, "play", lambda *args, **more: Evaluation((1.0, 2.0), (9, 9), 0))
    execute("compress", [str(run), "--states", str(dataset), "--episodes", "2", *SMALL, "--compare", "student", "0.1%"])
    folder = run.parent / "compression"
    assert set(read_comparison(folder).rows) == {"teacher", "student", "0.1%", "random"}
    assert (folder / "pareto.svg").read_text().startswith("<?xml")
    assert "| 0.1% | distilled |" in (folder / "compression.md").read_text()
    assert json.loads((folder / "compression.json").read_text())["settings"]["updates"] == 20


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--updates", "30"], "--updates must be a positive multiple of 20, not 30"),
        (["--compare", "8pct"], "8pct: starts with '8pct', expected student, teacher or a size"),
        (["--method", "pruning"], "unknown method 'pruning'"),
        (["--sparsity", "1.5"], "expected a sparsity"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--seed", "99999999999999999999"], "--seed must be at least 0"),
        (["--name", "../x"], "--name must be the name of a folder"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(
    words: list[str], reason: str, run: Path, dataset: Path
) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        execute("compress", [str(run), "--states", str(dataset), *words])
    assert "\n" not in str(refused.value)
    assert not (run.parent / "compression").exists()


@pytest.mark.slow
def test_an_interrupted_comparison_continues_with_real_games(run: Path, dataset: Path) -> None:
    words = [str(run), "--states", str(dataset), "--episodes", "1", *SMALL, "--compare", "0.1%", "1%", "1%+int8"]
    original = FinishedGames.play

    def interrupt(*args: object, **more: object) -> Evaluation:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinishedGames, "play", interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute("compress", words)
    assert FinishedGames.play is original
    weights = run.parent / "compression" / "0.1pct" / "student.safetensors"
    before = weights.stat().st_mtime_ns
    execute("compress", words)
    assert weights.stat().st_mtime_ns == before
    assert set(read_comparison(run.parent / "compression").rows) == {"teacher", "0.1%", "1%", "1%+int8", "random"}
