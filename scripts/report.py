"""Writes report.html for a finished run: the same as `policykd report`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("report")
