"""Prints the table of several finished runs as Markdown and draws their learning curves as SVG.

`python benchmarks/summary.py runs/Pong/pong-*pct-seed* --svg docs/pong.svg`
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName
from policykd.evaluation.results import PolicyResult
from policykd.evaluation.statistics import difference_interval, summarise
from policykd.runs.folder import RunResult, load_results, load_run_config

COLORS = {"7%": "#1f77b4", "1%": "#d62728"}
Returns = dict[ProtocolName, list[float]]


@dataclass(frozen=True)
class Run:
    """A finished run with its learning curves."""

    name: str
    size: str
    seed: int
    teacher: str
    """algorithm of the teacher"""
    results: RunResult
    num_states: list[float]
    """labelled states after each round, thousands"""
    new_kl: list[float]
    """KL on states that the student was not trained on yet, nats"""
    mean_returns: list[float]
    """of the episodes that ended in each round while states were collected; nan without any"""


def load_run(folder: Path) -> Run:
    """Returns a finished run.

    Raises:
        ValueError: the run is not finished.
        BadFile: a file of the run is damaged.
    """
    results = load_results(folder)
    if results is None:
        raise ValueError(f"{folder}: the run is not finished; resume it")
    record = load_run_config(folder)
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(
        name=folder.name,
        size=str(record.settings["student"]),
        seed=int(str(record.settings["seed"])),
        teacher=record.teacher.algorithm if record.teacher else "",
        results=results,
        num_states=[r["num_states"] / 1000 for r in rounds],
        new_kl=[r["new_kl"] for r in rounds],
        mean_returns=[float(np.mean(r["episodes"])) if r["episodes"] else np.nan for r in rounds],
    )


def returns_of(results: Sequence[PolicyResult]) -> Returns:
    """Returns the pooled episodic returns of several policies under each protocol."""
    return {protocol: [x for r in results for x in r.protocols[protocol].returns] for protocol in PROTOCOLS}


def row(name: str, costs: PolicyResult, returns: Returns, teacher: Returns | None) -> str:
    """Returns a row of the table, with the differences to the teacher if that is given."""
    cells = [name, "", "", "", ""]
    if costs.num_parameters:
        cells = [name, f"{costs.num_parameters:,}", f"{(costs.num_macs or 0) / 1e6:.2f} M"]
        cells += [f"{costs.num_bytes / 1e3:,.0f} kB", f"{costs.latency_microseconds:.0f} µs"]
    for protocol in PROTOCOLS:
        summary = summarise(returns[protocol])
        cells.append(f"{summary.mean:.2f} [{summary.interval[0]:.2f}, {summary.interval[1]:.2f}]")
        if teacher:
            difference, low, high = difference_interval(returns[protocol], teacher[protocol])
            cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
        else:
            cells.append("")
    return "| " + " | ".join(cells) + " |"


def table(runs: Sequence[Run]) -> str:
    """Returns the runs as Markdown: per teacher its own row, then each size pooled over seeds, then each seed."""
    lines = [
        "| | parameters | MACs | float32 | batch 1 | no-op starts, sampled | minus teacher"
        " | sticky 0.25, greedy | minus teacher |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for teacher in sorted({run.teacher for run in runs}, reverse=True):
        lines += _rows_of_teacher(teacher, [run for run in runs if run.teacher == teacher])
    random = runs[0].results.random
    lines.append(row("random play", random, returns_of([random]), None))
    for run in runs:
        phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.results.wall_seconds.items())
        counts = f"{run.results.num_states_labelled or 0:,} states, {run.results.num_updates or 0:,} updates"
        lines.append(f"\n{run.name}: {counts}; {phases}")
    return "\n".join(lines)


def _rows_of_teacher(teacher: str, runs: Sequence[Run]) -> list[str]:
    of_teacher = returns_of([runs[0].results.teacher])
    lines = [row(f"{teacher} teacher", runs[0].results.teacher, of_teacher, None)]
    for size in sorted({run.size for run in runs}, key=lambda size: -float(size[:-1])):
        group = [run for run in runs if run.size == size]
        pooled = returns_of([run.results.student for run in group])
        seeds = f"{len(group)} seed{'s' if len(group) > 1 else ''}"
        lines.append(row(f"**{size} student of {teacher}**, {seeds}", group[0].results.student, pooled, of_teacher))
        if len(group) > 1:
            lines += [
                row(f"{size}, seed {run.seed}", run.results.student, returns_of([run.results.student]), of_teacher)
                for run in group
            ]
    return lines


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the KL on new states and the return of the episodes while collecting, over labelled states."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "policykd"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for run in runs:
        label = f"{run.size} student of {run.teacher}" if run.seed == 0 else None
        line = ":" if "DQN" in run.teacher else "-"
        for ax, values in ((left, run.new_kl), (right, run.mean_returns)):
            ax.plot(run.num_states, values, label=label, color=COLORS.get(run.size), ls=line, lw=1.4)
    for name, run in {run.teacher: run for run in runs}.items():
        mean = run.results.teacher.protocols["noop_sampled"].mean
        right.axhline(mean, color="black", ls=":" if "DQN" in name else "--", lw=1, label=f"{name} teacher")
    left.set_yscale("log")
    left.set_ylabel("nats")
    left.set_title("KL(teacher || student), states not trained on yet")
    right.set_ylabel("episodic return")
    right.set_title("episodes while collecting")
    for ax in (left, right):
        ax.set_xlabel("labelled states, thousands")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@dataclass(frozen=True)
class Args:
    """Summarizes finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    svg: Path | None = None
    """file for the learning curves"""


def main(args: Args) -> None:
    """Prints the table and draws the curves."""
    runs = [load_run(folder) for folder in args.runs]
    print(table(runs))
    if args.svg:
        draw(runs, args.svg)


if __name__ == "__main__":
    main(tyro.cli(Args))
