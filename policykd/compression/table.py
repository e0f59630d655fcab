"""What a comparison says: a table, who wins at equal bytes, and the smallest student that is as good as the teacher."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from policykd.compression.rows import TEACHER
from policykd.evaluation.evaluate import PROTOCOLS, ProtocolName
from policykd.evaluation.statistics import RESAMPLES, difference_interval, teacher_normalised_score

Rows = Mapping[str, Mapping[str, Any]]

NEAR = (0.6, 1.25)
"""bytes of a row as a share of a distilled student's, for the two to be compared as equal"""
WITHIN = 1.0
"""points of return below the teacher that count as as good"""
SPELLED: dict[ProtocolName, str] = {
    "noop_sampled": "no-op starts, sampled",
    "sticky_greedy": "sticky 0.25, greedy",
}


def compared(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns for each row and protocol the difference to the teacher, the normalised score and the ratio of means.

    The first two with their 95 % intervals. What a weak teacher gives no meaning to is None.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in rows.items():
        found[name] = {}
        for protocol in PROTOCOLS:
            games, teacher, random = (r["protocols"][protocol] for r in (row, rows[TEACHER], rows["random"]))
            returns = [tuple(map(float, r["returns"])) for r in (games, teacher, random)]
            difference, low, high = _difference(returns[0], returns[1])
            means = games["mean"], teacher["mean"], random["mean"]
            found[name][protocol] = {
                "difference_to_teacher": difference,
                "difference_interval": [low, high],
                "teacher_normalised": teacher_normalised_score(*means),
                "teacher_normalised_interval": None if name in (TEACHER, "random") else _normalised_interval(*returns),
                "ratio_of_means": means[0] / means[1] if means[1] > 0.0 else None,
            }
    return found


@cache
def _difference(ours: tuple[float, ...], theirs: tuple[float, ...]) -> tuple[float, float, float]:
    return difference_interval(ours, theirs)


@cache
def _normalised_interval(*returns: tuple[float, ...]) -> list[float] | None:
    """Returns the 95 % bootstrap interval of a normalised score, or None where the teacher may play no better."""
    generator = np.random.default_rng(0)
    row, teacher, random = (generator.choice(np.array(x), (RESAMPLES, len(x))).mean(axis=1) for x in returns)
    if (teacher <= random).any():
        return None
    low, high = np.quantile((row - random) / (teacher - random), [0.025, 0.975])
    return [float(low), float(high)]


def report(rows: Rows, missing: Sequence[str] = ()) -> str:
    """Returns all of it as Markdown; `missing` are names of rows that were asked for and are not there."""
    named = ["", f"Asked for and not finished: {', '.join(missing)}"] if missing else []
    return "\n".join([*table(rows), *named, *equal_bytes(rows), *smallest(rows)]) + "\n"


def table(rows: Rows) -> list[str]:
    """Returns the table's lines: what each row costs, what it brings, and what it lost."""
    heads = ["row", "family", "parameters", "MACs", "bytes", "batch 1, median (99th percentile)", "updates"]
    heads += ["KL, nats", "agreement", "games"]
    for what in SPELLED.values():
        heads += [what, "minus teacher", "teacher-normalised", "ratio of means"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    against = compared(rows)
    for name, row in rows.items():
        nums = [str(row["protocols"][protocol]["num_episodes"]) for protocol in PROTOCOLS]
        cells = [row["label"], row["family"], *_costs(row), " / ".join(dict.fromkeys(nums))]
        for protocol in PROTOCOLS:
            games, lost = row["protocols"][protocol], against[name][protocol]
            cells += [
                _with_interval(games["mean"], games["interval"], ".2f"),
                "" if name == TEACHER else _with_interval(lost["difference_to_teacher"], lost["difference_interval"]),
                _share(lost["teacher_normalised"], lost["teacher_normalised_interval"]),
                _share(lost["ratio_of_means"]),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _costs(row: Mapping[str, Any]) -> list[str]:
    if not row.get("num_parameters"):
        return ["-"] * 7
    macs, dense, latency = row["num_macs"], row["num_macs_dense"], row.get("latency_microseconds")
    updates, own = row.get("updates_in_all"), row.get("agreement_with_float")
    return [
        f"{row['num_parameters']:,}",
        f"{macs / 1e6:.2f} M" + (f" ({dense / 1e6:.2f} M dense)" if dense != macs else ""),
        f"{row['num_bytes']:,}",
        f"{latency:.0f} us ({row['latency_p99_microseconds']:.0f})" if latency else "-",
        "-" if updates is None else f"{updates:,}",
        f"{row['kl']:.4f}",
        f"{row['agreement']:.1%}" + ("" if own is None else f" (own float32 {own:.1%})"),
    ]


def _with_interval(mean: float, interval: Sequence[float], form: str = "+.2f") -> str:
    return f"{mean:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _share(share: float | None, interval: Sequence[float] | None = None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%}" if interval is None else _with_interval(share, interval, ".1%")


def at_equal_bytes(rows: Rows) -> list[dict[str, Any]]:
    """Returns the difference under each protocol of every distilled network and every other one near its bytes.

    Distilled is what was born from the teacher's scores, whatever was done to it afterwards; the others began with the
    teacher's weights, or with hard labels (`origin`). A winner is named where the 95 % interval leaves 0 out.
    """
    pairs = []
    for name, row in rows.items():
        if row.get("origin") != "distillation":
            continue
        for other, against in rows.items():
            is_rival = against.get("origin") in ("teacher", "hard labels") and other != TEACHER
            if not is_rival or not NEAR[0] <= against["num_bytes"] / row["num_bytes"] <= NEAR[1]:
                continue
            pair: dict[str, Any] = {"distilled": name, "against": other}
            for protocol in PROTOCOLS:
                returns = [tuple(map(float, r["protocols"][protocol]["returns"])) for r in (row, against)]
                difference, low, high = _difference(*returns)
                winner = name if low > 0.0 else other if high < 0.0 else None
                pair[protocol] = {"difference": difference, "interval": [low, high], "winner": winner}
            pairs.append(pair)
    return pairs


def equal_bytes(rows: Rows) -> list[str]:
    """Returns what `at_equal_bytes` finds, as a table, and how often distillation won."""
    pairs = at_equal_bytes(rows)
    lines = ["", f"## At equal bytes ({NEAR[0]:.0%} to {NEAR[1]:.0%} of the distilled network's)", ""]
    if not pairs:
        return [*lines, "No row is near the bytes of a distilled one."]
    each = " | ".join(f"distilled minus it, {what} | who wins" for what in SPELLED.values())
    lines += [f"| distilled | bytes | against | its bytes | born from | {each} |"]
    lines += ["|---|---:|---|---:|---|" + "---:|---|" * len(SPELLED)]
    for pair in pairs:
        row, other = rows[pair["distilled"]], rows[pair["against"]]
        cells = [row["label"], f"{row['num_bytes']:,}", other["label"], f"{other['num_bytes']:,}", other["origin"]]
        for protocol in PROTOCOLS:
            found = pair[protocol]
            winner = rows[found["winner"]]["label"] if found["winner"] else "cannot tell"
            cells += [_with_interval(found["difference"], found["interval"]), winner]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for protocol, what in SPELLED.items():
        for camp in ("teacher", "hard labels"):
            winners = [(p["distilled"], p[protocol]["winner"]) for p in pairs if rows[p["against"]]["origin"] == camp]
            won = sum(winner == distilled for distilled, winner in winners)
            lost = sum(winner not in (distilled, None) for distilled, winner in winners)
            lines.append(
                f"- {what}, against those born from {'the ' if camp == 'teacher' else ''}{camp}: the distilled one wins"
                f" {won} of {len(winners)} pairs and loses {lost}"
            )
    return lines


def smallest(rows: Rows) -> list[str]:
    """Returns which row has the fewest parameters and bytes of those within one point of the teacher."""
    against = compared(rows)
    lines = ["", f"## The smallest within {WITHIN:g} point of the teacher", ""]
    for protocol in PROTOCOLS:
        for what, least in (("on average", 0), ("surely (the whole interval)", 1)):
            good = {
                name: row
                for name, row in rows.items()
                if row.get("num_parameters")
                and (
                    against[name][protocol]["difference_to_teacher"],
                    against[name][protocol]["difference_interval"][0],
                )[least]
                >= -WITHIN
            }
            said = [
                f"{min(good.values(), key=lambda r: r[cost])['label']} by {cost.removeprefix('num_')}"
                f" ({min(r[cost] for r in good.values()):,})"
                for cost in ("num_parameters", "num_macs", "num_bytes")
                if good
            ]
            distilled = [r for r in good.values() if r["family"] in ("distilled", "sharpened")]
            student = min(distilled, key=lambda r: r["num_parameters"])["label"] if distilled else "none"
            lines.append(
                f"- {SPELLED[protocol]}, {what}: distilled student: {student}; of all rows: {', '.join(said) or 'none'}"
            )
    return lines
