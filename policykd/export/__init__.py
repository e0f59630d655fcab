"""Policies as files that run without policykd: ONNX, int8, NumPy, C99 and SB3, each validated on real states."""

from policykd.export.artifacts import Manifest, Validation, export, validate
from policykd.export.formats import FORMATS, Artifact, ExportSource, FormatName, check_format, make_artifact

__all__ = [
    "FORMATS",
    "Artifact",
    "ExportSource",
    "FormatName",
    "Manifest",
    "Validation",
    "check_format",
    "export",
    "make_artifact",
    "validate",
]
