"""HTML and SVG in which every text is escaped unless it was made here."""

import base64
import re
from collections.abc import Collection, Iterable, Iterator
from html import escape
from itertools import groupby, pairwise

_WITH_MORE = re.compile(r"(.*\d\S*(?: \S+)?) (\[.*\]|\(.*\))")
"""a number, and what is said about it in brackets"""


class Markup(str):
    """HTML that `tag` made; any other text is escaped where it becomes a child or an attribute."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | bool) -> Markup:
    """Returns an element.

    Args:
        name: `div`, `polyline`.
        children: texts, which are escaped, and elements.
        attributes: `class_` is `class`, other underscores are hyphens; True stands alone, False is left out.
    """
    parts = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(attribute)
        elif value is not False:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            parts.append(f'{attribute}="{escape(text)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in VOID else f"{opening}{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Returns texts, which are escaped, and elements one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


VOID = ("br", "img", "input", "meta")
"""elements that have no end"""


def figure(name: str, caption: str, *content: str) -> Markup:
    """Returns a picture in its frame, its name and caption above it."""
    return tag("figure", tag("figcaption", tag("b", name), caption), *content)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Returns what the colours mean: labels, and their looks in the style sheet."""
    return tag("div", *(tag("span", label, class_=look) for label, look in entries), class_="legend")


def scrolled(table: Markup, name: str, *, class_: str = "scroll") -> Markup:
    """Returns a table in a box of its own, which a keyboard reaches and scrolls."""
    return tag("div", table, class_=class_, tabindex="0", role="region", aria_label=name)


def data_url(content: bytes, kind: str) -> str:
    """Returns a file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def blocks(text: str, *, name: str = "Table", begins: Collection[str] = ()) -> Iterator[Markup]:
    """Yields the Markdown that our own tables are written in: headings (as h3), tables, lists and paragraphs.

    Args:
        text: Markdown.
        name: of a table before any heading.
        begins: heads of columns at which a table of its own begins, with the first column again and under that name.
    """
    last = name
    for kind, group in groupby((line for line in text.splitlines() if line.strip()), _kind):
        lines = list(group)
        if kind == "table":
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            for title, part in _parts([rows[0], *rows[2:]], last, begins):
                yield from [tag("h3", title[:1].upper() + title[1:])] if title != last else []
                yield scrolled(_table(part), title, class_="scroll wide" if len(part[0]) > 8 else "scroll")
        elif kind == "list":
            yield tag("ul", *(tag("li", line[2:]) for line in lines))
        else:
            last = lines[-1].lstrip("# ")
            yield from (tag("h3" if kind == "heading" else "p", line.lstrip("# ")) for line in lines)


def _kind(line: str) -> str:
    return {"|": "table", "#": "heading", "-": "list"}.get(line[0], "paragraph")


def _parts(rows: list[list[str]], name: str, begins: Collection[str]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields a table, its heads first, in parts that a page has room for: the name of each, and its rows."""
    starts = [i for i, head in enumerate(rows[0]) if head in begins]
    yield name, [row[: starts[0]] if starts else row for row in rows]
    for start, end in pairwise([*starts, len(rows[0])]):
        yield rows[0][start], [[row[0], *row[start:end]] for row in rows]


def _table(rows: list[list[str]]) -> Markup:
    looks = ["words" if any(cell[:1].isalpha() for cell in column[1:]) else "" for column in zip(*rows, strict=True)]
    heads = (tag("th", cell, scope="col", class_=look or False) for cell, look in zip(rows[0], looks, strict=True))
    body = (
        tag("tr", tag("th", cells[0], scope="row", class_="words"), *map(_cell, cells[1:], looks[1:]))
        for cells in rows[1:]
    )
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))


def _cell(text: str, look: str) -> Markup:
    text = text.replace("-", "\N{MINUS SIGN}") if re.match(r"-\d", text) else text
    if match := _WITH_MORE.fullmatch(text):
        return tag("td", match[1], tag("small", match[2].replace("-", "\N{MINUS SIGN}")), class_=look or False)
    return tag("td", text, class_=look or False)
