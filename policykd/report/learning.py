"""The sections of a report with what was learned: curves, actions, a film; one that has nothing to show is None."""

import math
from collections.abc import Sequence
from typing import Any

from policykd.report.charts import Line, Marks, line_chart, shares_chart
from policykd.report.data import Report
from policykd.report.markup import Markup, data_url, figure, joined, legend, scrolled, tag
from policykd.report.text import NONE, short, tick

Drawn = Sequence[tuple[str, str, list[Line], dict[str, Any]]]
"""charts: name, unit, lines, and how `line_chart` draws them"""
MOST_BESIDE = 9
"""actions whose two pictures stand side by side; those of more take the whole width each"""


def learning(report: Report) -> Markup | None:
    """Returns the curves of a run over its gradient updates."""
    if not report.rounds:
        return None
    x = [_real(row.get("num_updates")) for row in report.rounds]

    def curve(label: str, look: str, key: str) -> Line:
        return Line(label, look, x, [_real(row.get(key)) for row in report.rounds])

    kl = [curve("new states, before they are fitted", "student", "new_kl"), curve("fitted states", "second", "kl")]
    agreement = [
        curve(line.label, line.look, key)
        for line, key in zip(kl, ("new_action_agreement", "action_agreement"), strict=True)
    ]
    rate = [curve("Adam's learning rate", "student", "learning_rate")]
    played, bounds = _score_lines(report, x)
    drawn: Drawn = (
        ("KL divergence from the teacher", "nats", kl, {"is_log": True, "y_format": tick}),
        ("Same best action as the teacher", "share of states", agreement, {"y_format": "{:.0%}".format}),
        ("Score of games on the way", "mean return", played, {"y_format": tick, "bounds": bounds}),
        ("Learning rate", "at the end of a round", rate, {"y_format": tick}),
    )
    return _figures(drawn, "gradient updates")


def taught(report: Report) -> Markup | None:
    """Returns the curves of a run inside reinforcement learning over its agent steps."""
    keys = ("offline/teacher_kl", "train/teacher_kl", "rollout/ep_rew_mean", "eval/mean_reward")
    steps = [step for key in keys for step, _ in report.scalars.get(key, ())]
    if not steps:
        return None

    def curve(label: str, look: str, key: str, marks: Marks = "line") -> Line:
        known = report.scalars.get(key, ())
        return Line(label, look, [float(step) for step, _ in known], [number for _, number in known], marks)

    teacher, random = (report.results[who]["protocols"]["noop_sampled"]["mean"] for who in ("teacher", "random"))
    played = [
        Line("teacher, at the end", "teacher", [float(min(steps)), float(max(steps))], [teacher] * 2, "line"),
        curve("student alone, 16 games", "student", "eval/mean_reward", "dots"),
        curve("while learning, last 100 games", "second", "rollout/ep_rew_mean"),
    ]
    kl = [
        curve("minibatches as they are learned from", "student", "train/teacher_kl"),
        curve("before, on the teacher's games: updates, counted up to 0", "second", "offline/teacher_kl", "both"),
    ]
    weight = [curve("of the distillation in the loss", "student", "train/distillation_weight")]
    rate = [curve("Adam's learning rate", "student", "train/learning_rate")]
    drawn: Drawn = (
        ("KL divergence from the teacher", "nats", kl, {"is_log": True, "y_format": tick}),
        ("Score of games on the way", "mean return", played, {"y_format": tick, "bounds": [teacher, random]}),
        ("Weight", "beside the reward", weight, {"y_format": tick, "bounds": [0.0]}),
        ("Learning rate", "of the last update", rate, {"y_format": tick}),
    )
    shown = ((name, unit, [line for line in lines if line.y], form) for name, unit, lines, form in drawn)
    return _figures([row for row in shown if any(line.look != "teacher" for line in row[2])], "agent steps")


def _figures(drawn: Drawn, over: str) -> Markup:
    """Returns charts with their names, units and lines, all over the same."""
    figures = []
    for name, unit, lines, form in drawn:
        known = [(line.label, [y for y in line.y if math.isfinite(y)]) for line in lines]
        last = ", ".join(f"{label}: {tick(float(f'{y[-1]:.3g}'))}" for label, y in known if y)
        chart = line_chart(lines, f"{name}, {unit}, over {over}. Last: {last}", x_label=over, x_format=short, **form)
        figures.append(figure(name, unit, legend((line.label, line.look) for line in lines), chart))
    return tag("div", *figures, class_="pictures")


def _score_lines(report: Report, x: list[float]) -> tuple[list[Line], list[float]]:
    """Returns the games played while collecting and between rounds, and the levels of teacher and random play."""
    live = [row.get("episodes") or [math.nan] for row in report.rounds]
    lines = [Line("while collecting, whoever played", "second", x, [sum(map(_real, r)) / len(r) for r in live])]
    if report.evaluations:
        updates, means = zip(*report.evaluations, strict=True)
        lines.append(Line("student alone, 16 games", "student", [float(n) for n in updates], means, "dots"))
    levels = [report.results[who]["protocols"]["noop_sampled"]["mean"] for who in ("teacher", "random")]
    ends = [min(x), max(x)]
    lines.append(Line("teacher, at the end", "teacher", ends, [levels[0]] * 2, "line"))
    return lines[::-1], levels


def actions(report: Report) -> Markup | None:
    """Returns what teacher and student do in the same states: shares, and which best action meets which."""
    seen = report.actions
    if not seen:
        return None
    total = sum(map(sum, seen.best_AA))
    same = sum(seen.best_AA[a][a] for a in range(len(seen.names)))
    agreement = f"The best action is the same in {same / total:.1%} of {total:,} states"
    heads = [tag("th", name, scope="col") for name in ("Teacher's best action", *seen.names, "Same")]
    body = []
    for a, (name, counts) in enumerate(zip(seen.names, seen.best_AA, strict=True)):
        of_row = sum(counts)
        cells = [
            tag(
                "td",
                f"{n / of_row:.0%}" if n else "",
                class_="cell",
                style=f"--share:{n / of_row if of_row else 0:.3f}",
            )
            for n in counts
        ]
        same_share = f"{counts[a] / of_row:.1%}" if of_row else NONE
        head = tag("th", name, tag("small", f"{of_row / total:.1%}"), scope="row")
        body.append(tag("tr", head, *cells, tag("td", same_share)))
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    is_broad = len(seen.names) > MOST_BESIDE
    shares, half = list(zip(seen.names, seen.teacher_A, seen.student_A, strict=True)), -(-len(seen.names) // 2)
    most = max(*seen.teacher_A, *seen.student_A)
    told = "Mean chance of each action, teacher and student"
    charts = [shares_chart(part, most, told) for part in ((shares[:half], shares[half:]) if is_broad else (shares,))]
    keys = legend((who, who) for who in ("teacher", "student"))
    note = (
        f"States that the student visits in games of their own, half of them under each protocol. {agreement}, the"
        f" mean KL divergence is {seen.kl:.4f} nats. Agreement is no stand-in for return: in many states any"
        " action will do."
    )
    rows = "Rows: the teacher's best action and how common it is. Columns: what the student does there."
    confusion = scrolled(
        table,
        "Best action of the teacher against that of the student",
        class_=f"scroll shade{' upright' if len(seen.names) > 4 else ''}",
    )
    figures = (
        figure(
            "How often each action is taken", "Mean chance over the states.", keys, tag("div", *charts, class_="halves")
        ),
        figure("Which best action meets which", rows, confusion),
    )
    return joined(
        tag("p", note, class_="note"), tag("div", *figures, class_=f"pictures{' stacked' if is_broad else ''}")
    )


def film(report: Report) -> Markup | None:
    """Returns teacher and student at play, which a switch holds; still for who wants no motion, and on paper."""
    shown = report.film
    if not shown:
        return None
    what = f"Teacher and student play {report.game} side by side from the same seed"
    pause = joined(tag("span", "Pause", class_="pause"), tag("span", "Play", class_="play"))
    switch = tag("label", tag("input", type="checkbox"), pause)
    moving = tag(
        "img",
        src=data_url(shown.moving, "image/webp"),
        alt=f"{what}, {shown.seconds:.0f} s, repeating",
        class_="moving",
    )
    still = tag("img", src=data_url(shown.poster, "image/png"), alt=f"{what}: one picture", class_="poster")
    said = "Bars: the chance that each gives to each action. Sticky actions, greedy play."
    caption = tag("figcaption", tag("b", what), f"{said} {shown.seconds:.0f} seconds, then again.")
    return tag("figure", switch, moving, still, caption, class_="film")


def _real(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
