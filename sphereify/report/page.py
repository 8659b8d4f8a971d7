"""The HTML file of a report: its head with the style, and its parts in order."""

from collections.abc import Mapping
from importlib.resources import files

from sphereify.report.contents import Contents
from sphereify.report.details import sections
from sphereify.report.markup import Markup, element, joined
from sphereify.report.overview import cards, headline, resisting, strip
from sphereify.report.wording import amount


def page(contents: Contents, *, date: str, versions: Mapping[str, str]) -> str:
    """A report as the text of one HTML file, which needs no other."""
    parts = list(sections(contents))
    links = (element("a", title, href=f"#{key}") for key, title, _ in parts)
    body = element(
        "body",
        element(
            "header",
            element("p", "sphereify report", class_="over"),
            element("h1", contents.name),
            element("p", headline(contents), class_="lead"),
        ),
        element(
            "main",
            element("section", strip(contents), aria_label="The network as a strip of layers"),
            element("section", element("h2", "Which layers resist"), resisting(contents), id="resist"),
            element("section", element("h2", "In numbers"), cards(contents), _options(contents), id="numbers"),
            element("nav", links, aria_label="Parts of the report"),
            (element("section", element("h2", title), content, id=key) for key, title, content in parts),
        ),
        element("footer", _made(contents, date, versions)),
        element("script", Markup(_file("report.js"))),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"sphereify {versions.get('sphereify', '')}".strip()),
        element("title", f"{contents.name}: sphereify report"),
        element("style", Markup(_file("report.css"))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _file(name: str) -> str:
    return files("sphereify.report").joinpath(name).read_text(encoding="utf-8")


def _options(contents: Contents) -> Markup | None:
    """The options that were given."""
    if not contents.options:
        return element("p", "Options: all at their defaults.", class_="quiet")
    items = (element("li", element("code", words)) for words in contents.options)
    return joined([element("h3", "Options"), element("ul", items, class_="options")])


def _made(contents: Contents, date: str, versions: Mapping[str, str]) -> Markup:
    """The lines at the foot: the model, the versions and the date."""
    with_versions = ", ".join(f"{package} {version}" for package, version in versions.items())
    size = f", {amount(contents.parameters)} parameters" if contents.parameters is not None else ""
    return joined(
        [
            element("p", "Model: ", element("code", contents.plan.model), f"{size}."),
            element("p", f"Made on {date} with {with_versions}."),
        ]
    )
