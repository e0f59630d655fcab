"""A run's folder goes on with the same settings, and with the same commit of a teacher on the Hub."""

import json
from pathlib import Path

import pytest

from policykd.runs import CONFIG, check_name, goes_on, pinned, start_run

MACHINE = {"device": "cpu", "threads": 1}


def test_a_run_goes_on_with_its_settings_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert not goes_on(run, {"seed": 1}, resume=True, machine=MACHINE)
    start_run(run, {"seed": 1}, machine=MACHINE, note="kept")
    assert json.loads((run / CONFIG).read_text())["note"] == "kept"
    assert goes_on(run, {"seed": 1}, resume=True, machine=MACHINE)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run already"):
        goes_on(run, {"seed": 1}, resume=False, machine=MACHINE)
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        goes_on(run, {"seed": 2}, resume=True, machine=MACHINE)
    assert goes_on(run, {"seed": 1}, resume=True, machine={**MACHINE, "threads": 2})
    assert "not bit for bit" in capsys.readouterr().out
    (run / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not what a run writes"):
        goes_on(run, {"seed": 1}, resume=True, machine=MACHINE)


def test_checkpoints_without_a_config_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="to tell whose; give another --name"):
        goes_on(tmp_path, {}, resume=True, machine=MACHINE)


@pytest.mark.parametrize("argument", ["auto", "hub:dqn", "hub:dqn@main", "hub:sb3/dqn-PongNoFrameskip-v4"])
def test_a_teacher_on_the_hub_stays_at_its_commit(argument: str, tmp_path: Path) -> None:
    assert pinned(argument, tmp_path) == argument
    teacher = {"ref": "hub:sb3/dqn-PongNoFrameskip-v4", "revision": "a" * 40}
    start_run(tmp_path, {"teacher": teacher}, machine=MACHINE, teacher_argument=argument)
    assert pinned(argument, tmp_path) == f"hub:sb3/dqn-PongNoFrameskip-v4@{'a' * 40}"
    assert pinned("hub:ppo", tmp_path) == "hub:ppo"


def test_a_local_teacher_has_no_commit(tmp_path: Path) -> None:
    start_run(tmp_path, {"teacher": {"ref": "a.zip", "revision": ""}}, machine=MACHINE, teacher_argument="a.zip")
    assert pinned("a.zip", tmp_path) == "a.zip"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "."])
def test_a_name_does_not_lead_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="--name must be the name of a folder"):
        check_name(name)
    check_name("x")
