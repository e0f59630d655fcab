"""Prints the table of several finished runs as Markdown and draws their learning curves as SVG.

`python benchmarks/summary.py runs/Pong/pong-*pct-seed* --svg docs/pong.svg`
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from policykd.evaluation.evaluate import PROTOCOLS
from policykd.evaluation.statistics import difference_interval, summarise

COLOURS = {"7%": "#1f77b4", "1%": "#d62728"}


def load(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((run / "config.json").read_text())["settings"]
    of_run = {"size": settings["student"], "seed": settings["seed"], "teacher_name": settings["teacher"]["algorithm"]}
    return {**results, **of_run, "rounds": rounds, "name": run.name}


def cell(returns: list[float]) -> str:
    s = summarise(returns)
    return f"{s.mean:.2f} [{s.interval[0]:.2f}, {s.interval[1]:.2f}]"


def row(
    name: str, costs: dict[str, Any], returns: dict[str, list[float]], teacher: dict[str, list[float]] | None
) -> str:
    cells = [name]
    if costs["num_parameters"]:
        cells += [f"{costs['num_parameters']:,}", f"{costs['num_macs'] / 1e6:.2f} M"]
        cells += [f"{costs['num_bytes'] / 1e3:,.0f} kB", f"{costs['latency_microseconds']:.0f} µs"]
    else:
        cells += ["", "", "", ""]
    for protocol in PROTOCOLS:
        cells.append(cell(returns[protocol]))
        if teacher:
            difference, low, high = difference_interval(returns[protocol], teacher[protocol])
            cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
        else:
            cells.append("")
    return "| " + " | ".join(cells) + " |"


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| | parameters | MACs | float32 | batch 1 | no-op starts, sampled | minus teacher"
        " | sticky 0.25, greedy | minus teacher |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for teacher in sorted({r["teacher_name"] for r in runs}, reverse=True):
        lines += rows_of_a_teacher(teacher, [r for r in runs if r["teacher_name"] == teacher])
    random = {p: runs[0]["random"]["protocols"][p]["returns"] for p in PROTOCOLS}
    lines.append(row("random play", runs[0]["random"], random, None))
    for r in runs:
        phases = ", ".join(f"{phase} {s:.0f} s" for phase, s in r["wall_seconds"].items())
        lines.append(f"\n{r['name']}: {r['num_states_labelled']:,} states, {r['num_updates']:,} updates; {phases}")
    return "\n".join(lines)


def rows_of_a_teacher(teacher: str, runs: list[dict[str, Any]]) -> list[str]:
    of_teacher = {p: runs[0]["teacher"]["protocols"][p]["returns"] for p in PROTOCOLS}
    lines = [row(f"{teacher} teacher", runs[0]["teacher"], of_teacher, None)]
    for size in sorted({r["size"] for r in runs}, key=lambda s: -float(s[:-1])):
        group = [r for r in runs if r["size"] == size]
        pooled = {p: [x for r in group for x in r["student"]["protocols"][p]["returns"]] for p in PROTOCOLS}
        seeds = f"{len(group)} seed{'s' if len(group) > 1 else ''}"
        lines.append(row(f"**{size} student of {teacher}**, {seeds}", group[0]["student"], pooled, of_teacher))
        for r in group if len(group) > 1 else []:
            returns = {p: r["student"]["protocols"][p]["returns"] for p in PROTOCOLS}
            lines.append(row(f"{size}, seed {r['seed']}", r["student"], returns, of_teacher))
    return lines


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws the KL on new states and the score of the games that ended while collecting, over labelled states."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "policykd"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for r in runs:
        states = [x["num_states"] / 1000 for x in r["rounds"]]
        label = f"{r['size']} student of {r['teacher_name']}" if r["seed"] == 0 else None
        style = {"color": COLOURS.get(r["size"]), "ls": "-" if "DQN" not in r["teacher_name"] else ":", "lw": 1.4}
        left.plot(states, [x["new_kl"] for x in r["rounds"]], label=label, **style)
        scores = [(n, np.mean(x["episodes"])) for n, x in zip(states, r["rounds"], strict=True) if x["episodes"]]
        right.plot(*zip(*scores, strict=True), label=label, **style)
    left.set(
        yscale="log",
        xlabel="labelled states, thousands",
        ylabel="nats",
        title="KL(teacher || student), states not yet fitted",
    )
    for name, r in {r["teacher_name"]: r for r in runs}.items():
        mean = r["teacher"]["protocols"]["noop_sampled"]["mean"]
        right.axhline(mean, color="black", ls="--" if "DQN" not in name else ":", lw=1, label=f"{name} teacher")
    right.set(xlabel="labelled states, thousands", ylabel="episodic return", title="games played while collecting")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    loaded = [load(run) for run in args.runs]
    print(table(loaded))
    if args.svg:
        draw(loaded, args.svg)
