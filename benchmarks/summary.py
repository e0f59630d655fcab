"""Prints the table of several finished runs as Markdown and draws their learning curves as SVG.

`python benchmarks/summary.py runs/Pong/pong-*pct-seed* --svg docs/pong.svg`
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from policykd.evaluation import PROTOCOLS
from policykd.statistics import difference_interval, summarise

COLOURS = {"7%": "#1f77b4", "1%": "#d62728"}


def load(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((run / "config.json").read_text())["settings"]
    return {**results, "rounds": rounds, "size": settings["student"], "seed": settings["seed"], "name": run.name}


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
    first = runs[0]
    of = {who: {p: first[who]["protocols"][p]["returns"] for p in PROTOCOLS} for who in ("teacher", "random")}
    lines = [
        "| | parameters | MACs | float32 | batch 1 | no-op starts, sampled | minus teacher"
        " | sticky 0.25, greedy | minus teacher |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        row("teacher", first["teacher"], of["teacher"], None),
    ]
    for size in sorted({r["size"] for r in runs}, key=lambda s: -float(s[:-1])):
        group = [r for r in runs if r["size"] == size]
        pooled = {p: [x for r in group for x in r["student"]["protocols"][p]["returns"]] for p in PROTOCOLS}
        lines.append(row(f"**{size} student**, {len(group)} seeds", group[0]["student"], pooled, of["teacher"]))
        for r in group:
            returns = {p: r["student"]["protocols"][p]["returns"] for p in PROTOCOLS}
            lines.append(row(f"{size}, seed {r['seed']}", r["student"], returns, of["teacher"]))
    lines.append(row("random play", first["random"], of["random"], None))
    for r in runs:
        phases = ", ".join(f"{phase} {s:.0f} s" for phase, s in r["wall_seconds"].items())
        lines.append(f"\n{r['name']}: {r['num_states_labelled']:,} states, {r['num_updates']:,} updates; {phases}")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws the KL on new states and the score of the games that ended while collecting, over labelled states."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "policykd"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for r in runs:
        states = [x["num_states"] / 1000 for x in r["rounds"]]
        label = f"{r['size']} student" if r["seed"] == 0 else None
        left.plot(states, [x["new_kl"] for x in r["rounds"]], color=COLOURS.get(r["size"]), label=label, lw=1.4)
        scores = [(n, np.mean(x["episodes"])) for n, x in zip(states, r["rounds"], strict=True) if x["episodes"]]
        right.plot(*zip(*scores, strict=True), color=COLOURS.get(r["size"]), label=label, lw=1.4)
    left.set(
        yscale="log",
        xlabel="labelled states, thousands",
        ylabel="nats",
        title="KL(teacher || student), states not yet fitted",
    )
    teacher = runs[0]["teacher"]["protocols"]["noop_sampled"]["mean"]
    right.axhline(teacher, color="black", ls="--", lw=1, label="teacher")
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
