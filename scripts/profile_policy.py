"""Measures what policies cost in each runtime: the same as `policykd profile`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("profile")
