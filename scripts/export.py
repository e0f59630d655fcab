"""Writes a policy as files that run without policykd: the same as `policykd export`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("export")
