"""`policykd distill-rl`: distils a teacher into a student inside reinforcement learning."""

from policykd.cli.errors import needs_extra

with needs_extra("sb3"):
    from policykd.runs.distill_rl_run import DistillRLConfig, distill_rl_run


def run(args: DistillRLConfig) -> None:
    """Runs the distillation; progress and results are printed on the way."""
    distill_rl_run(args)
