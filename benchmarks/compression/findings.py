"""Prints what a comparison found: pairs of networks at equal bytes, and the smallest within a point of the teacher.

`python benchmarks/compression/findings.py runs/Pong/compression`; benchmarks/compression.sh makes that folder.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from policykd.compression.comparison import RANDOM, Comparison, Row, read_comparison
from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName
from policykd.evaluation.statistics import difference_interval

EQUAL_BYTES = (0.6, 1.25)
"""bytes of a network as a fraction of a distilled one's, for the two to be compared as equal"""
MAX_LOSS = 1.0
"""points of return below the teacher that count as equally good"""
NAMES: dict[ProtocolName, str] = {"noop_sampled": "no-op starts, sampled", "sticky_greedy": "sticky 0.25, greedy"}


def origin(recipe: str) -> str:
    """Returns what a network was initialized from or trained on: distillation, hard labels or the teacher's weights."""
    start = recipe.partition("+")[0]
    if start == "teacher":
        return "teacher"
    return "hard labels" if start.endswith(":hard") else "distillation"


@dataclass(frozen=True)
class Pair:
    """A distilled network and another one of equal bytes."""

    distilled: Row
    other: Row

    def difference(self, protocol: ProtocolName) -> tuple[float, float, float]:
        """Returns the difference of the mean returns, distilled minus other, with its 95 % interval."""
        return difference_interval(self.distilled.protocols[protocol].returns, self.other.protocols[protocol].returns)

    def winner(self, protocol: ProtocolName) -> Row | None:
        """Returns the better network, or None if the interval contains 0."""
        _, low, high = self.difference(protocol)
        if low > 0.0:
            return self.distilled
        return self.other if high < 0.0 else None


def pairs_at_equal_bytes(comparison: Comparison) -> list[Pair]:
    """Returns every distilled network with every other one near its bytes.

    Distilled is what started from the teacher's outputs, whatever was done to it later. The others started from the
    teacher's weights or from hard labels.
    """
    rows = [row for row in comparison.rows.values() if row.recipe not in ("teacher", RANDOM)]
    pairs = []
    for row in rows:
        for other in rows:
            ratio = other.num_bytes / row.num_bytes
            is_rival = origin(row.recipe) == "distillation" and origin(other.recipe) != "distillation"
            if is_rival and EQUAL_BYTES[0] <= ratio <= EQUAL_BYTES[1]:
                pairs.append(Pair(row, other))
    return pairs


def equal_bytes(comparison: Comparison) -> list[str]:
    """Returns the pairs as a Markdown table, and how often the distilled network wins."""
    pairs = pairs_at_equal_bytes(comparison)
    lines = [f"### At equal bytes ({EQUAL_BYTES[0]:.0%} to {EQUAL_BYTES[1]:.0%} of the distilled network's)", ""]
    if not pairs:
        return [*lines, "No row is near the bytes of a distilled one."]
    heads = ["distilled", "bytes", "against", "its bytes", "initialized from"]
    for name in NAMES.values():
        heads += [f"difference, {name}", "better"]
    lines += ["| " + " | ".join(heads) + " |", "|---|---:|---|---:|---|" + "---:|---|" * len(NAMES)]
    for pair in pairs:
        cells = [pair.distilled.recipe, f"{pair.distilled.num_bytes:,}", pair.other.recipe]
        cells += [f"{pair.other.num_bytes:,}", origin(pair.other.recipe)]
        for protocol in NAMES:
            mean, low, high = pair.difference(protocol)
            winner = pair.winner(protocol)
            cells += [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", winner.recipe if winner else "undecided"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for protocol, name in NAMES.items():
        for source in ("teacher", "hard labels"):
            group = [pair for pair in pairs if origin(pair.other.recipe) == source]
            won = sum(pair.winner(protocol) is pair.distilled for pair in group)
            lost = sum(pair.winner(protocol) is pair.other for pair in group)
            lines.append(f"- {name}, from {source}: the distilled network wins {won} of {len(group)}, loses {lost}")
    return lines


def smallest(comparison: Comparison) -> list[str]:
    """Returns the rows of fewest parameters, multiply-accumulates and bytes within a point of the teacher."""
    lines = [f"### The smallest within {MAX_LOSS:g} point of the teacher", ""]
    teacher = comparison.rows["teacher"]
    for protocol in PROTOCOLS:
        good: dict[str, list[Row]] = {"on average": [], "with the whole interval": []}
        for row in comparison.rows.values():
            if row.recipe == RANDOM:
                continue
            mean, low, _ = difference_interval(row.protocols[protocol].returns, teacher.protocols[protocol].returns)
            if mean >= -MAX_LOSS:
                good["on average"].append(row)
            if low >= -MAX_LOSS:
                good["with the whole interval"].append(row)
        for criterion, rows in good.items():
            distilled = [row for row in rows if row.family in ("distilled", "sharp targets")]
            student = min(distilled, key=lambda row: row.num_parameters).recipe if distilled else "none"
            line = f"- {NAMES[protocol]}, {criterion}: distilled student: {student}"
            for cost in ("num_parameters", "num_macs", "num_bytes"):
                best = min(rows, key=lambda row: getattr(row, cost))
                line += f"; {cost.removeprefix('num_')}: {best.recipe} ({getattr(best, cost):,})"
            lines.append(line)
    return lines


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Prints the findings of a comparison's folder."""
    comparison = read_comparison(folder)
    print("\n".join([*equal_bytes(comparison), "", *smallest(comparison)]))


if __name__ == "__main__":
    tyro.cli(main)
