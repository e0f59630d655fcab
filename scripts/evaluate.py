"""Plays full episodes and prints their statistics: the same as `policykd evaluate`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("evaluate")
