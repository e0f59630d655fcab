"""Distillation inside Stable-Baselines3's algorithms, and training of teachers."""
