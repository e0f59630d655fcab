"""A run's folder goes on with the same settings, with the same commit of a teacher, in one process alone."""

import json
from pathlib import Path

import pytest

from policykd.io.files import BadFile
from policykd.runs.folder import CONFIG, NOTES, check_name, goes_on, pinned, start_run

MACHINE = {"device": "cpu", "threads": 1}


def test_a_run_goes_on_with_its_settings_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert not goes_on(run, {"seed": 1}, resume=True, machine=MACHINE)
    start_run(run, {"seed": 1}, machine=MACHINE, note="kept")
    assert json.loads((run / CONFIG).read_text())["note"] == "kept"
    assert goes_on(run, {"seed": 1}, resume=True, machine=MACHINE)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a run already"):
        goes_on(run, {"seed": 1}, resume=False, machine=MACHINE)
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        goes_on(run, {"seed": 2}, resume=True, machine=MACHINE)


def test_a_run_that_goes_on_elsewhere_says_so_and_notes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C07, and C09: under another path."""
    start_run(tmp_path / "run", {"seed": 1}, machine=MACHINE)
    run = (tmp_path / "run").rename(tmp_path / "moved")
    for threads in (2, 3):
        assert goes_on(run, {"seed": 1}, resume=True, machine={**MACHINE, "threads": threads})
        said = capsys.readouterr().err
        assert said.startswith(
            f"warning: {run}: goes on elsewhere than it was started, so not bit for bit the same run"
        )
        assert f"(threads was 1, is {threads})" in said
    notes = (run / NOTES).read_text().splitlines()
    assert [line[20:] for line in notes] == [
        f"goes on elsewhere than it was started, so not bit for bit the same run (threads was 1, is {threads})"
        for threads in (2, 3)
    ]


def test_all_changed_settings_are_told(tmp_path: Path) -> None:
    """C06."""
    start_run(tmp_path, {"seed": 1, "rounds": 2, "loss": "kl"}, machine=MACHINE)
    with pytest.raises(ValueError, match=r"\(seed was 1, is 2; loss was 'kl', is 'nll'\); give another --name"):
        goes_on(tmp_path, {"seed": 2, "rounds": 2, "loss": "nll"}, resume=True, machine=MACHINE)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"settings": 3}', '{"settings": {}, "versions": []}', "[" * 99_999]
)
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(
        BadFile, match=r"config\.json: damaged, or not what a run writes .*; give another --name"
    ) as caught:
        goes_on(tmp_path, {"seed": 1}, resume=True, machine=MACHINE)
    assert "\n" not in str(caught.value)


def test_checkpoints_without_a_config_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(BadFile, match="to tell whose; give another --name"):
        goes_on(tmp_path, {}, resume=True, machine=MACHINE)


def test_every_teacher_of_an_ensemble_stays_at_its_commit(tmp_path: Path) -> None:
    ref = f"hub:sb3/dqn-PongNoFrameskip-v4@{'a' * 40}+hub:sb3/ppo-PongNoFrameskip-v4@{'b' * 40}+bundled:ppo"
    teacher = {"algorithm": "ENSEMBLE", "ref": ref, "revision": ""}
    start_run(tmp_path, {"teacher": teacher}, machine=MACHINE, teacher_argument="hub:dqn+hub:ppo+bundled")
    assert pinned("hub:dqn+hub:ppo+bundled", tmp_path) == ref
    assert pinned("hub:dqn", tmp_path) == "hub:dqn"


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
