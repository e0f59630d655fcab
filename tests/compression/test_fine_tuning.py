from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policykd.agents.networks import FrameNet
from policykd.agents.student import Student, make_student, packed_weights
from policykd.compression.fine_tuning import ROUNDS, FineTuning, train_from_scratch
from policykd.compression.networks import pixel_unit, teacher_as_student, with_normalized_input
from policykd.losses import ActionNLL


def test_the_teachers_network_as_a_student_computes_the_teachers_outputs(
    tuning: FineTuning, teacher_student: Student, obs: Tensor
) -> None:
    assert torch.equal(teacher_student(obs), tuning.teacher(obs))
    kl, agreement = tuning.measure(teacher_student)
    assert kl == pytest.approx(0.0, abs=1e-6)
    assert agreement == 1.0
    with pytest.raises(ValueError, match="cannot be pruned"):
        teacher_as_student(replace(tuning.teacher, net=tuning.teacher))


def test_normalizing_the_input_changes_no_output(tuning: FineTuning, teacher_student: Student, obs: Tensor) -> None:
    new = tuning.prepare(teacher_student)
    assert isinstance(new.net, FrameNet)
    assert float(new.net.centre) > 0.0
    assert float(new.net.scale) < 255.0
    torch.testing.assert_close(new(obs), teacher_student(obs), atol=1e-4, rtol=0.0)
    assert pixel_unit(teacher_student) == 1.0
    first = new.net.first.weight * pixel_unit(new)
    torch.testing.assert_close(first, teacher_student.net.first.weight)  # type: ignore[union-attr]
    again = with_normalized_input(new, obs[:, -1])
    torch.testing.assert_close(again(obs), teacher_student(obs), atol=1e-4, rtol=0.0)


def test_training_keeps_the_input_normalization_of_a_prepared_student(tuning: FineTuning) -> None:
    """The loop fits it again, to the same frames."""
    student = tuning.prepare(make_student("0.1%", 6))
    before = [buffer.clone() for buffer in student.buffers()]
    next(tuning.train(student, 1e-9, num_rounds=1))
    assert all(torch.equal(one, other) for one, other in zip(before, student.buffers(), strict=True))


def test_the_budget_is_spent_and_no_held_out_state_is_trained_on(tuning: FineTuning) -> None:
    assert list(tuning.train(make_student("0.1%", 6), 1e-3, ActionNLL())) == [*range(1, ROUNDS + 1)]
    first = len(tuning.replay) - tuning.replay.num_held_out
    held_out = {tuning.replay.gather(torch.tensor([row])).numpy().tobytes() for row in range(first, len(tuning.replay))}
    calibration = {state.numpy().tobytes() for state in tuning.calibration_states(300)}
    assert len(calibration) > 100
    assert not calibration & held_out
    for updates in (0, 30):
        with pytest.raises(ValueError, match=f"multiple of 20, not {updates}"):
            replace(tuning.settings, updates=updates)


def test_the_learning_rate_of_a_part_is_that_of_the_whole_budget(tuning: FineTuning) -> None:
    """The last part of the schedule trains with almost no learning rate, the middle with a large one."""
    changes = []
    for first_round in (8, ROUNDS - 1):
        student = make_student("0.1%", 6)
        before = torch.cat([p.detach().flatten() for p in student.parameters()])
        assert list(tuning.train(student, 1e-2, first_round=first_round, num_rounds=1)) == [first_round + 1]
        changes.append(float((torch.cat([p.detach().flatten() for p in student.parameters()]) - before).abs().max()))
    assert changes[1] < 0.1 * changes[0]


def test_soft_targets_and_hard_labels_give_two_students_of_one_size(tuning: FineTuning) -> None:
    soft = train_from_scratch("0.1%", tuning)
    hard = train_from_scratch("0.1%", tuning, ActionNLL())
    untrained = make_student("0.1%", 6)
    assert soft.shape == hard.shape == untrained.shape
    assert not soft.training
    assert len({packed_weights(student) for student in (soft, hard, untrained)}) == 3
    assert packed_weights(train_from_scratch("0.1%", tuning)) == packed_weights(soft)


def test_kl_is_from_teacher_to_student(tuning: FineTuning) -> None:
    student = make_student("1%", 6)
    kl, _ = tuning.measure(student)
    rows_N = tuning.replay.states_from(len(tuning.replay) - tuning.replay.num_held_out)
    with torch.inference_mode():
        p_NA, q_NA = (policy(tuning.replay.gather(rows_N)).softmax(dim=1) for policy in (tuning.teacher, student))
    assert kl == pytest.approx(float((p_NA * (p_NA / q_NA).log()).sum(dim=1).mean()), rel=1e-4)
    assert kl != pytest.approx(float((q_NA * (q_NA / p_NA).log()).sum(dim=1).mean()), rel=1e-2)
