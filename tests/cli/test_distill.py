"""What `policykd distill --config` and `policykd resume` take from a file, and what never."""

from dataclasses import replace
from pathlib import Path

import pytest

from policykd.agents.card import TeacherRecord
from policykd.cli import distill, resume
from policykd.cli.main import execute
from policykd.runs.config import RESUMABLE_CHANGES, DistillRunConfig, to_settings
from policykd.runs.folder import Machine, RunRecord, check_resumable, write_run_config

RECORD = RunRecord(
    subcommand="distill",
    settings=to_settings(DistillRunConfig(game="Pong", seed=7, trust_pickle=True, teacher="hub:someone/agent")),
    machine=Machine(device="cpu", threads=1),
    teacher=TeacherRecord(ref="hub:someone/agent", sha256="1" * 64, algorithm="PPO"),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "Pong" / "r"
    write_run_config(folder, RECORD)
    return folder


def test_pickles_are_executed_only_by_a_flag_of_this_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config.json from somebody else must not switch it on."""
    config = ["--config", str(run / "config.json")]
    assert distill.parse(config, "policykd distill").seed == 7
    assert not distill.parse(config, "policykd distill").trust_pickle
    assert distill.parse([*config, "--trust-pickle"], "policykd distill").trust_pickle
    resumed: list[bool] = []
    monkeypatch.setattr(distill, "run", lambda args: resumed.append(args.trust_pickle))
    monkeypatch.setattr(resume, "load_command", lambda name: (distill.DistillArgs, distill.run))
    execute("resume", [str(run)])
    execute("resume", [str(run), "--trust-pickle"])
    assert resumed == [False, True]


def test_what_is_missing_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match="--game"):
        distill.parse([], "policykd distill")
    with pytest.raises(ValueError, match="--config needs a file"):
        distill.parse(["--game", "Pong", "--config"], "policykd distill")
    with pytest.raises(ValueError, match="nowhere: folder not found"):
        execute("resume", [str(run / "nowhere")])
    write_run_config(run, replace(RECORD, subcommand="distill-rl"))
    with pytest.raises(ValueError, match="a run of policykd distill-rl, not of distill"):
        distill.parse(["--config", str(run / "config.json")], "policykd distill")


def test_a_run_resumes_whether_or_not_pickles_may_be_executed(run: Path) -> None:
    now = replace(RECORD, settings={**RECORD.settings, "trust_pickle": False})
    check_resumable(run, RECORD, now, may_change=RESUMABLE_CHANGES)
