"""Shows policies playing: the same as `policykd watch`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("watch")
