"""Charts as SVG for an HTML page, drawn by matplotlib; the page's style sheet sets their colours and font."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import Markup

from policykd.evaluation.results import PolicyRole, ProtocolResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Look = Literal["teacher", "student", "random", "second"]
"""colour of a policy or curve, a variable of the style sheet"""

# Placeholders that matplotlib takes as colours; `_to_chart` replaces them by variables of report.css.
COLOURS = {
    "teacher": "#00ff00",
    "student": "#00ff01",
    "random": "#00ff02",
    "second": "#00ff03",
    "rule": "#00ff04",
    "faint": "#00ff05",
    "ink": "#00ff06",
}
WIDTH_INCHES = 5.0  # 360 units of the SVG, about the width of a phone: text keeps its size there
MAX_BARS = 64
MINUS = "\N{MINUS SIGN}"
PLAIN = "{x:,.6g}"
"""format of numbers on axes"""


@dataclass(frozen=True)
class Chart:
    """A chart with its texts; `svg` is the content of an svg element."""

    title: str
    caption: str
    svg: Markup
    view_box: str
    legend: tuple[tuple[str, str], ...] = ()
    """(label, look) of what is drawn"""


@dataclass(frozen=True)
class Series:
    """One curve; a value that is not finite leaves a gap."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    style: str = "o-"
    """matplotlib's format of marker and line"""


def line_chart(title: str, unit: str, series: Sequence[Series], *, x_label: str, scale: str = "linear") -> Chart:
    """Returns curves over a common x axis, the last one on top.

    Args:
        title: quantity on the y axis.
        unit: its unit.
        series: curves.
        x_label: quantity on the x axis.
        scale: "linear", "log", or "%" for shares.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    with _figure(title, 3.2) as figure:
        ax = figure.subplots()
        for line in series:
            ax.plot(line.x, line.y, line.style, color=COLOURS[line.look], clip_on=False)
        if scale == "log":
            ax.set_yscale("log")
            # Two ticks per decade, since a KL divergence often spans less than two.
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(x_label)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
        ax.yaxis.set_major_formatter("{x:.0%}" if scale == "%" else PLAIN)
        return _to_chart(figure, title, unit, tuple((line.label, line.look) for line in series))


def cost_chart(title: str, costs: Mapping[PolicyRole, float], played: Mapping[PolicyRole, ProtocolResult]) -> Chart:
    """Returns mean returns with intervals against a cost, and a line for random play.

    Costs are logarithmic. Returns are logarithmic in the points below the best one, because good policies differ there
    and random play is far away.
    """
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

    ends = [played["random"].mean, *(end for role in costs for end in played[role].interval)]
    # Within `unit` of the top the axis is almost linear; the unit is a power of ten, for round ticks.
    unit = 10.0 ** math.floor(math.log10(max(max(ends) - min(ends), 1e-6) / 20.0))
    top = math.ceil(max(ends) / unit) * unit
    with _figure(title, 3.2) as figure:
        ax = figure.subplots()
        ax.set_xscale("log")
        ax.set_yscale(
            "function",
            functions=(
                lambda y: -np.log1p(np.maximum(top - y, -0.4 * unit) / unit),
                lambda place: top - unit * np.expm1(-place),
            ),
        )
        ax.set_ylim(min(ends) - 0.15 * (top - min(ends)), top + 0.25 * unit)
        ax.axhline(ends[0], color=COLOURS["random"], linestyle=":")
        ax.annotate("random play", (1.0, ends[0]), (0, 3), ("axes fraction", "data"), "offset points", ha="right")
        for role, cost in costs.items():
            mean = played[role].mean
            ax.errorbar(cost, mean, _errors(played[role]), fmt="o", color=COLOURS[role], ms=8.0)
            # The name is to the right of the point, but to the left of the last one.
            offset, side = (-9, "right") if cost == max(costs.values()) else (9, "left")
            name = ax.annotate(role, (cost, mean), (offset, 0), textcoords="offset points")
            name.set(ha=side, va="center", color=COLOURS["ink"], weight="bold")
        ax.margins(x=0.15)
        ax.set_xlabel(title)
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
        ax.yaxis.set_major_locator(FixedLocator([top - unit * below for below in (0, 1, 2, 5, 10, 20, 40, 100, 200)]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(PLAIN)
        caption = "; ".join(f"{role} {cost:,.0f}, return {played[role].mean:,.2f}" for role, cost in costs.items())
        return _to_chart(figure, title, caption)


def histogram(title: str, played: Mapping[PolicyRole, ProtocolResult]) -> Chart:
    """Returns how often each return occurred, one row per policy, with the mean and its interval below."""
    edges = bin_edges([value for result in played.values() for value in result.returns])
    captions = []
    with _figure(title, 3.4) as figure:
        rows = figure.subplots(len(played), sharex=True)
        for ax, (role, result) in zip(rows, played.items(), strict=True):
            counts, _ = np.histogram(result.returns, edges)
            seen = np.flatnonzero(counts)
            highest = counts.max()
            ax.bar(edges[seen], counts[seen], 0.88 * (edges[1] - edges[0]), align="edge", color=COLOURS[role])
            ax.errorbar(
                result.mean, -0.16 * highest, xerr=_errors(result), fmt="o", color=COLOURS[role], markersize=5.0
            )
            # The room below the axis is for the interval.
            ax.set_ylim(-0.3 * highest, highest)
            ax.axhline(0.0, color=COLOURS["rule"])
            ax.set_yticks([0.35 * highest], [role], color=COLOURS["ink"], weight="bold")
            ax.grid(visible=False)
            ax.xaxis.set_major_formatter(PLAIN)
            low, high = result.interval
            captions.append(f"{role} {result.mean:,.2f} [{low:,.2f}, {high:,.2f}] in {result.num_episodes} games")
        rows[-1].set_xlabel("episodic return")
        return _to_chart(figure, title, "; ".join(captions))


def bin_edges(returns: Sequence[float]) -> np.ndarray:
    """Returns the edges of histogram bars that each hold the same number of possible returns, at most `MAX_BARS`.

    Returns are whole multiples of the smallest reward (1 in Pong, 20 in Seaquest); bars of another width would show a
    comb that is not in the data. Returns that are not integers get equal bars.
    """
    low = min(returns)
    high = max(returns)
    if any(abs(value - low - round(value - low)) > 1e-6 for value in returns):
        return np.linspace(low, high, 43)
    step = math.gcd(*(round(value - low) for value in returns)) or 1
    # A bar holds one possible return, or several if there are more than `MAX_BARS`.
    num_values = round(high - low) // step + 1
    width = step * math.ceil(num_values / MAX_BARS)
    return low - step / 2 + width * np.arange(math.ceil(num_values * step / width) + 1)


def _errors(result: ProtocolResult) -> list[list[float]]:
    """Returns the interval of a mean as matplotlib's error bars."""
    low, high = result.interval
    return [[max(0.0, result.mean - low)], [max(0.0, high - result.mean)]]


@contextmanager
def _figure(title: str, height_inches: float) -> Iterator["Figure"]:
    """Yields a figure in the page's style; an inch is 72 units of the SVG."""
    import matplotlib.style  # takes a second to import
    from matplotlib.figure import Figure

    # The hash salt makes the ids of clip paths and markers reproducible, and unique on the page.
    style = files("policykd.report") / "templates" / "charts.mplstyle"
    with as_file(style) as path, matplotlib.style.context([path, {"svg.hashsalt": title}]):
        yield Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def _to_chart(figure: "Figure", title: str, caption: str, legend: tuple[tuple[str, str], ...] = ()) -> Chart:
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert view_box
    svg = svg[svg.index("<g id=") : svg.rindex("</svg>")]
    # Ids of groups are the same in every chart; fonts are the style sheet's; a tenth of a unit is precise enough.
    for pattern, replacement in (
        (r' id="[\w.]+_\d+"', ""),
        (r"; font-family: [^;\"]*", ""),
        (r' transform="rotate\(-0 [^"]*\)"', ""),
        (r'(?<=[ "(])(-?\d+\.\d)\d+(?=[ "\n])', r"\1"),
        (r"xlink:href", "href"),
        (r"\s*\n\s*", " "),
        (r">-(?=\d)", f">{MINUS}"),
    ):
        svg = re.sub(pattern, replacement, svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    # The only text that is not escaped: matplotlib wrote it and escaped the labels itself.
    return Chart(title, caption.replace("-", MINUS), Markup(svg), view_box[1], legend)
