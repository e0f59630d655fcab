"""The teaching example computes what the package computes."""

import pytest
import torch

import policykd
from examples.distill_pong import Args, main


def test_the_example_gives_the_same_weights_as_distill(capsys: pytest.CaptureFixture[str]) -> None:
    """More updates than are drawn at once, and rounds in which both act."""
    args = Args(student="0.1%", rounds=6, states_per_round=160, updates_per_round=260, batch_size=16, eval_episodes=0)
    found = main(args).state_dict()
    student = policykd.make_student(args.student, 6, seed=args.seed)
    config = policykd.DistillConfig(
        rounds=args.rounds,
        states_per_round=args.states_per_round,
        updates_per_round=args.updates_per_round,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        optimizer="adam",
        seed=args.seed,
    )
    envs = policykd.make_env(args.game, args.num_envs, args.seed)
    *_, last = policykd.distill(policykd.load_teacher(game=args.game), student, envs, config)
    assert all(torch.equal(found[name], weights) for name, weights in student.state_dict().items())
    assert f"KL {last.train['kl']:.4f} nats" in capsys.readouterr().out
