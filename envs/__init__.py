"""Environments: Atari as SB3 trains on it, Gymnasium, and adapters for vectors of other libraries."""
