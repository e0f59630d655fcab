"""Pareto picture of a comparison: return against parameters, arithmetic, bytes and latency, as SVG."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from policykd.compression.comparison import RANDOM, Comparison, Row
from policykd.evaluation.evaluate import ProtocolName

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {
    "num_parameters": "parameters",
    "num_macs": "multiply-accumulates",
    "num_bytes": "bytes on disk",
    "latency_microseconds": "batch-1 latency, µs",
}
"""field of a row -> label of its axis"""

# Families differ in color and marker, so that the picture can be read without telling colors apart.
MARKERS = {"teacher": "*", "student": "o", "distilled": "o", "hard labels": "v", "sharp targets": "p", "int8": "X"}
MARKERS |= {"magnitude": "s", "structured": "D", "low-rank": "P", "combined": "^"}


def draw_pareto(
    comparison: Comparison, *, protocol: ProtocolName = "noop_sampled", this_run: Row | None = None
) -> bytes:
    """Returns an SVG file of every row's mean return against its costs, with the Pareto front as a line.

    Returns are drawn minus the teacher's on a symmetric logarithmic axis, because rows differ near the teacher.

    Args:
        comparison: the rows; those without episodes of the protocol are left out.
        protocol: the protocol whose returns are drawn, with their intervals.
        this_run: another row, drawn larger.

    Raises:
        ValueError: the teacher or random play has no episodes of the protocol.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows.values() if protocol in row.protocols]
    references = {row.recipe: row.protocols[protocol].mean for row in rows if row.recipe in ("teacher", RANDOM)}
    if len(references) < 2:
        raise ValueError(f"the comparison has no episodes of teacher and random play under {protocol}")
    rows = [row for row in rows if row.recipe != RANDOM] + ([this_run] if this_run else [])
    # The hash salt and the missing date make the same comparison the same file.
    with matplotlib.rc_context({"svg.hashsalt": "policykd", "svg.fonttype": "path", "font.size": 9.0}):
        figure = Figure(figsize=(11.5, 9.4), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2, 2, sharey=True)
        for ax, (cost, title) in zip(panels.flat, COSTS.items(), strict=True):
            _draw_panel(ax, rows, cost, protocol, references)
            ax.set_xlabel(title)
        for ax in panels[:, 0]:
            ax.set_ylabel(f"return minus the teacher's, {protocol.replace('_', ' ')}")
        # One legend for all panels, without repetitions.
        handles, labels = panels[0, 0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=6, frameon=False)
        # Only a drawn figure knows where its texts are.
        figure.draw_without_rendering()
        for ax in panels.flat:
            _separate_names(ax)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "policykd"})
    return buffer.getvalue()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points (cost, return) that no cheaper point equals or beats, cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _draw_panel(
    ax: "Axes", rows: Sequence[Row], cost: str, protocol: ProtocolName, references: dict[str, float]
) -> None:
    teacher = references["teacher"]
    ax.set_xscale("log")
    # Linear within 2 % of the teacher's lead over random play, logarithmic below.
    gap = abs(teacher - references[RANDOM]) or 1.0
    ax.set_yscale("symlog", linthresh=0.02 * gap)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(visible=True, linewidth=0.6, color="#e2e8f0")
    for name, mean in references.items():
        ax.axhline(mean - teacher, color="#94a3b8", linewidth=1.0, linestyle="--" if name == RANDOM else "-")
    # Rows without a cost: the latency of a run in the report is torch's, not ONNX Runtime's.
    rows = [row for row in rows if getattr(row, cost)]
    points = [(float(getattr(row, cost)), row.protocols[protocol].mean - teacher) for row in rows]
    names = list(MARKERS)
    for row, point in zip(rows, points, strict=True):
        played = row.protocols[protocol]
        low, high = played.interval
        ax.errorbar(
            *point,
            yerr=[[max(0.0, played.mean - low)], [max(0.0, high - played.mean)]],
            marker=MARKERS.get(row.family, "h"),
            color=f"C{names.index(row.family)}" if row.family in names else "black",
            markersize=6.5 if row.family in names else 10.0,
            elinewidth=0.8,
            linestyle="none",
            label=row.family,
        )
    # Only points on the front have names; the table has all.
    front = pareto_front(points)
    ax.step([points[i][0] for i in front], [points[i][1] for i in front], where="post", color="#64748b", linewidth=1.0)
    for i in front:
        ax.annotate(rows[i].recipe, points[i], (4, 8), textcoords="offset points", fontsize=8.0)


def _separate_names(ax: "Axes") -> None:
    """Moves the names of a drawn panel up or down until none lies on another."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    placed: list[Bbox] = []
    for name in ax.texts:
        assert isinstance(name, Annotation)
        for height in (8, 18, 28, -14, -24, -34):
            name.xyann = (4, height)
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                break
        placed.append(box)
