"""Charts as inline SVG. Colours are classes of the style sheet, so that they follow light and dark."""

from collections.abc import Mapping, Sequence

from sphereify.report.markup import Markup, element, number
from sphereify.report.wording import steps

WIDTH, HEIGHT = 180, 96
"""Size of a small chart."""
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 6, 16
"""Margins of a small chart, which hold the marks of the axes."""


class Scale:
    """A linear map from an interval of values to one of coordinates."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.start = low, start
        self.factor = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def bar(share: float, mark: float | None = None, label: str = "") -> Markup:
    """A bar that fills a share in [0, 1] of its track, and perhaps a mark at another share."""
    fill = 100 * min(max(share, 0.0), 1.0)
    tick = None
    if mark is not None:
        at = 100 * min(max(mark, 0.0), 1.0)
        tick = element("rect", class_="mark", x=min(max(at - 0.6, 0.0), 98.8), y=0, width=1.2, height=10)
    return element(
        "svg",
        element("rect", class_="track", x=0, y=2, width=100, height=6),
        element("rect", class_="fill", x=0, y=2, width=fill, height=6),
        tick,
        class_="bar",
        view_box="0 0 100 10",
        preserve_aspect_ratio="none",
        role="img",
        aria_label=label or f"{fill:.0f} of 100",
    )


def dots(value: float, low: float, high: float, mark: float | None = None, label: str = "") -> Markup:
    """A dot on an axis from a low to a high value, and perhaps a mark at another value, joined to it."""
    at = Scale(low, high, 2, 98)
    joint = None
    if mark is not None:
        first, last = sorted((at(mark), at(value)))
        joint = [
            element("rect", class_="joint", x=first, y=4, width=last - first, height=2),
            element("rect", class_="mark", x=at(mark) - 0.5, y=0, width=1.0, height=10),
        ]
    return element(
        "svg",
        element("rect", class_="track", x=0, y=4.5, width=100, height=1),
        joint,
        element("rect", class_="fill", x=at(value) - 1, y=2, width=2, height=6),
        class_="bar",
        view_box="0 0 100 10",
        preserve_aspect_ratio="none",
        role="img",
        aria_label=label,
    )


def histogram(before: Sequence[float] | None, after: Sequence[float], low: float, high: float, label: str) -> Markup:
    """Two histograms over one axis of angles, each as high as the chart: an area before, a line after."""
    x = Scale(low, high, LEFT, WIDTH - RIGHT)
    shapes = [element("path", class_="grid", d=f"M{number(x(90))} {TOP}V{HEIGHT - BOTTOM}")]
    for kind, densities in (("area", before), ("line", after)):
        if densities is not None:
            y = Scale(0, max(*densities, 1e-9), HEIGHT - BOTTOM, TOP)
            shapes.append(element("path", class_=kind, d=_steps(densities, low, high, x, y)))
    side = next(step for step in (60, 45, 30, 20, 15, 10, 5, 2, 1) if step <= 0.8 * (high - 90))
    return _chart(shapes, _x_axis([90 - side, 90, 90 + side], x, "°"), label)


def ranges(
    before: tuple[float, float, float] | None, after: tuple[float, float, float], low: float, high: float, label: str
) -> Markup:
    """Two bars, from a low to a high quantile with a mark at the median, over an axis without marks."""
    at = Scale(low, high, 0, 100)
    shapes = [element("rect", class_="grid", x=at(90) - 0.2, y=0, width=0.4, height=20)]
    for place, kind, quantiles in ((3, "before", before), (11, "after", after)):
        if quantiles is not None:
            first, median, last = (min(max(at(q), 0.0), 100.0) for q in quantiles)
            shapes.append(element("rect", class_=kind, x=first, y=place, width=max(last - first, 0.5), height=6))
            shapes.append(element("rect", class_="median", x=median - 0.3, y=place - 1, width=0.6, height=8))
    return element(
        "svg",
        shapes,
        class_="bar ranges",
        view_box="0 0 100 20",
        preserve_aspect_ratio="none",
        role="img",
        aria_label=label,
    )


def lines(
    series: Mapping[str, Sequence[float]],
    label: str,
    *,
    low: float = 0.0,
    high: float = 1.0,
    first: int = 0,
    dotted: float | None = None,
    unit: str = "",
) -> Markup:
    """Lines over whole numbers from `first` on, the n-th in the colour and dashes of the n-th series.

    Args:
        series: values by name, as many of each.
        label: what the chart shows, for readers that do not see it.
        low, high: bounds of the values.
        first: number of the first value on the axis.
        dotted: height of a dotted line across.
        unit: of the marks on the axis of the values.
    """
    count = max(len(values) for values in series.values())
    x = Scale(first, max(first + count - 1, first + 1), LEFT + 22, WIDTH - RIGHT)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    shapes: list[Markup] = []
    for value in steps(low, high, 3):
        shapes.append(element("path", class_="grid", d=f"M{LEFT + 22} {number(y(value))}H{WIDTH - RIGHT}"))
        text = f"{value:g}{unit}"
        shapes.append(element("text", text, x=LEFT + 18, y=y(value) + 3, text_anchor="end"))
    if dotted is not None:
        shapes.append(element("path", class_="dotted", d=f"M{LEFT + 22} {number(y(dotted))}H{WIDTH - RIGHT}"))
    for place, values in reversed(list(enumerate(series.values()))):
        points = [f"{number(x(first + i))} {number(y(min(max(v, low), high)))}" for i, v in enumerate(values)]
        path = f"M{points[0]}h.01" if len(points) == 1 else "M" + "L".join(points)
        shapes.append(element("path", class_=f"line s{place % 4}", d=path))
    marks = [float(round(m)) for m in steps(first, first + count - 1, 6) if m == round(m)]
    return _chart(shapes, _x_axis(marks, x), label)


def _chart(shapes: Sequence[Markup], axis: Sequence[Markup], label: str) -> Markup:
    size = f"0 0 {WIDTH} {HEIGHT}"
    return element("svg", axis, shapes, class_="chart", view_box=size, role="img", aria_label=label)


def _x_axis(marks: Sequence[float], x: Scale, unit: str = "") -> list[Markup]:
    """A base line with numbers below it."""
    base = HEIGHT - BOTTOM
    axis = [element("path", class_="axis", d=f"M{LEFT} {base}H{WIDTH - RIGHT}")]
    for mark in marks:
        axis.append(element("path", class_="axis", d=f"M{number(x(mark))} {base}v3"))
        axis.append(element("text", f"{mark:g}{unit}", x=x(mark), y=base + 13, text_anchor="middle"))
    return axis


def _steps(densities: Sequence[float], low: float, high: float, x: Scale, y: Scale) -> str:
    """The outline of a histogram, from the base line and back to it."""
    width = (high - low) / len(densities)
    path = [f"M{number(x(low))} {number(y(0))}"]
    for place, density in enumerate(densities):
        path.append(f"V{number(y(density))}H{number(x(low + (place + 1) * width))}")
    return "".join([*path, f"V{number(y(0))}"])
