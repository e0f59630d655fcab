"""What a comparison says: a table, who wins at equal bytes, and the smallest student that is as good as the teacher."""

from collections.abc import Mapping
from typing import Any

from policykd.compression.rows import TEACHER
from policykd.evaluation import PROTOCOLS, ProtocolName
from policykd.statistics import difference_interval, teacher_normalised_score

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
    """Returns for each row and protocol the difference to the teacher with interval, and the normalised score."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in rows.items():
        found[name] = {}
        for protocol in PROTOCOLS:
            games, teacher, random = (r["protocols"][protocol] for r in (row, rows[TEACHER], rows["random"]))
            difference, low, high = difference_interval(games["returns"], teacher["returns"])
            found[name][protocol] = {
                "difference_to_teacher": difference,
                "difference_interval": [low, high],
                "teacher_normalised": teacher_normalised_score(games["mean"], teacher["mean"], random["mean"]),
            }
    return found


def report(rows: Rows) -> str:
    """Returns all of it as Markdown."""
    return "\n".join([*table(rows), *equal_bytes(rows), *smallest(rows)]) + "\n"


def table(rows: Rows) -> list[str]:
    """Returns the table's lines: what each row costs, what it brings, and what it lost."""
    each = " | ".join(f"{what} | minus teacher | of the teacher's score" for what in SPELLED.values())
    lines = [
        "| row | family | parameters | MACs | bytes | batch 1, median (99th percentile) | KL, nats | agreement | "
        + each
        + " |",
        "|---|---|---:|---:|---:|---:|---:|---:|" + "---:|---:|---:|" * 2,
    ]
    against = compared(rows)
    for name, row in rows.items():
        cells = [row["label"], row["family"], *_costs(row)]
        for protocol in PROTOCOLS:
            games, lost = row["protocols"][protocol], against[name][protocol]
            share = lost["teacher_normalised"]
            cells += [
                _with_interval(games["mean"], games["interval"], ".2f"),
                "" if name == TEACHER else _with_interval(lost["difference_to_teacher"], lost["difference_interval"]),
                "-" if share is None else f"{share:.1%}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _costs(row: Mapping[str, Any]) -> list[str]:
    if not row.get("num_parameters"):
        return ["-"] * 6
    macs, dense, latency = row["num_macs"], row["num_macs_dense"], row.get("latency_microseconds")
    return [
        f"{row['num_parameters']:,}",
        f"{macs / 1e6:.2f} M" + (f" ({dense / 1e6:.2f} M dense)" if dense != macs else ""),
        f"{row['num_bytes']:,}",
        f"{latency:.0f} us ({row['latency_p99_microseconds']:.0f})" if latency else "-",
        f"{row['kl']:.4f}",
        f"{row['agreement']:.1%}",
    ]


def _with_interval(mean: float, interval: list[float] | tuple[float, float], form: str = "+.2f") -> str:
    return f"{mean:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def equal_bytes(rows: Rows) -> list[str]:
    """Returns, for each distilled student as it stands, what the other ways near its bytes brought, and who wins.

    A winner is named where the 95 % interval of the difference leaves 0 out.
    """
    lines = ["", f"## At equal bytes ({NEAR[0]:.0%} to {NEAR[1]:.0%} of the distilled student's)"]
    for row in rows.values():
        if row["family"] != "distilled":
            continue
        near = {
            other: r
            for other, r in rows.items()
            if r["family"] not in ("teacher", "random", "distilled")
            and NEAR[0] <= r["num_bytes"] / row["num_bytes"] <= NEAR[1]
        }
        if not near:
            continue
        lines += ["", f"Distilled {row['label']}, {row['num_bytes']:,} bytes", ""]
        each = " | ".join(f"distilled minus it, {what} | who wins" for what in SPELLED.values())
        lines += [f"| against | bytes | {each} |", "|---|---:|" + "---:|---|" * 2]
        for other in near.values():
            cells = [other["label"], f"{other['num_bytes']:,}"]
            for protocol in PROTOCOLS:
                ours, theirs = (r["protocols"][protocol]["returns"] for r in (row, other))
                difference, low, high = difference_interval(ours, theirs)
                winner = "distilled" if low > 0.0 else other["family"] if high < 0.0 else "cannot tell"
                cells += [_with_interval(difference, (low, high)), winner]
            lines.append("| " + " | ".join(cells) + " |")
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
            distilled = [r for r in good.values() if r["family"] == "distilled"]
            student = min(distilled, key=lambda r: r["num_parameters"])["label"] if distilled else "none"
            lines.append(
                f"- {SPELLED[protocol]}, {what}: distilled student: {student}; of all rows: {', '.join(said) or 'none'}"
            )
    return lines
