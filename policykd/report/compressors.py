"""Comparisons of compression methods in reports: a page of their own, and a section next to a run."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from policykd.compression.comparison import (
    COMPARISON_FILE,
    RANDOM,
    Comparison,
    Row,
    normalised_interval,
    read_comparison,
)
from policykd.compression.pareto import draw_pareto
from policykd.evaluation.results import PolicyResult
from policykd.io.files import write_atomically
from policykd.report.page import REPORT_FILE, render


@dataclass(frozen=True)
class ComparedMethods:
    """A comparison of compression methods."""

    comparison: Comparison
    source: str
    """name of its folder"""
    pareto: bytes = b""
    """SVG of returns against costs"""
    has_this_run: bool = False
    """whether the run of the report is in that picture"""
    normalised_interval = staticmethod(normalised_interval)


def write_comparison_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of a comparison of compression methods and returns its path.

    Raises:
        BadFile: compression.json is missing or damaged.
    """
    comparison = read_comparison(folder)
    # Without random play no episodes were asked for.
    picture = draw_pareto(comparison) if RANDOM in comparison.rows else b""
    compared = ComparedMethods(comparison, folder.resolve().name, picture)
    page = render("comparison.html", compared=compared)
    write_atomically(folder / REPORT_FILE, page.encode())
    return folder / REPORT_FILE


def newest_comparison(run: Path, student: PolicyResult, teacher_sha256: str) -> ComparedMethods | None:
    """Returns the newest comparison of compression methods next to a run that has the run's teacher, if there is one.

    A damaged one is left out with a warning: it must not cost a finished run its report.
    """
    for path in sorted(run.resolve().parent.glob(f"*/{COMPARISON_FILE}"), key=os.path.getmtime, reverse=True):
        try:
            comparison = read_comparison(path.parent)
            if comparison.settings.teacher_sha256 != teacher_sha256:
                continue
            # The bytes are those of the file, as in the comparison. The latency is left out: it was measured in torch,
            # those of the comparison in ONNX Runtime.
            this_run = Row(
                recipe=f"this run: {run.resolve().name}",
                family="this run",
                settings=comparison.settings,
                num_parameters=student.num_parameters,
                num_macs=student.num_macs,
                num_bytes=(run / "student.safetensors").stat().st_size,
                protocols=student.protocols,
            )
            picture = draw_pareto(comparison, this_run=this_run)
            return ComparedMethods(comparison, path.parent.name, picture, has_this_run=True)
        except (OSError, ValueError) as error:
            print(f"warning: {error}; left out of the report", file=sys.stderr)
    return None
