import pytest
import torch

from policykd.agents.networks import num_parameters
from policykd.agents.student import Student, make_student
from policykd.compression.fine_tuning import FineTuning
from policykd.compression.networks import factorize
from policykd.compression.recipes import apply_recipe


def test_full_rank_computes_the_same_outputs() -> None:
    student = make_student("1%", 6)
    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    whole = factorize(student, 32)
    assert whole.shape.rank == 32
    torch.testing.assert_close(whole(obs), student(obs), atol=1e-5, rtol=1e-4)


def test_it_is_the_best_approximation_of_its_rank(teacher_student: Student) -> None:
    weight = teacher_student.state_dict()["net.dense.0.weight"]
    thin = factorize(teacher_student, 8)
    weights = thin.state_dict()
    product = weights["net.dense.1.weight"] @ weights["net.dense.0.weight"]
    left_out = torch.linalg.svdvals(weight.double())[8:]
    assert float((product - weight).norm()) == pytest.approx(float(left_out.norm()), rel=1e-4)
    assert torch.equal(weights["net.dense.1.bias"], teacher_student.state_dict()["net.dense.0.bias"])
    assert torch.equal(weights["net.dense.2.weight"], teacher_student.state_dict()["net.dense.1.weight"])
    # As docs/compression.md says, rank 8 has the parameters of the 7 % student.
    assert num_parameters(thin) == pytest.approx(num_parameters(make_student("7%", 6)), rel=0.02)


def test_it_is_fine_tuned(tuning: FineTuning) -> None:
    student = make_student("1%", 6)
    tuned = apply_recipe("student+low-rank:4", student, tuning)
    assert tuned.shape.rank == 4
    assert not tuned.training
    assert tuning.measure(tuned) != tuning.measure(factorize(student, 4))


@pytest.mark.parametrize("rank", [0, 33])
def test_invalid_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 32"):
        factorize(make_student("1%", 6), rank)


def test_a_factorized_layer_is_not_factorized_again() -> None:
    with pytest.raises(ValueError, match="rank 4 already"):
        factorize(factorize(make_student("1%", 6), 4), 2)
