"""Environments: Atari as SB3 trains on it, Gymnasium, and adapters for vectors of other libraries."""

from typing import Any

EnvState = dict[str, Any]
"""position of environments, as JSON; only the environments know its content"""
