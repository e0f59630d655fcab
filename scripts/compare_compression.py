"""Compresses the student of a run: the same as `policykd compress`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("compress")
