"""Distils Stable-Baselines3 agents into compact student policies, and measures what the compression cost.

The public API is `__all__`. The names are imported when they are first used, so that `import policykd` takes
milliseconds.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policykd.agents.student import load_student, make_student, save_student
    from policykd.agents.teacher import load_teacher
    from policykd.envs.make import make_env
    from policykd.evaluation.evaluate import evaluate
    from policykd.loop import DistillConfig, distill
    from policykd.runs.config import DistillRunConfig
    from policykd.runs.distill_run import distill_run
    from policykd.runs.folder import RunResult

    __version__: str

__all__ = [
    "DistillConfig",
    "DistillRunConfig",
    "RunResult",
    "__version__",
    "distill",
    "distill_run",
    "evaluate",
    "load_student",
    "load_teacher",
    "make_env",
    "make_student",
    "save_student",
]

_MODULES = {
    "DistillConfig": "loop",
    "DistillRunConfig": "runs.config",
    "RunResult": "runs.folder",
    "distill": "loop",
    "distill_run": "runs.distill_run",
    "evaluate": "evaluation.evaluate",
    "load_student": "agents.student",
    "load_teacher": "agents.teacher",
    "make_env": "envs.make",
    "make_student": "agents.student",
    "save_student": "agents.student",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("policykd")
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
