"""The sections of a report with its figures; one that has nothing to show is None."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from policykd.compression.comparison import comparison_table
from policykd.evaluation.evaluate import PROTOCOLS
from policykd.report.charts import Games, Point, cost_chart, games_chart
from policykd.report.data import Comparison, Report
from policykd.report.markup import Markup, blocks, data_url, figure, joined, scrolled, tag
from policykd.report.text import (
    CLOSE,
    FEWEST_GAMES,
    NONE,
    interval,
    microseconds,
    number,
    protocol_name,
    short,
    signed,
    size,
    tick,
)

COSTS: dict[str, tuple[str, Callable[[float], str], Callable[[float], str]]] = {
    "num_parameters": ("Parameters", lambda v: f"{v:,.0f}", short),
    "num_macs": ("Multiply-accumulates", lambda v: f"{v / 1e6:,.2f} M", short),
    "num_bytes": ("Bytes, float32", size, short),
    "latency_microseconds": ("Latency, one state", microseconds, tick),
}
"""what a policy costs: name, and how it is written in a table and on an axis"""


TIMED_IN_TURNS = ": medians, and the least times, which a busy machine does not disturb; teacher and student in turns"
"""said of results that have least times: older ones were not taken so"""


def result(report: Report) -> Markup:
    """Returns the headline table: what it costs, then what it plays, a column a policy."""
    rows = report.results
    head = [tag("th", tag("span", NAMES[who], class_=f"who {who}"), scope="col") for who in WHO]
    columns = tag(
        "tr", tag("th", "Measure", scope="col"), *head[:2], tag("th", "Student against teacher", scope="col"), head[2]
    )
    groups = [tag("tbody", _group("Costs"), *(_cost_row(rows, key) for key in COSTS))]
    groups += [tag("tbody", _group(protocol_name(p)), *_play_rows(rows, p)) for p in rows["comparison"]]
    note = (
        "Brackets are 95% bootstrap intervals over whole games. A return is the sum of a game's unclipped rewards."
        " Few distinct returns mean that the same game was played again and again. Latency is torch, eager, one thread,"
        " one observation"
        f"{TIMED_IN_TURNS if rows['student'].get('latency_min_microseconds') else ''}. The words above:"
        f" \u201cwithin\u201d where the interval of the difference lies inside {CLOSE:.0%} of the teacher's advantage"
        f" over random play, and nothing is claimed from fewer than {FEWEST_GAMES} games a side."
    )
    table = scrolled(
        tag("table", tag("thead", columns), *groups), "What student, teacher and random play cost and bring"
    )
    return joined(table, *_warnings(rows), tag("p", note, class_="note"))


WHO = ("teacher", "student", "random")
NAMES = dict(zip(WHO, ("Teacher", "Student", "Random play"), strict=True))


def _group(name: str) -> Markup:
    return tag("tr", tag("th", name, colspan=5, scope="rowgroup", class_="group"))


def _cost_row(rows: Mapping[str, Any], key: str) -> Markup:
    name, written, _ = COSTS[key]
    teacher, student = (rows[who].get(key) for who in WHO[:2])
    share = f"{student / teacher:.1%}" if teacher and student else NONE
    texts = [written(v) if v else NONE for v in (teacher, student)]
    below = ["", "", ""]
    if key == "latency_microseconds":
        least = [rows[who].get("latency_min_microseconds") for who in WHO[:2]]
        if all(least):  # results that are older have none
            below = [*(f"least {written(v)}" for v in least), f"of the least {least[1] / least[0]:.1%}"]
    cells = [tag("td", t, tag("small", b) if b else "") for t, b in zip((*texts, share), below, strict=True)]
    return tag("tr", tag("th", name, scope="row"), *cells, tag("td", NONE))


def _play_rows(rows: Mapping[str, Any], protocol: str) -> Iterator[Markup]:
    played = {who: rows[who]["protocols"][protocol] for who in WHO}
    compared = rows["comparison"][protocol]
    apart, share = compared["difference_to_teacher"], compared["teacher_normalised"]
    bounds = interval(compared["difference_interval"], is_difference=True)
    means = {who: (number(row["mean"]), interval(row["interval"])) for who, row in played.items()}
    yield _row("Mean return", means, (signed(apart), bounds))
    iqms = {who: (number(row["iqm"]), interval(row["iqm_interval"])) for who, row in played.items()}
    yield _row("Interquartile mean", iqms, (NONE, ""))
    kept = "" if share is None else f"{share:.1%}"
    yield _row("Games", {who: (f"{row['num_episodes']:,}", "") for who, row in played.items()}, (NONE, ""))
    yield _row("Distinct returns", {who: (f"{row['num_distinct']:,}", "") for who, row in played.items()}, (NONE, ""))
    if kept:
        normalised = dict.fromkeys(WHO, (NONE, "")) | {"teacher": ("100.0%", ""), "random": ("0.0%", "")}
        yield _row("Share of the teacher's score", normalised | {"student": (kept, "")}, (NONE, ""))


def _row(name: str, values: Mapping[str, tuple[str, str]], apart: tuple[str, str]) -> Markup:
    texts = (values["teacher"], values["student"], apart, values["random"])
    cells = [tag("td", text, tag("small", below) if below else "") for text, below in texts]
    return tag("tr", tag("th", name, scope="row"), *cells)


def _warnings(rows: Mapping[str, Any]) -> Iterator[Markup]:
    for who in WHO:
        for protocol, row in rows[who]["protocols"].items():
            for key, what in (
                ("num_truncated", "a time limit ended"),
                ("num_unfinished", "were cut off, in no figure"),
            ):
                if row.get(key):
                    yield tag(
                        "p",
                        f"{NAMES[who]}, {protocol_name(protocol).lower()}, games that {what}: {row[key]:,}.",
                        class_="warning",
                    )


def games(report: Report) -> Markup:
    """Returns every game of each policy, a picture a protocol."""
    figures = []
    for protocol in report.results["comparison"]:
        rows = []
        for who in ("teacher", "student", "random"):
            row = report.results[who]["protocols"][protocol]
            low, high = row["interval"]
            rows.append(Games(who, who, row["returns"], row["mean"], low, high))
        name = protocol_name(protocol)
        said = "; ".join(
            f"{r.label} {number(r.mean)} {interval((r.low, r.high))} in {len(r.returns)} games" for r in rows
        )
        figures.append(figure(name, said, games_chart(rows, f"Histogram of returns, {name}: {said}")))
    note = "How often each return occurred. Below each histogram: the mean and its interval."
    return joined(tag("p", note, class_="note"), tag("div", *figures, class_="pictures"))


def costs(report: Report) -> Markup | None:
    """Returns mean return against each of the four costs."""
    protocol = next(iter(report.results["comparison"]))
    random = report.results["random"]["protocols"][protocol]["mean"]
    figures = []
    for key, (name, written, on_axis) in COSTS.items():
        points = [p for who in ("teacher", "student") if (p := _point(who, report.results[who], key, protocol))]
        if len(points) >= 2:
            said = "; ".join(f"{p.label} {written(p.x)}, {number(p.y)}" for p in points)
            chart = cost_chart(points, random, f"Return against {name}: {said}", x_label=name, x_format=on_axis)
            figures.append(figure(name, said, chart))
    if not figures:
        return None
    how = protocol_name(protocol).lower()
    note = f"Mean return ({how}, 95% interval) against what a policy costs."
    return joined(tag("p", note, class_="note"), tag("div", *figures, class_="pictures"))


def _point(who: str, row: Mapping[str, Any], key: str, protocol: str) -> Point | None:
    played, cost = row.get("protocols", {}).get(protocol), row.get(key)
    if not played or not cost or cost <= 0:
        return None
    low, high = played["interval"]
    return Point(who, float(cost), played["mean"], low, high)


def compressors(comparison: Comparison | None) -> Markup | None:
    """Returns what `policykd compress` found, and its Pareto picture."""
    if not comparison:
        return None
    begins = [protocol.replace("_", " ") for protocol in PROTOCOLS]
    parts = list(blocks(comparison_table(comparison.content), name="What every row costs", begins=begins))
    if comparison.pareto:
        what = "Return kept against parameters, multiply-accumulates, bytes and latency, for every compressor"
        what += "; drawn large: this run" if comparison.has_this_run else ""
        picture = tag("img", src=data_url(comparison.pareto, "image/svg+xml"), alt=what, class_="picture")
        parts.insert(1, figure("Pareto picture", f"{what}.", scrolled(picture, "Pareto picture")))
    note = (
        f"All from one teacher and one set of states: policykd compress, {comparison.source}. Latency:"
        " ONNX Runtime, one thread, one observation. Brackets are 95% bootstrap intervals over whole games."
    )
    return joined(tag("p", note, class_="note"), *parts)
