from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policykd.agents.networks import FrameNet
from policykd.agents.student import Student, make_student, packed_weights
from policykd.compression.compressors import (
    ROUNDS,
    Distilled,
    Fit,
    Unchanged,
    hard_labels,
    pixel_unit,
    recentred,
    teacher_as_student,
)
from policykd.legacy.losses import ActionNLL


def test_the_teachers_network_as_a_student_scores_as_the_teacher(
    fit: Fit, teacher_student: Student, obs: Tensor
) -> None:
    assert torch.equal(teacher_student(obs), fit.teacher(obs))
    assert teacher_student.shape.widths == (32, 64, 64)
    kl, agreement = fit.measure(teacher_student)
    assert kl == pytest.approx(0.0, abs=1e-6)
    assert agreement == 1.0
    assert Unchanged()(teacher_student, fit) is teacher_student


def test_another_input_scaling_leaves_the_scores(fit: Fit, teacher_student: Student, obs: Tensor) -> None:
    new = fit.begin(teacher_student)
    assert isinstance(new.net, FrameNet)
    assert float(new.net.centre) > 0.0
    assert float(new.net.scale) < 255.0
    torch.testing.assert_close(new(obs), teacher_student(obs), atol=1e-4, rtol=0.0)
    assert pixel_unit(teacher_student) == 1.0
    first = new.net.first.weight * pixel_unit(new)
    torch.testing.assert_close(first, teacher_student.net.first.weight)  # type: ignore[union-attr]
    again = recentred(new, obs[:, -1])
    torch.testing.assert_close(again(obs), teacher_student(obs), atol=1e-4, rtol=0.0)


def test_the_budget_is_the_same_for_all_and_no_held_out_state_is_fitted_to(fit: Fit) -> None:
    student = make_student("0.1%", 6)
    learner = fit.learner(student, is_trained=False)
    rows = [rows_B for rows_B, _ in learner.draws(50, 8, 0, len(fit.replay) - fit.replay.num_held_out, 0.0)]
    assert int(torch.cat(rows).max()) < len(fit.replay) - fit.replay.num_held_out
    rounds = list(fit.rounds(fit.learner(student, is_trained=False), ActionNLL(), 1e-3))
    assert [r.num_updates for r in rounds] == [fit.updates // ROUNDS * (k + 1) for k in range(ROUNDS)]
    with pytest.raises(ValueError, match="--updates 30 is not a multiple of 20"):
        Fit.check_updates(30)


def test_soft_targets_and_hard_labels_are_two_students_of_one_budget(fit: Fit) -> None:
    soft, hard, new = Distilled("0.1%")(make_student("1%", 6), fit), hard_labels("0.1%"), make_student("0.1%", 6)
    told = hard(make_student("1%", 6), fit)
    assert hard == replace(Distilled("0.1%"), loss=ActionNLL())  # at the same learning rate
    assert soft.shape == told.shape == new.shape
    assert not soft.training
    found = [packed_weights(student) for student in (soft, told, new)]
    assert len(set(found)) == 3
    assert packed_weights(Distilled("0.1%")(make_student("1%", 6), fit)) == found[0]


def test_kl_is_the_students_from_the_teachers_side(fit: Fit) -> None:
    student = make_student("1%", 6)
    kl, _ = fit.measure(student)
    rows_N = torch.arange(len(fit.replay) - fit.replay.num_held_out, len(fit.replay))
    rows_N = rows_N[~torch.isin(rows_N, fit.replay.history)]
    with torch.inference_mode():
        p_NA, q_NA = (policy(fit.replay.gather(rows_N)).softmax(dim=1) for policy in (fit.teacher, student))
    assert kl == pytest.approx(float((p_NA * (p_NA / q_NA).log()).sum(dim=1).mean()), rel=1e-4)
    assert kl != pytest.approx(float((q_NA * (q_NA / p_NA).log()).sum(dim=1).mean()), rel=1e-2)


def test_a_teacher_without_a_network_of_ours_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match="cannot be pruned"):
        teacher_as_student(replace(fit.teacher, net=fit.teacher))
