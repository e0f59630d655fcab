"""The Pareto picture: return kept against parameters, arithmetic, bytes and time, as SVG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policykd.evaluation.evaluate import ProtocolName
from policykd.io.files import write_atomically
from policykd.spread_axis import SpreadTop
from policykd.viewer.colours import RANDOM, TEACHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {
    "num_parameters": "parameters",
    "num_macs": "multiply-accumulates",
    "num_bytes": "bytes on disk",
    "latency_microseconds": "batch-1 latency, µs",
}
"""field of a row -> what its axis is called"""

LOOKS: dict[str, tuple[str, str]] = {
    "teacher": (TEACHER, "*"),
    "distilled": ("#d97706", "o"),
    "sharpened": ("#ea580c", "p"),
    "hard labels": ("#a16207", "v"),
    "magnitude": ("#0d9488", "s"),
    "structured": ("#7c3aed", "D"),
    "low rank": ("#db2777", "P"),
    "int8": ("#475569", "X"),
    "combined": ("#16a34a", "^"),
}
"""family -> colour and marker; families differ in both, so that no eye needs to tell colours apart"""
OTHER = ("#111827", "h")
INK = "#0f172a"

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "svg.hashsalt": "policykd",
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "grid.color": "#e2e8f0",
}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the points (cost, return) that no cheaper one equals or beats, cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def draw_pareto(
    rows: Mapping[str, Mapping[str, Any]],
    to: Path | io.BytesIO,
    *,
    protocol: ProtocolName = "noop_sampled",
    highlight: str = "",
) -> None:
    """Draws the return of every row against what it costs, one panel a cost, logarithmic; the Pareto front as a line.

    The axis of returns is logarithmic in the points below the best, since there the rows differ.

    Rows of the families `teacher` and `random` are drawn as lines at their return, the teacher as a star too. Rows with
    no number for a cost are left out of its panel.

    Args:
        rows: as in compression.json: `family`, `label`, the `COSTS`, and `protocols`.
        to: an SVG file, or a buffer for one.
        protocol: whose mean return is drawn, with its interval.
        highlight: the name of a row to be drawn larger and named in bold, on the front or not.

    Raises:
        ValueError: no row has costs and games under this protocol.
    """
    import matplotlib  # slow to import
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    played = {name: row for name, row in rows.items() if protocol in row.get("protocols", {})}
    if not any(row.get("num_parameters") for row in played.values()):
        raise ValueError(f"no row with costs and games under {protocol}; measure one first")
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # its stub spells out every key
        figure = Figure(figsize=(11.5, 9.4), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2, 2, sharey=True)
        for ax, (cost, title) in zip(panels.flat, COSTS.items(), strict=True):
            _panel(ax, played, cost, title, protocol, highlight)
        for ax in panels[:, 0]:
            ax.set_ylabel(f"return, {protocol.replace('_', ' ')}")
        _spread_the_top(panels[0, 0], [y for row in played.values() for y in row["protocols"][protocol]["interval"]])
        handles, labels = panels[0, 0].get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True))
        figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=6, frameon=False)
        figure.draw_without_rendering()  # from here on it is known where everything stands
        for ax in panels.flat:
            _part_names(ax)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "policykd"})
    if isinstance(to, io.BytesIO):
        to.write(buffer.getvalue())
    else:
        write_atomically(to, buffer.getvalue())


def _panel(
    ax: "Axes", rows: Mapping[str, Mapping[str, Any]], cost: str, title: str, protocol: str, highlight: str
) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    ax.set_xlabel(title)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.grid(visible=True, linewidth=0.6)
    ax.set_axisbelow(True)
    for row in rows.values():
        if row["family"] in ("teacher", "random"):
            label, colour = ("teacher's", TEACHER) if row["family"] == "teacher" else ("random play", RANDOM)
            mean = row["protocols"][protocol]["mean"]
            ax.axhline(mean, color=colour, linewidth=1.0, linestyle="--", label=label)
    drawn = {name: row for name, row in rows.items() if row.get(cost) and row["family"] != "random"}
    for name, row in drawn.items():
        _point(ax, row, cost, row["protocols"][protocol], 10.0 if name == highlight else 6.5)
    points = [(float(row[cost]), float(row["protocols"][protocol]["mean"])) for row in drawn.values()]
    costs = [x for x, _ in points]
    if points and max(costs) < 1.01 * min(costs):  # matplotlib's own margin around one cost rounds to no width
        ax.set_xlim(min(costs) / 2.0, max(costs) * 2.0)
    front, names = pareto_front(points), list(drawn)
    x, y = [points[i][0] for i in front], [points[i][1] for i in front]
    ax.step(x, y, where="post", color=INK, linewidth=1.0, alpha=0.55, label="Pareto front", zorder=1)
    always = (i for i, (name, row) in enumerate(drawn.items()) if name == highlight or row["family"] == "teacher")
    for i in {*front, *always}:
        weight, is_last = "bold" if names[i] == highlight else "normal", points[i][0] == max(costs)
        where: dict[str, Any] = {"xytext": (-4 if is_last else 4, 8), "ha": "right" if is_last else "left"}
        text = drawn[names[i]]["label"]
        ax.annotate(text, points[i], textcoords="offset points", fontsize=8.0, weight=weight, color=INK, **where)


def _point(ax: "Axes", row: Mapping[str, Any], cost: str, games: Mapping[str, Any], size: float) -> None:
    """Draws one row with the interval of its mean."""
    colour, marker = LOOKS.get(row["family"], OTHER)
    mean, (low, high) = games["mean"], games["interval"]
    ax.errorbar(
        row[cost],
        mean,
        yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
        color=colour,
        marker=marker,
        markersize=13.0 if row["family"] == "teacher" else size,
        markeredgecolor="white",
        markeredgewidth=0.7,
        elinewidth=0.8,
        linestyle="none",
        label=row["family"],
    )


def _part_names(ax: "Axes") -> None:
    """Moves the names of a panel's points up or down until none lies on another."""
    from matplotlib.text import Annotation

    taken: list[Any] = []
    for name in sorted(ax.texts, key=lambda t: t.get_window_extent().x0):
        assert isinstance(name, Annotation)
        for height in (8, 18, 28, 38, -14, -24, -34, -44):
            name.xyann = (name.xyann[0], height)
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _spread_the_top(ax: "Axes", ends: Sequence[float]) -> None:
    """Makes the axis of returns logarithmic in the points below the best, where the rows differ."""
    from matplotlib.ticker import FixedLocator, NullLocator

    spread = SpreadTop.over(ends)
    ax.set_yscale("function", functions=(spread.forward, spread.inverse))
    ax.yaxis.set_major_locator(FixedLocator(spread.ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(*spread.ends(min(ends)))
