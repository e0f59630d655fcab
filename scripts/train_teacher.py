"""`python scripts/train_teacher.py` is `policykd train-teacher`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("train-teacher")
