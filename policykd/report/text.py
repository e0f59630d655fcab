"""Numbers and verdicts as a page says them."""

import math
from collections.abc import Mapping
from typing import Any, Literal

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
FEWEST_GAMES = 20
"""of each side, below which nothing is claimed: the bootstrap of a few games is too sure of itself"""
CLOSE = 0.05
"""of the teacher's advantage over random play: an interval inside it, either way, is called within"""
Verdict = Literal["above", "below", "within", "cannot tell"]
PROTOCOL_NAMES: dict[str, str] = {
    "noop_sampled": "No-op starts, sampled actions",
    "sticky_greedy": "Sticky actions, greedy play",
}
PROTOCOL_PHRASES: dict[str, str] = {
    "noop_sampled": "With no-op starts and sampled actions",
    "sticky_greedy": "With sticky actions and greedy play",
}


def protocol_name(key: str) -> str:
    """Returns how a protocol is called on a page; one that is not known keeps its key."""
    return PROTOCOL_NAMES.get(key, key)


def number(value: float, digits: int = 2) -> str:
    """Returns a number with a proper minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def tick(value: float) -> str:
    """Returns a number as short as an axis wants it."""
    return f"{value:,.6g}".replace("-", MINUS)


def signed(value: float) -> str:
    """Returns a difference."""
    return f"{value:+,.2f}".replace("-", MINUS)


def interval(low_high: tuple[float, float] | list[float], *, is_difference: bool = False) -> str:
    """Returns `[low, high]`."""
    low, high = (signed(float(v)) if is_difference else number(float(v)) for v in low_high)
    return f"[{low}, {high}]"


def short(value: float) -> str:
    """Returns a count with k, M or G."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Returns a number of bytes in kB."""
    return f"{num_bytes / 1e3:,.0f} kB"


def microseconds(value: float) -> str:
    """Returns a latency."""
    return f"{value:,.0f} \N{MICRO SIGN}s"


def times(before: float | None, after: float | None, less: str, more: str) -> tuple[str, str] | None:
    """Returns a ratio, such as 15.1 and "fewer parameters", or None where it is not known."""
    if not before or not after:
        return None
    ratio, word = (before / after, less) if before >= after else (after / before, more)
    return f"{ratio:.1f}\N{MULTIPLICATION SIGN}", word


def verdict(results: Mapping[str, Any], protocol: str) -> tuple[Verdict, str]:
    """Returns what the interval of the difference to the teacher supports, and the sentence that says so."""
    student, teacher, random = (results[who]["protocols"][protocol] for who in ("student", "teacher", "random"))
    compared = results["comparison"][protocol]
    low, high = (float(bound) for bound in compared["difference_interval"])
    counts = int(student["num_episodes"]), int(teacher["num_episodes"])
    how, bound = PROTOCOL_PHRASES.get(protocol, f"Under {protocol}"), max(-low, high)
    said: dict[Verdict, str] = {
        "cannot tell": f"{min(counts)} games cannot tell the student from the teacher",
        "above": "the student plays above the teacher",
        "below": "the student plays below the teacher",
        "within": f"the student plays within {math.ceil(round(100 * bound, 6)) / 100:.2f} points of the teacher",
    }
    word: Verdict = "cannot tell"
    if min(counts) >= FEWEST_GAMES:
        if low > 0:
            word = "above"
        elif high < 0:
            word = "below"
        elif bound <= CLOSE * (teacher["mean"] - random["mean"]):
            word = "within"
    bounds = interval([low, high], is_difference=True)
    figures = (
        f"{signed(compared['difference_to_teacher'])}, 95% interval {bounds}, {counts[0]} games against {counts[1]}"
    )
    return word, f"{how} {said[word]} ({figures})."


def headline(results: Mapping[str, Any]) -> str:
    """Returns the sentences at the top of a page; they claim nothing that an interval does not support."""
    return " ".join(verdict(results, protocol)[1] for protocol in results["comparison"])
