"""Former names, until the last caller is gone: see `policykd.cli.errors` and `policykd.io.machine`."""

from policykd.cli.errors import (
    BAD_FILE,
    ENVIRONMENT,
    INTERRUPTED,
    NUMERICS,
    UNEXPECTED,
    USAGE,
    needs_extra,
    run_cli,
)
from policykd.io.machine import DeviceName, prepare_device, versions

exit_with_one_line = run_cli
__all__ = [
    "BAD_FILE",
    "ENVIRONMENT",
    "INTERRUPTED",
    "NUMERICS",
    "UNEXPECTED",
    "USAGE",
    "DeviceName",
    "exit_with_one_line",
    "needs_extra",
    "prepare_device",
    "run_cli",
    "versions",
]
