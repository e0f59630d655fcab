import pytest
import torch

from policykd.agents.networks import num_parameters
from policykd.agents.student import Student, make_student
from policykd.compression.compressors import Fit
from policykd.compression.low_rank import LowRank, factorised


def test_all_singular_values_give_the_same_scores() -> None:
    student = make_student("1%", 6)
    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    whole = factorised(student, 32)
    assert whole.shape.rank == 32
    torch.testing.assert_close(whole(obs), student(obs), atol=1e-5, rtol=1e-4)


def test_it_is_the_best_approximation_of_its_rank(teacher_student: Student) -> None:
    weight = teacher_student.state_dict()["net.dense.0.weight"]
    thin = factorised(teacher_student, 8).state_dict()
    product = thin["net.dense.1.weight"] @ thin["net.dense.0.weight"]
    left_out = torch.linalg.svdvals(weight.double())[8:]
    assert float((product - weight).norm()) == pytest.approx(float(left_out.norm()), rel=1e-4)
    assert torch.equal(thin["net.dense.1.bias"], teacher_student.state_dict()["net.dense.0.bias"])
    assert torch.equal(thin["net.dense.2.weight"], teacher_student.state_dict()["net.dense.1.weight"])


@pytest.mark.parametrize(("rank", "size"), [(94, "25%"), (8, "7%")])
def test_the_ranks_of_the_comparison_match_the_students_in_parameters(
    rank: int, size: str, teacher_student: Student
) -> None:
    student = make_student(size, 6)  # type: ignore[arg-type]
    assert num_parameters(factorised(teacher_student, rank)) == pytest.approx(num_parameters(student), rel=0.02)


def test_it_is_tuned(fit: Fit) -> None:
    begin = make_student("1%", 6)
    tuned = LowRank(4)(begin, fit)
    assert tuned.shape.rank == 4
    assert fit.measure(tuned) != fit.measure(factorised(begin, 4))


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_the_layer_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 32"):
        factorised(make_student("1%", 6), rank)
    with pytest.raises(ValueError, match="rank 4 already"):
        factorised(factorised(make_student("1%", 6), 4), 2)
