"""Policies by the names that users give them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from policykd.agents.card import Provenance
from policykd.agents.references import PRETRAINED
from policykd.agents.student import Student, make_student, save_student
from policykd.agents.teacher import Teacher, load_teacher, load_teachers
from policykd.evaluation.policies import (
    find_run,
    infer_game,
    load_named_policy,
    load_run_teacher,
)
from policykd.io.files import BadFile


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    teacher = load_teacher("bundled:ppo", game="Pong").record
    save_student(make_student("0.1%", 6), folder, Provenance(game="Pong", teacher=teacher))
    return folder


def copied(run: Path, folder: Path, **fields: object) -> Path:
    """A copy of a run with other fields in its card."""
    card = json.loads((run / "student.json").read_text()) | fields
    (folder / "student.safetensors").write_bytes((run / "student.safetensors").read_bytes())
    (folder / "student.json").write_text(json.dumps(card))
    return folder


def test_a_run_is_its_folder_or_its_card(run: Path) -> None:
    assert find_run(str(run)) == find_run(str(run / "student.json")) == run
    assert find_run("bundled:ppo") is None
    student = load_named_policy(str(run), "Pong")
    assert isinstance(student.policy, Student)
    assert student.name == run.name


def test_a_teacher_is_its_reference() -> None:
    teacher = load_named_policy("bundled:dqn", "Pong")
    assert isinstance(teacher.policy, Teacher)
    assert teacher.name == "bundled:dqn"


def test_the_teacher_of_a_run_is_the_very_archive(run: Path) -> None:
    teacher = load_run_teacher(run)
    assert isinstance(teacher.policy, Teacher)
    assert teacher.policy.path == PRETRAINED / "ppo-Pong.zip"


def test_a_revision_is_not_forgotten(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = {"ref": "hub:sb3/ppo-PongNoFrameskip-v4", "revision": "5e1f", "sha256": "0"}
    loader = "policykd.evaluation.policies.load_named_policy"
    monkeypatch.setattr(loader, lambda ref, game, **_: pytest.fail(f"{ref} on {game}"))
    with pytest.raises(pytest.fail.Exception, match="hub:sb3/ppo-PongNoFrameskip-v4@5e1f on Pong"):
        load_run_teacher(copied(run, tmp_path, teacher=teacher))


def test_several_teachers_are_mixed_as_the_run_mixed_them(run: Path, tmp_path: Path) -> None:
    mixed = load_teachers("bundled:ppo+bundled:dqn", "0.9,0.1", game="Pong")
    folder = copied(run, tmp_path, teacher=asdict(mixed.record))
    config = {"settings": {"teacher_weights": "0.9,0.1", "seed": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    found = load_run_teacher(folder)
    obs = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.policy(obs), mixed(obs))
    (folder / "config.json").unlink()  # equal weights are another teacher
    with pytest.raises(BadFile, match="not the archive"):
        load_run_teacher(folder)


def test_a_teacher_that_has_moved_is_the_same_archive(run: Path, tmp_path: Path) -> None:
    folder, moved = copied(run, tmp_path), tmp_path / "moved.zip"
    moved.write_bytes((PRETRAINED / "ppo-Pong.zip").read_bytes())
    assert load_run_teacher(folder, ref=str(moved)).name == str(moved)
    with pytest.raises(BadFile, match=r"bundled:dqn: not the archive .*; say where it is: --teacher REF"):
        load_run_teacher(folder, ref="bundled:dqn", alternative="say where it is: --teacher REF")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": None}, "does not record its teacher; give --against REF or none"),
        ({"teacher": {"ref": "bundled:ppo", "revision": "", "sha256": "00"}}, "not the archive that"),
    ],
)
def test_a_card_that_leads_to_another_teacher_is_refused(
    fields: dict[str, object], message: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadFile, match=message):
        load_run_teacher(copied(run, tmp_path, **fields))


def test_the_game_is_given_or_recorded_by_the_first_that_does(run: Path) -> None:
    assert (
        infer_game(["bundled:ppo"])
        == infer_game([str(run)])
        == infer_game([str(PRETRAINED / "ppo-Pong.zip")])
        == "Pong"
    )
    assert infer_game([str(run)], "ALE/Breakout-v5") == "Breakout"
    assert infer_game(["hub:dqn", str(run)]) == "Pong"
    with pytest.raises(ValueError, match="hub:dqn: its game is not recorded; give --game"):
        infer_game(["hub:dqn"])


@pytest.mark.parametrize("game", ["Breakout", "Qbert"])
def test_a_policy_of_another_game_is_refused(game: str, run: Path) -> None:
    """Even where that has as many actions."""
    with pytest.raises(BadFile, match="it was made for another game, Pong"):
        load_named_policy(str(run), game)


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_an_invalid_card_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(content)
    with pytest.raises(BadFile, match=r"student\.json: .*give the folder of a finished run"):
        infer_game([str(tmp_path)])
