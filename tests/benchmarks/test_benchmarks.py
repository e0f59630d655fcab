"""Every benchmark runs on a tiny budget; the numbers are not checked, only that they are there."""

import json
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import int8
import labelled_states
import loading
import methods
import numpy as np
import plateau
import pytest
import stages
import students
import summary
import torch

from policykd.agents.student import make_student, save_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.evaluation.costs import Latency
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation
from policykd.evaluation.results import PolicyResult, summarise_episodes
from policykd.io.typed import write_json
from policykd.replay import Replay
from policykd.runs.folder import RunResult

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(game="Pong")


@pytest.fixture(scope="module")
def replay(teacher: Teacher) -> Replay:
    found = labelled_states.labelled_states("Pong", teacher, 320, 0, teacher_plays=True)
    found.num_held_out = 64
    return found


@pytest.mark.parametrize("name", ["compression.sh", "methods.sh", "pong.sh"])
def test_shell_scripts_are_executable_and_name_files_that_exist(name: str) -> None:
    path = ROOT / "benchmarks" / name
    assert path.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(path)], check=True)
    for word in path.read_text().replace("'", " ").split():
        if word.startswith("benchmarks/") and word.endswith((".py", ".txt")):
            assert (ROOT / word).is_file()


def test_int8_agreement_is_printed_per_form(capsys: pytest.CaptureFixture[str]) -> None:
    int8.main(int8.Args(policies=("bundled:ppo",), states=16, seeds=1))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(int8.FORMS)
    assert all(line.startswith(f"bundled:ppo, seed 0, {form}: ") for line, form in zip(lines, int8.FORMS, strict=True))


def test_labelled_states_are_those_of_the_teacher(teacher: Teacher, replay: Replay) -> None:
    rows = torch.arange(16, 48)
    torch.testing.assert_close(teacher(replay.gather(rows)), replay.teacher_NA[rows], atol=1e-4, rtol=1e-4)
    random = labelled_states.labelled_states("Pong", teacher, 64, 0, teacher_plays=False)
    assert not torch.equal(random.frames[:65], replay.frames[:65])


def test_plateau_trains_every_kind_of_variant(teacher: Teacher, replay: Replay) -> None:
    for name, variant in plateau.VARIANTS.items():
        if name.startswith(("frames / 255, orth", "frames / 255, first", "centred and scaled, learning rate 8")):
            tiny = replace(variant, updates=3, batch_size=8)
            assert plateau.measure(tiny, teacher, replay, replay, seed=0) > 0.0


def test_students_are_timed_and_tabulated() -> None:
    student = make_student("0.1%", 6)
    obs = torch.zeros((students.BATCH_SIZE, 4, 84, 84), dtype=torch.uint8)
    rates = students.max_rates({"0.1%": students.update_call(student, obs)}, rounds=1)
    assert students.action_call(student.folded_net(), obs[:1].numpy())()
    base = Latency(median_us=500.0, p99_us=900.0, min_us=450.0, num_calls=9)
    latency = Latency(median_us=25.0, p99_us=40.0, min_us=20.0, num_calls=9)
    line = students.row("0.1%", 220_000, latency, base, rates["0.1%"])
    assert line.startswith("| 0.1% | 0.22 M | 25.0 (20.0) | 20 (22) | ")


def test_stages_measure_collection_and_networks(teacher: Teacher, replay: Replay) -> None:
    args = stages.Args(repetitions=1)
    assert str(stages.collection("Pong", 1)[0]).startswith("| collect Pong")
    rows = stages.networks(args, teacher, replay)
    assert len(rows) == 10
    assert all(value > 0.0 for row in rows for value in row.values)
    assert "cores" in stages.machine()


def test_stages_measure_checkpoints(teacher: Teacher, tmp_path: Path) -> None:
    rows = stages.storage(stages.Args(repetitions=1, num_states=64), teacher, tmp_path)
    assert [row.unit for row in rows] == ["ms", "s"]
    path = tmp_path / "table.json"
    write_json(path, stages.Table("machine", [0.0], rows=rows))
    assert json.loads(path.read_text())["rows"][0]["goal"] == "30 ms"


@pytest.mark.slow
def test_stages_measure_start_up_and_a_whole_run() -> None:
    assert len(stages.startup(1)) == 2
    assert len(stages.end_to_end("Pong")) > 3


@pytest.mark.parametrize("library", ["policykd", "SB3"])
def test_loading_measures_both_libraries(library: loading.Library) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is read from /proc, which only Linux has")
    threads = torch.get_num_threads()
    try:
        found = loading.measure(library, "PPO", loading.BUNDLED)
    finally:
        torch.set_num_threads(threads)
    assert found.first > 0.0
    assert found.num_bytes >= 0


def _result(mean: float, num_parameters: int) -> PolicyResult:
    games = summarise_episodes(Evaluation((mean, mean + 1.0, mean - 1.0), (9,) * 3, 0))
    protocols = dict.fromkeys(PROTOCOLS, games)
    return PolicyResult(num_parameters=num_parameters, num_macs=9, num_bytes=4, protocols=protocols)


@pytest.fixture
def results() -> RunResult:
    return RunResult(
        teacher=_result(19.0, 1_000),
        student=_result(18.0, 100),
        random=_result(-20.0, 0),
        comparison={},
        num_states_labelled=80,
        num_updates=7,
        wall_seconds={"rounds": 3.0},
    )


def test_summary_pools_seeds_and_draws(results: RunResult, tmp_path: Path) -> None:
    runs = [
        summary.Run(f"run{seed}", "7%", seed, "PPO", results, [1.0, 2.0], [0.3, 0.1], [float("nan"), 3.0])
        for seed in range(2)
    ]
    text = summary.table(runs)
    assert "| **7% student of PPO**, 2 seeds | 100 |" in text
    assert "| 7%, seed 1 |" in text
    assert text.endswith("run1: 80 states, 7 updates; rounds 3 s")
    summary.draw(runs, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="not finished"):
        summary.load_run(tmp_path)


def test_every_cell_of_the_methods_is_a_valid_command(tmp_path: Path) -> None:
    from policykd.cli.arguments import parse_args
    from policykd.runs.config import DistillRunConfig, check_config

    found = methods.cells(tmp_path, 2)
    assert len({cell.name for cell in found}) == len(found)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    for cell in [*methods.cells(tmp_path, 1), methods.reference(tmp_path, "ppo")]:
        if cell.command == "distill":
            config = parse_args(DistillRunConfig, cell.arguments[1:])
            check_config(config)
            assert config.name == cell.name
    assert parse_args(DistillRunConfig, methods.reference(tmp_path, "dqn").arguments[1:]).student == "4%"


def test_every_cell_inside_reinforcement_learning_is_a_valid_command(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    from policykd.cli.arguments import parse_args
    from policykd.runs import distill_rl_run as distill_rl

    for cell in methods.cells(tmp_path, 1):
        if cell.command == "distill-rl":
            distill_rl.check_config(parse_args(distill_rl.DistillRLConfig, cell.arguments[1:]))


def test_the_table_of_methods_counts_finished_seeds(
    results: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: Replay
) -> None:
    monkeypatch.setattr(methods, "load_results", lambda run: results if run.name.endswith("forward-kl-seed0") else None)
    monkeypatch.setattr(methods.Cell, "arguments", property(lambda self: ["distill"]))
    for cell in methods.cells(tmp_path, 1, "ppo-forward-kl"):
        save_student(make_student("0.1%", 6), cell.run)
    path = methods.held_out_file(tmp_path, "ppo")
    np.savez(path, obs=replay.gather(torch.arange(32)).numpy())
    lines = methods.table(tmp_path, 2, "ppo-forward-kl").splitlines()
    assert lines[-1].startswith("| forward-kl | 1 of 2 | ")
    assert len({line.count("|") for line in lines[3:]}) == 1


def test_bootstrapped_means_vary_over_seeds_and_games() -> None:
    generator = np.random.default_rng(0)
    means = methods.resampled_means([[0.0, 1.0], [10.0, 11.0]], generator)
    assert means.mean() == pytest.approx(5.5, abs=0.3)
    assert means.min() < 1.0
    assert means.max() > 10.0
