"""Imports or exports states: the same as `policykd states`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("states")
