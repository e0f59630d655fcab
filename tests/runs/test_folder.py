"""A run is resumed with the same settings and the same teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import JsonValue

from policykd.agents.card import TeacherRecord
from policykd.io.files import BadFile
from policykd.io.typed import write_json
from policykd.runs.config import check_name
from policykd.runs.folder import (
    CONFIG,
    NOTES,
    Machine,
    RunRecord,
    check_resumable,
    ensure_run_dir_exists,
    lengthen_run,
    load_run_config,
    load_started_run,
    pin_teacher_revision,
    resume_command,
    write_run_config,
)

TEACHER = TeacherRecord(ref="hub:sb3/dqn-PongNoFrameskip-v4", sha256="1" * 64, revision="a" * 40, algorithm="DQN")
RECORD = RunRecord(
    subcommand="distill",
    settings={"game": "Pong", "seed": 1, "rounds": 3, "loss": {"kind": "ForwardKL"}, "teacher": "hub:dqn"},
    machine=Machine(device="cpu", threads=1),
    teacher=TEACHER,
    inputs={"dataset": "2" * 64},
)


def changed(**settings: JsonValue) -> RunRecord:
    return replace(RECORD, settings={**RECORD.settings, **settings})


def check(run: Path, now: RunRecord) -> None:
    check_resumable(run, load_run_config(run), now, may_change={"rounds"})


def test_a_run_is_resumed_on_request(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert load_started_run(run, resume=True) is None
    write_run_config(run, RECORD)
    assert load_started_run(run, resume=True) == load_run_config(run) == RECORD
    with pytest.raises(ValueError, match="holds a run already; resume it with --resume"):
        load_started_run(run, resume=False)


def test_every_changed_setting_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C06."""
    write_run_config(tmp_path, RECORD)
    check(tmp_path, RECORD)
    check(tmp_path, changed(rounds=9))
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"\(seed was 1, is 2; loss was {.*}, is {.*}\); give another --name"):
        check(tmp_path, changed(seed=2, loss={"kind": "ActionNLL"}))
    with pytest.raises(ValueError, match=r"teacher was DQN hub:.* \(sha256 111.*\), is PPO x.zip \(sha256 333"):
        check(tmp_path, replace(RECORD, teacher=TeacherRecord(ref="x.zip", sha256="3" * 64, algorithm="PPO")))
    with pytest.raises(ValueError, match="dataset was '222"):
        check(tmp_path, replace(RECORD, inputs={"dataset": "4" * 64}))


def test_the_same_teacher_may_have_moved(tmp_path: Path) -> None:
    write_run_config(tmp_path, RECORD)
    check(tmp_path, replace(RECORD, teacher=replace(TEACHER, ref="copy.zip", revision="")))


def test_another_machine_is_a_warning_and_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C07, and C09: under another path."""
    write_run_config(tmp_path / "run", RECORD)
    run = (tmp_path / "run").rename(tmp_path / "moved")
    for threads in (2, 3):
        check(run, replace(RECORD, machine=Machine(device="cpu", threads=threads)))
        error = capsys.readouterr().err
        assert error.startswith(f"warning: {run}: resumed on another machine or with other versions")
        assert f"(threads was 1, is {threads})" in error
    notes = (run / NOTES).read_text().splitlines()
    assert [note.partition(" not bit for bit the same ")[2] for note in notes] == [
        "(threads was 1, is 2)",
        "(threads was 1, is 3)",
    ]


def test_a_budget_may_grow(tmp_path: Path) -> None:
    write_run_config(tmp_path, RECORD)
    assert lengthen_run(tmp_path, RECORD, RECORD) == RECORD
    longer = lengthen_run(tmp_path, RECORD, changed(rounds=5, resume=True))
    assert longer == load_run_config(tmp_path) == changed(rounds=5)
    assert "lengthened from 3 to 5 rounds" in (tmp_path / NOTES).read_text()
    with pytest.raises(ValueError, match=r"fewer rounds \(5 before, 4 now\)"):
        lengthen_run(tmp_path, longer, changed(rounds=4))


def test_a_budget_of_stages_may_grow_from_its_own_stages(tmp_path: Path) -> None:
    write_run_config(tmp_path, RECORD)
    with pytest.raises(ValueError, match="was started with --budget none"):
        lengthen_run(tmp_path, RECORD, changed(budget="quick"))
    started = changed(budget="quick")
    assert lengthen_run(tmp_path, started, changed(budget="full")).settings["budget"] == "full"
    assert "lengthened from at most 12 to at most 96 rounds" in (tmp_path / NOTES).read_text()


def test_every_changed_setting_is_remembered(tmp_path: Path) -> None:
    write_run_config(tmp_path, RECORD)
    moved = replace(
        changed(eval_episodes=100, teacher="copy.zip", trust_pickle=True),
        teacher=replace(TEACHER, ref="copy.zip", revision=""),
    )
    lengthen_run(tmp_path, RECORD, moved)
    resumed = load_run_config(tmp_path)
    assert resumed.settings == changed(eval_episodes=100, teacher="copy.zip").settings
    assert pin_teacher_revision("copy.zip", resumed) == "copy.zip"


OLD = '{"settings": {"game": "Pong", "loss": "ForwardKL()"}, "command": "x", "versions": {}, "machine": {}}'


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"settings": 3}', "[" * 99_999, OLD])
def test_a_damaged_or_old_config_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(BadFile, match=r"config\.json: invalid .*another version of policykd, or damaged") as caught:
        load_run_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_checkpoints_without_a_config_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(BadFile, match=r"checkpoints but no config\.json; give another --name"):
        load_started_run(tmp_path, resume=True)


def test_a_run_that_was_moved_away_is_noticed(tmp_path: Path) -> None:
    write_json(tmp_path / CONFIG, RECORD)
    ensure_run_dir_exists(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="moved or removed; resume it"):
        ensure_run_dir_exists(tmp_path)


def test_the_command_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "a run"
    monkeypatch.setattr("sys.argv", ["policykd", "distill"])
    assert resume_command(run) == "policykd distill"
    write_run_config(run, RECORD)
    assert resume_command(run) == f"policykd resume '{run}'"


@pytest.mark.parametrize("reference", ["auto", "hub:dqn", "hub:dqn@main"])
def test_a_teacher_on_the_hub_stays_at_its_commit(reference: str) -> None:
    assert pin_teacher_revision(reference, None) == reference
    started = changed(teacher=reference)
    assert pin_teacher_revision(reference, started) == f"{TEACHER.ref}@{TEACHER.revision}"
    assert pin_teacher_revision("hub:ppo", started) == "hub:ppo"
    local = replace(started, teacher=replace(TEACHER, revision=""))
    assert pin_teacher_revision(reference, local) == reference


def test_every_teacher_of_an_ensemble_stays_at_its_commit() -> None:
    ref = f"hub:sb3/dqn-PongNoFrameskip-v4@{'a' * 40}+bundled:ppo"
    ensemble = TeacherRecord(ref=ref, sha256="1" * 64, algorithm="ENSEMBLE")
    started = replace(changed(teacher="hub:dqn+bundled"), teacher=ensemble)
    assert pin_teacher_revision("hub:dqn+bundled", started) == ref
    assert pin_teacher_revision("hub:dqn", started) == "hub:dqn"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "."])
def test_a_name_does_not_lead_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="--name must be the name of a folder"):
        check_name(name)
    check_name("x")
