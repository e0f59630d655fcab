"""`policykd train-teacher`: trains a teacher with Stable-Baselines3."""

from policykd.cli.errors import needs_extra

with needs_extra("sb3"):
    from policykd.rl.train_teacher import TrainTeacherConfig, train_teacher


def run(args: TrainTeacherConfig) -> None:
    """Trains the teacher; progress is printed on the way."""
    train_teacher(args)
