"""Checkpoints and datasets of states on disk."""
