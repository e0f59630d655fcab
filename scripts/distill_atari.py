"""Distils a trained Stable-Baselines3 Atari agent into a compact student: `policykd distill`."""

from policykd.cli.main import run_command

if __name__ == "__main__":
    run_command("distill")
