"""HTML and SVG as text: every string is escaped, unless it is markup already."""

import html
from collections.abc import Iterable
from typing import Any


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An element with its children and attributes.

    Args:
        children: strings, which are escaped; markup; numbers; None, which is left out; or iterables of these.
        attributes: `class_` is class, and other underscores are hyphens. None and False leave an attribute out, True
            gives it without a value, and floats are rounded to two decimals.

    >>> element("a", "1 < 2", class_="x", aria_hidden=True)
    '<a class="x" aria-hidden>1 &lt; 2</a>'
    """
    opened = f"<{tag}{''.join(_attribute(name, value) for name, value in attributes.items())}>"
    return Markup(opened if tag in _VOID else f"{opened}{joined(children)}</{tag}>")


_VOID = ("br", "hr", "input", "meta", "col")


def joined(children: Any) -> Markup:
    """Children of an element, one after the other."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, Iterable) and not isinstance(children, str):
        return Markup("".join(joined(child) for child in children))
    return Markup(html.escape(str(children)))


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    key = name.rstrip("_").replace("_", "-") if name not in _CAMEL else _CAMEL[name]
    if value is True:
        return f" {key}"
    text = number(value) if isinstance(value, float) else str(value)
    return f' {key}="{html.escape(text)}"'


_CAMEL = {"view_box": "viewBox", "preserve_aspect_ratio": "preserveAspectRatio"}
"""Names of SVG that have a capital letter."""


def number(value: float) -> str:
    """A coordinate with at most two decimals.

    >>> number(1.0), number(2.346)
    ('1', '2.35')
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")


def table(
    headers: Iterable[Any], rows: Iterable[Iterable[Any]], *, numeric: Iterable[int] = (), **attributes: Any
) -> Markup:
    """A table in a box that scrolls by itself where the window is narrow.

    Args:
        headers: a cell of each column.
        rows: cells; the first one of each row names it.
        numeric: columns that are set flush right.
        attributes: of the table; `label` names it for readers that do not see it.
    """
    right = set(numeric)
    label = attributes.pop("label", None)

    def style(column: int) -> str | None:
        return "n" if column in right else None

    head = element("tr", (element("th", cell, scope="col", class_=style(i)) for i, cell in enumerate(headers)))
    body = [
        element(
            "tr",
            (
                element("th", cell, scope="row") if i == 0 else element("td", cell, class_=style(i))
                for i, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    inner = element("table", element("thead", head), element("tbody", body), **attributes)
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def folded(summary: Any, *content: Any, is_open: bool = False) -> Markup:
    """Content that is shown when its summary is chosen."""
    return element("details", element("summary", summary), content, open=is_open)
