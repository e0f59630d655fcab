"""Distils Stable-Baselines3 Atari agents into compact policies, and proves what was lost.

The names below are imported when they are first used, so that `import policykd` costs milliseconds. The loop is
`policykd.legacy.loop.distill`: a module and a function of one name cannot both stand here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policykd.agents.student import load_student, make_student, save_student
    from policykd.agents.teacher import load_teacher
    from policykd.envs.atari import make_atari
    from policykd.envs.make import make_env
    from policykd.evaluation.evaluate import evaluate, evaluate_on_atari
    from policykd.legacy.train_state import make_learner

__all__ = [
    "evaluate",
    "evaluate_on_atari",
    "load_student",
    "load_teacher",
    "make_atari",
    "make_env",
    "make_learner",
    "make_student",
    "save_student",
]

_HOMES = {
    "load_student": "agents.student",
    "make_student": "agents.student",
    "save_student": "agents.student",
    "load_teacher": "agents.teacher",
    "make_atari": "envs.atari",
    "make_env": "envs.make",
    "make_learner": "legacy.train_state",
    "evaluate": "evaluation.evaluate",
    "evaluate_on_atari": "evaluation.evaluate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
