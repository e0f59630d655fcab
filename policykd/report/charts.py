"""Small charts as SVG inside a page, whose style sheet gives them colours and type."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policykd.report.markup import Markup, joined, tag
from policykd.report.text import tick as tick_text
from policykd.spread_axis import SpreadTop

WIDTH, HEIGHT = 360.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 34.0
MOST_BARS = 64
"""of a histogram"""

Marks = Literal["both", "line", "dots"]


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    look: str
    """of the style sheet: teacher, student, random, second"""
    x: Sequence[float]
    y: Sequence[float]
    """what is not finite leaves a gap"""
    marks: Marks = "both"


@dataclass(frozen=True)
class Point:
    """A policy: what it costs and what it brings."""

    label: str
    """teacher or student, which is its look too"""
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Games:
    """Every game of one policy."""

    label: str
    look: str
    returns: Sequence[float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """Maps numbers to a length, with ticks at round numbers."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    spread: SpreadTop | None = None
    """of returns, whose top it spreads"""

    def __call__(self, value: float) -> float:
        """Returns where a number stands."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return self.start + (self._scaled(value) - low) / (high - low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        if self.spread:
            return float(self.spread.forward(np.asarray(value)))
        return math.log10(value) if self.is_log else value

    @property
    def ticks(self) -> list[float]:
        """Returns three to seven round numbers on the axis."""
        if self.spread:
            return [t for t in self.spread.ticks if self.low <= t <= self.high]
        if self.is_log and self.high > 8 * self.low:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            tens = [10.0**k for k in range(first, last + 1)]
            within = [t for t in tens if self.low <= t <= self.high]
            if len(within) < 3:
                within = [m * t for t in tens for m in (1, 2, 5) if self.low <= m * t <= self.high]
            return within[:: math.ceil(len(within) / 5)]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_over(values: Sequence[float], start: float, end: float, *, is_log: bool = False, margin: float = 0.06) -> Axis:
    """Returns an axis that holds all values that are finite (and positive, if it is logarithmic)."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)] or [1.0]
    low, high = min(known), max(known)
    if is_log:
        factor = max((high / low) ** margin, 1.15)
        return Axis(low / factor, high * factor, start, end, is_log=True)
    room = (high - low) * margin or max(abs(high) * 0.1, 0.5)
    return Axis(low - room, high + room, start, end)


def line_chart(
    lines: Sequence[Line],
    description: str,
    *,
    x_label: str,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
    is_log: bool = False,
    bounds: Sequence[float] = (),
) -> Markup:
    """Returns curves over a common x axis; `bounds` are numbers that the y axis holds in any case."""
    x = axis_over([v for line in lines for v in line.x], LEFT, WIDTH - RIGHT, margin=0.02)
    y_values = [v for line in lines for v in line.y] + list(bounds)
    y = axis_over(y_values, HEIGHT - BOTTOM, TOP, is_log=is_log)
    drawn = [_frame(x, y, x_label, x_format, y_format)]
    for line in lines:
        stretches = [list[tuple[float, float]]()]
        for a, b in zip(line.x, line.y, strict=True):
            if math.isfinite(b) and (b > 0 or not is_log):
                stretches[-1].append((x(a), y(b)))
            else:
                stretches.append([])
        for known in filter(None, stretches):
            if line.marks != "dots":
                points = " ".join(f"{a:.1f},{b:.1f}" for a, b in known)
                drawn.append(tag("polyline", points=points, class_=f"line {line.look}"))
            if line.marks != "line":
                drawn += [tag("circle", cx=a, cy=b, r=2.6, class_=f"dot {line.look}") for a, b in known]
    return _svg(drawn, description)


def cost_chart(
    points: Sequence[Point], random: float, description: str, *, x_label: str, x_format: Callable[[float], str]
) -> Markup:
    """Returns what policies bring (with intervals) against what they cost, above a line for chance.

    Costs are logarithmic; the axis of returns spreads its top, where policies differ.
    """
    x = axis_over([p.x for p in points], LEFT, WIDTH - RIGHT, is_log=True, margin=0.12)
    ends = [random, *(v for p in points for v in (p.low, p.y, p.high))]
    spread = SpreadTop.over(ends)
    y = Axis(*spread.ends(min(ends)), HEIGHT - BOTTOM, TOP, spread=spread)
    drawn = [_frame(x, y, x_label, x_format, tick_text), _level(y(random), "random play")]
    for p in points:
        told = tag("title", f"{p.label}: {x_format(p.x)}, {p.y:.2f} [{p.low:.2f}, {p.high:.2f}]")
        bar = tag("line", x1=x(p.x), x2=x(p.x), y1=y(p.low), y2=y(p.high), class_=f"interval {p.label}")
        mark = tag("circle", cx=x(p.x), cy=y(p.y), r=5.0, class_=f"dot {p.label}")
        anchor, shift = ("end", -9.0) if x(p.x) > WIDTH * 0.6 else ("start", 9.0)
        below = 16.0 if y(p.y) < HEIGHT - BOTTOM - 20.0 else -8.0  # where the ticks are
        name = tag("text", p.label, x=x(p.x) + shift, y=y(p.y) + below, text_anchor=anchor, class_="name")
        drawn.append(tag("g", told, bar, mark, name))
    return _svg(drawn, description)


def bin_edges(returns: Sequence[float]) -> np.ndarray:
    """Returns the edges of a histogram's bars, each of as many returns that a game can have as the others.

    Returns of a game are whole multiples of a step (1 in Pong, 20 in Seaquest): a bar holds one of them, or some where
    there are more than `MOST_BARS`.
    """
    low, high = min(returns), max(returns)
    steps = {round(r - low) for r in returns}
    if any(abs(r - low - round(r - low)) > 1e-6 for r in returns):
        return np.linspace(low, max(high, low + 1e-9), 43)
    step = math.gcd(*steps) or 1
    num = round(high - low) // step + 1
    width = step * math.ceil(num / MOST_BARS)
    return low - step / 2 + width * np.arange(math.ceil(num * step / width) + 1)


def games_chart(rows: Sequence[Games], description: str) -> Markup:
    """Returns how often each return occurred, a row a policy, with mean and interval below."""
    edges = bin_edges([r for row in rows for r in row.returns])
    x = axis_over([float(edges[0]), float(edges[-1])], 70.0, WIDTH - RIGHT, margin=0.01)
    drawn, step = [], (HEIGHT - BOTTOM - TOP) / len(rows)
    for number, row in enumerate(rows):
        base = TOP + (number + 1) * step - 14.0
        counts, _ = np.histogram(row.returns, edges)
        for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
            if count:
                height = float(count / counts.max()) * (step - 22.0)
                size = {"width": max(x(right) - x(left) - 1.0, 1.0), "height": max(height, 1.5)}
                drawn.append(tag("rect", x=x(left), y=base - size["height"], **size, class_=f"bar {row.look}"))
        drawn.append(tag("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="grid"))
        low, high = x(row.low), x(row.high)
        drawn.append(
            tag("line", x1=low, x2=max(high, low + 1.0), y1=base + 6.0, y2=base + 6.0, class_=f"interval {row.look}")
        )
        drawn.append(tag("circle", cx=x(row.mean), cy=base + 6.0, r=3.0, class_=f"dot {row.look}"))
        drawn.append(tag("text", row.label, x=62.0, y=base - step / 2 + 16.0, text_anchor="end", class_="name"))
    drawn += _x_ticks(x, tick_text, "return of a game")
    return _svg(drawn, description)


def shares_chart(shares: Sequence[tuple[str, float, float]], most: float, description: str) -> Markup:
    """Returns actions with their shares for teacher and student, two bars an action; `most` is as long as there is."""
    step, left, right = 34.0, 16.0 + 8.2 * max(len(name) for name, *_ in shares), 48.0
    x = Axis(0.0, max(most, 1e-9), left, WIDTH - right)
    drawn = []
    for number, (name, *both) in enumerate(shares):
        top = number * step + 6.0
        drawn.append(tag("text", name, x=left - 8.0, y=top + 16.0, text_anchor="end", class_="name"))
        for look, share, y in zip(("teacher", "student"), both, (top, top + 13.0), strict=True):
            drawn.append(tag("rect", x=left, y=y, width=max(x(share) - left, 1.0), height=11.0, class_=f"bar {look}"))
            drawn.append(tag("text", f"{share:.1%}", x=x(share) + 5.0, y=y + 9.5, class_="tick"))
    return _svg(drawn, description, height=len(shares) * step + 6.0)


def _svg(drawn: Sequence[Markup], description: str, height: float = HEIGHT) -> Markup:
    box = f"0 0 {WIDTH:.0f} {height:.0f}"
    return tag("svg", *drawn, viewBox=box, role="img", aria_label=description, class_="chart")


def _frame(
    x: Axis, y: Axis, x_label: str, x_format: Callable[[float], str], y_format: Callable[[float], str]
) -> Markup:
    """Returns grid lines, ticks and the name of the x axis."""
    drawn = []
    for tick in y.ticks:
        drawn.append(tag("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid"))
        text = y_format(tick)
        drawn.append(tag("text", text, x=x.start - 6.0, y=y(tick) + 3.5, text_anchor="end", class_="tick"))
    return joined(*drawn, *_x_ticks(x, x_format, x_label))


def _x_ticks(x: Axis, x_format: Callable[[float], str], label: str) -> list[Markup]:
    foot = HEIGHT - BOTTOM
    drawn = [
        tag("text", x_format(tick), x=x(tick), y=foot + 15.0, text_anchor="middle", class_="tick") for tick in x.ticks
    ]
    name = tag("text", label, x=(x.start + x.end) / 2, y=HEIGHT - 4.0, text_anchor="middle", class_="label")
    return [*drawn, name]


def _level(y: float, name: str) -> Markup:
    line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="level random")
    return joined(line, tag("text", name, x=WIDTH - RIGHT, y=y - 5.0, text_anchor="end", class_="label"))
