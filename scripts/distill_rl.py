"""`python scripts/distill_rl.py` is `policykd distill-rl`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("distill-rl")
