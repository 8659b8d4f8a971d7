"""Reading a report as a browser does: elements, their attributes and their text."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "hr", "input", "col"}


@dataclass
class Element:
    """An element of a page."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text in it."""
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return "".join(parts)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    def all(self, tag: str = "", class_: str = "") -> "list[Element]":
        """The elements in it, at any depth."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in ("", child.tag) and (not class_ or class_ in child.classes):
                    found.append(child)
                found += child.all(tag, class_)
        return found

    def part(self, key: str) -> "Element":
        """The one element with this id."""
        (found,) = [element for element in self.all() if element.attributes.get("id") == key]
        return found

    def rows(self) -> list[list[str]]:
        """The cells of the rows of the table bodies in it."""
        rows = [row for body in self.all("tbody") for row in body.all("tr")]
        return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in rows]


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("")]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        assert len(element.attributes) == len(attrs), f"an attribute twice: {attrs}"
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(path: Path) -> Element:
    """The page in a file; an assertion fails where its elements are not nested."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1, [element.tag for element in reader.open]
    return reader.open[0]


def references(page: Element, text: str) -> list[str]:
    """Everything by which a page may ask for something else than itself."""
    found = [
        value or ""
        for element in page.all()
        for name, value in element.attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
        and not (value or "").startswith("#")
    ]
    found += [
        element.tag for element in page.all() if element.tag in ("link", "iframe", "object", "embed", "img", "base")
    ]
    return found + re.findall(r"(?:url\(|@import|fetch\(|XMLHttpRequest|https?:|(?<![:\w])//[a-z]).{0,40}", text)
