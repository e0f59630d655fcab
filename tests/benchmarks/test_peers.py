"""The peers' benchmark as far as the packages that are installed here allow."""

from pathlib import Path

import evaluate_snapshots
import numpy as np
import policykd_run
import pytest
import snapshots
import torch

from policykd.agents.networks import FrameNet
from policykd.agents.student import make_student
from policykd.loop import DistillConfig


def test_a_run_writes_snapshots_that_are_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DistillConfig(rounds=2, states_per_round=32, updates_per_round=2, batch_size=8)
    policykd_run.main(policykd_run.Args(tmp_path, num_envs=4, config=config))
    points = snapshots.read_curve(tmp_path)
    assert [(point.steps, point.updates) for point in points] == [(32, 2), (64, 4)]

    played: list[int] = []

    def play(student: object, games: int, temperature: float, *, seed: int) -> list[float]:
        played.append(games)
        return [18.5] * games

    monkeypatch.setattr(evaluate_snapshots, "play", play)
    args = evaluate_snapshots.Args((tmp_path,))
    evaluate_snapshots.main(args)
    assert played == [8, 24, 8, 24]
    assert "reached 18.09: " in capsys.readouterr().out
    evaluate_snapshots.main(args)
    assert len(played) == 4


def test_a_snapshot_is_the_student_that_was_saved(tmp_path: Path) -> None:
    student = make_student("7%", 6)
    assert isinstance(student.net, FrameNet)
    student.net.centre.fill_(87.0)
    student.net.scale.fill_(30.0)
    writer = snapshots.SnapshotWriter(tmp_path)
    writer.save(list(student.parameters()), steps=1, updates=1, scaling=(87.0, 30.0))
    obs = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(evaluate_snapshots.load_student_snapshot(tmp_path / "000.pt")(obs), student(obs))
    assert evaluate_snapshots.reaches([19.0] * 30, 18.0)
    assert not evaluate_snapshots.reaches([19.0] * 8, 18.0)


@pytest.mark.slow
def test_a_snapshot_plays(tmp_path: Path) -> None:
    assert len(evaluate_snapshots.play(make_student("7%", 6), 1, 1.0, seed=0)) == 1


def test_demonstrations_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    import demonstrations

    teacher = Path(__file__).parents[2] / "agents" / "pretrained" / "ppo-Pong.zip"
    demonstrations.main(demonstrations.Args(tmp_path, teacher, num_states=8, num_envs=2))
    assert np.load(tmp_path / "observations.npy").shape == (8, 4, 84, 84)
    assert len(np.load(tmp_path / "actions.npy")) == 8


@pytest.mark.parametrize(
    ("module", "package"),
    [("imitation_run", "imitation"), ("qdagger_run", "cleanrl"), ("sb3_distill_run", "sb3_distill")],
)
def test_peers_import_their_packages(module: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed; benchmarks/peers/README.md says how")
    __import__(module)
