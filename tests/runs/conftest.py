"""Games of noise that need no emulator, so that a whole run takes seconds."""

import importlib.util
from pathlib import Path

import pytest

from policykd.runs.config import DistillRunConfig


@pytest.fixture
def flickers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the games of tests/faults/warm.py in place of Atari's."""
    spec = importlib.util.spec_from_file_location("warm", Path(__file__).parents[1] / "faults" / "warm.py")
    assert spec
    assert spec.loader
    warm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(warm)
    warm.play_flickers(monkeypatch.setattr)


@pytest.fixture
def tiny(tmp_path: Path) -> DistillRunConfig:
    """A run of three rounds."""
    return DistillRunConfig(
        game="Pong",
        name="r",
        folder=tmp_path / "runs",
        student="1%",
        rounds=3,
        states_per_round=32,
        updates_per_round=2,
        batch_size=32,
        num_envs=4,
        eval_every=2,
        eval_episodes=2,
        threads=1,
        device="cpu",
    )
