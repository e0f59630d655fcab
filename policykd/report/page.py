"""The page that says what a run lost and gained: data in, one HTML file out.

Nothing in it is loaded from elsewhere, nothing in it runs, and every text from a file is escaped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from policykd.evaluation.evaluate import PROTOCOLS
from policykd.report import learning, sections
from policykd.report.data import Comparison, Report
from policykd.report.markup import Markup, joined, tag
from policykd.report.text import headline, protocol_name, signed, times

SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""what a browser may load: pictures and styles in the page itself; no script at all"""


def page(report: Report) -> str:
    """Returns the page of a run.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the results are not those of a run.
    """
    parts = {
        "Result": sections.result(report),
        "Film": learning.film(report),
        "Every game": sections.games(report),
        "Cost and return": sections.costs(report),
        "Other compressors": sections.compressors(report.comparison),
        "Learning": learning.learning(report) or learning.taught(report),
        "Actions": learning.actions(report),
        "How it was made": origin(report),
    }
    top = [
        tag("p", f"A distilled policy: {report.name}", class_="over"),
        tag("h1", f"{report.game}: what the student kept"),
        tag("p", headline(report.results), class_="verdict"),
        tag(
            "dl",
            *(tag("div", tag("dt", text), tag("dd", figure)) for figure, text in tiles(report.results)),
            class_="tiles",
        ),
    ]
    return document(f"{report.game}: {report.name}", top, parts, report.results.get("versions", {}))


def comparison_page(game: str, comparison: Comparison) -> str:
    """Returns the page of a comparison of compressors alone.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the rows are not those of a comparison.
    """
    top = [
        tag("p", f"A comparison: {comparison.source}", class_="over"),
        tag("h1", f"{game}: what compression costs"),
        tag("p", f"{len(comparison.content.rows)} policies from one teacher and one set of states.", class_="verdict"),
    ]
    parts = {
        "Result": sections.compressors(comparison),
        "How it was made": _made(
            comparison.content.command,
            {"Settings": asdict(comparison.content.settings), "Versions": versions_of(comparison)},
        ),
    }
    return document(f"{game}: {comparison.source}", top, parts, versions_of(comparison))


def versions_of(comparison: Comparison) -> Mapping[str, Any]:
    """Returns the versions that a comparison was made with."""
    return comparison.content.versions


def document(name: str, top: list[Markup], parts: Mapping[str, Markup | None], versions: Mapping[str, Any]) -> str:
    """Returns an HTML file of sections, the style sheet in it; those that are None are left out."""
    style = Markup(files("policykd.report").joinpath("report.css").read_text())
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=SECURITY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", name),
        tag("style", style),
    )
    links, bodies = [], []
    for title, content in parts.items():
        if content is not None:
            anchor = title.lower().replace(" ", "-")
            links.append(tag("li", tag("a", title, href=f"#{anchor}")))
            heading = tag("h2", title, id=f"{anchor}-name")
            bodies.append(tag("section", heading, content, id=anchor, aria_labelledby=f"{anchor}-name"))
    foot = tag(
        "footer", f"Written by policykd {versions.get('policykd', '')}. Nothing on this page is loaded from elsewhere."
    )
    nav = tag("nav", tag("ul", *links), aria_label="Sections")
    body = tag("body", tag("header", *top, nav), tag("main", *bodies), foot)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def tiles(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the figures at the top and what each is."""
    protocol, compared = next(iter(results["comparison"].items()))
    share = compared["teacher_normalised"]
    name = protocol_name(protocol).lower()
    if share is not None:
        span = results["teacher"]["protocols"][protocol]["mean"] - results["random"]["protocols"][protocol]["mean"]
        low, high = (f"{1 + bound / span:.1%}" for bound in compared["difference_interval"])
        yield f"{share:.1%}", f"of the teacher's score above random play [{low}, {high}], {name}"
    else:
        yield signed(compared["difference_to_teacher"]), f"return against the teacher's, {name}"
    words = {
        "num_parameters": ("fewer parameters", "more parameters"),
        "num_macs": ("fewer multiply-accumulates", "more multiply-accumulates"),
        "latency_microseconds": ("faster for one state, torch, one thread", "slower for one state, torch, one thread"),
    }
    for key, (less, more) in words.items():
        if ratio := times(results["teacher"].get(key), results["student"].get(key), less, more):
            yield ratio


def origin(report: Report) -> Markup:
    """Returns how a run was made: command, settings, versions, hashes, protocols, times."""
    results, config = report.results, report.config
    made = {
        "States labelled": f"{results['num_states_labelled']:,}" if "num_states_labelled" in results else None,
        "Gradient updates": f"{results['num_updates']:,}" if "num_updates" in results else None,
        **{f"Seconds: {phase}": f"{s:,.0f}" for phase, s in results.get("wall_seconds", {}).items()},
    }
    settings = {str(key).replace("_", " "): value for key, value in config.get("settings", {}).items()}
    teacher = settings.pop("teacher", None) or report.student.get("teacher", {})
    teacher = teacher if isinstance(teacher, Mapping) else {"ref": teacher}
    hashes = {f"Teacher: {key}": value for key, value in teacher.items() if value}
    hashes |= {"Student: sha256": report.student.get("sha256"), "Student: shape": report.student.get("shape")}
    facts = {
        "Work": made,
        "Teacher and student": hashes,
        "Versions": results.get("versions", {}),
        "Machine": config.get("machine", {}),
        "Settings": settings,
    }
    return _made(results.get("command") or config.get("command"), facts)


def _made(command: object, facts: Mapping[str, Mapping[str, Any]]) -> Markup:
    blocks = [tag("div", tag("h3", name), _pairs(pairs)) for name, pairs in facts.items() if pairs]
    made_by = joined(tag("h3", "Command"), tag("pre", tag("code", str(command)))) if command else ""
    return joined(made_by, tag("div", *blocks, class_="facts"), tag("h3", "Protocols", class_="next"), _protocols())


def _protocols() -> Markup:
    rules = {}
    for name, how in PROTOCOLS.items():
        start = f"0 to {how.noop_max - 1} raw frames without action at the start" if how.noop_max else "no no-op starts"
        sticky = how.repeat_action_probability
        stick = f"each frame repeats the last action with chance {sticky:g}" if sticky else "no sticky actions"
        choice = "the best action is taken" if how.deterministic else "actions are drawn from the policy"
        rules[f"{protocol_name(name)} ({name})"] = f"{start}; {stick}; {choice}; whole games, rewards unclipped"
    return _pairs(rules)


def _pairs(pairs: Mapping[str, Any]) -> Markup:
    known = {str(key): value for key, value in pairs.items() if value is not None}
    return tag(
        "dl",
        *(part for key, value in known.items() for part in (tag("dt", key), tag("dd", _written(value)))),
        class_="pairs",
    )


def _written(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_written(v)}" for key, v in value.items() if v not in ("", None))
    if isinstance(value, list | tuple):
        return ("-" if all(isinstance(v, int) for v in value) else ", ").join(map(_written, value))
    return str(value)
