"""Argument groups of the commands: see `policykd.runs.groups`, where runs started from Python find them too."""

from policykd.runs.groups import (
    DeviceName,
    EvaluationArgs,
    MachineArgs,
    NotNegative,
    Positive,
    RunArgs,
    Seed,
    SeedArgs,
    TeacherArgs,
)

__all__ = [
    "DeviceName",
    "EvaluationArgs",
    "MachineArgs",
    "NotNegative",
    "Positive",
    "RunArgs",
    "Seed",
    "SeedArgs",
    "TeacherArgs",
]
