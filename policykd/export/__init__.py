"""Policies as files that run without policykd: ONNX, int8, NumPy, C99 and SB3, each validated on real states.

The names are imported when they are first used: a run that compiles its teacher needs one exporter, not all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policykd.export.artifacts import ExportManifest, Validation, export, validate
    from policykd.export.formats import FORMATS, Artifact, ExportSource, FormatName, check_format, make_artifact

__all__ = [
    "FORMATS",
    "Artifact",
    "ExportManifest",
    "ExportSource",
    "FormatName",
    "Validation",
    "check_format",
    "export",
    "make_artifact",
    "validate",
]

_IN_ARTIFACTS = ("ExportManifest", "Validation", "export", "validate")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "artifacts" if name in _IN_ARTIFACTS else "formats"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
