"""The parts of the report below its top: fits, angles, reasons, robustness, training, energies, and every layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sphereify.calibration.results import LayerFit
from sphereify.nn.energy_report import LayerEnergy
from sphereify.report.angles import Angles, Spread
from sphereify.report.charts import bar, dots, histogram, lines, ranges
from sphereify.report.contents import Contents
from sphereify.report.markup import Markup, element, folded, joined, table
from sphereify.report.overview import reason_list
from sphereify.report.wording import amount, percent, r2, shown_name
from sphereify.wording import count

OPEN_ROWS = 25
"""Longest table that is not folded."""
PANELS = 12
"""Number of layers with histograms of their own."""
BINS = 60


def sections(contents: Contents) -> Iterator[tuple[str, str, Markup]]:
    """Identifier, title and content of each part for which there is something to show."""
    if contents.fits:
        yield "fit", "What the angles explain of each layer", _fits(contents)
    if contents.robustness is not None:
        yield "robustness", "Accuracy under corruption", _robustness(contents.robustness)
    if contents.epochs:
        yield "training", "Training", _training(contents.epochs)
    if contents.angles is not None:
        yield "angles", "Angles before and after", _angles(contents, contents.angles)
    yield "reasons", "Every reason", reason_list(contents, contents.plan.decisions)
    if contents.energy is not None or contents.without_energy:
        yield "energy", "Hyperspherical energy", _energies(contents)
    yield "layers", "Every layer", _layers(contents)
    if contents.plan.notes or contents.plan.details:
        notes = (element("li", line) for line in [*contents.plan.notes, *contents.plan.details])
        yield "notes", "Notes of the plan", element("ul", notes)


def _long(rows: int, what: str, content: Markup) -> Markup:
    """A table, folded if it is long."""
    return content if rows <= OPEN_ROWS else folded(f"All {count(rows, what)}", content)


# ---------------------------------------------------------------------------------------------------------------- fits


def _fits(contents: Contents) -> Markup:
    assert contents.calibration is not None
    fits = list(contents.calibration.layers.values())
    radii = {name: radius for name, radius in contents.radii.items() if radius}
    fates = contents.fates
    noted = any(fit.note for fit in fits)
    headers = [
        "layer",
        *(["ρ"] if radii else []),
        "R² after",
        "",
        "R² before",
        "positions",
        *(["note"] if noted else []),
    ]

    def row(fit: LayerFit) -> list[Any]:
        fate = fates.get(fit.name)
        name = [element("i", class_=f"key {fate.key}") if fate else None, element("code", fit.name or "(the model)")]
        radius = [f"{radii[fit.name]:.3g}" if fit.name in radii else ""] if radii else []
        chart = bar(fit.after, fit.before, f"R² {r2(fit.after)} after the calibration, {r2(fit.before)} before")
        note = [fit.note] if noted else []
        return [name, *radius, r2(fit.after), chart, r2(fit.before), f"{fit.rows:,}" if fit.rows else "", *note]

    shift = 1 if radii else 0
    numeric = [1, 1 + shift, 3 + shift, 4 + shift]
    rows = table(headers, map(row, fits), numeric=numeric, label="R² of each layer", class_="fits")
    text = (
        "R² is the share of the variance of the original layer's output that the angular layer explains on the "
        "calibration inputs: 1 is all of it. The bar is R² after the calibration, the mark R² with copied weights."
    )
    notes = [element("p", note, class_="note") for note in contents.calibration.notes]
    difference = contents.calibration.difference
    steps = None
    if difference is not None:
        steps = element(
            "p",
            f"Optimizer steps: the error of the outputs fell from {difference[0]:.3f} to {difference[1]:.3f} of their "
            f"variance. R² is that before the steps.",
        )
    return joined([element("p", text), notes, steps, _long(len(fits), "layer", rows)])


# ---------------------------------------------------------------------------------------------------------- robustness


def _robustness(results: Mapping[str, Any]) -> Markup:
    networks: Mapping[str, Any] = results["networks"]
    kinds = list(next(iter(networks.values()))["corrupted"])
    panels = []
    for kind in kinds:
        series = {name: [one["clean"], *one["corrupted"][kind]] for name, one in networks.items()}
        percents = {name: [100 * share for share in shares] for name, shares in series.items()}
        told = "; ".join(f"{name}: {', '.join(f'{v:.1f}' for v in shares)}" for name, shares in percents.items())
        label = f"Accuracy in % under {kind} at strengths 0 to {len(shares_of(percents)) - 1}: {told}"
        chart = lines(percents, label, high=100, dotted=100 * results["chance"])
        panels.append(element("figure", element("figcaption", kind), chart))
    legend = element(
        "ul",
        (element("li", element("i", class_=f"key stroke s{place % 4}"), name) for place, name in enumerate(networks)),
        element("li", element("i", class_="key stroke dots"), "chance"),
        class_="legend",
    )
    headers = ["accuracy, %", "clean", *kinds, "mean"]
    rows = (
        [name, *(f"{100 * share:.1f}" for share in (one["clean"], *one["means"].values(), one["mean"]))]
        for name, one in networks.items()
    )
    text = (
        f"Accuracy in % on {results['images']:,} test images at the strengths 1 to 5 of each corruption; 0 is the "
        f"image as it is. The table has the means over the strengths."
    )
    numbers = table(headers, rows, numeric=range(1, len(headers)), label="Accuracy under corruption")
    return joined([element("p", text), legend, element("div", panels, class_="panels"), numbers])


def shares_of(series: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """The values of the first series."""
    return next(iter(series.values()))


# ------------------------------------------------------------------------------------------------------------ training


def _training(epochs: Sequence[Mapping[str, Any]]) -> Markup:
    accuracy = [100 * epoch["accuracy"] for epoch in epochs]
    loss = [epoch["loss"] for epoch in epochs]
    low = max(0.0, math.floor((min(accuracy) - 2) / 10) * 10)
    panels = [
        element(
            "figure",
            element("figcaption", "test accuracy, %"),
            lines(
                {"accuracy": accuracy}, f"Test accuracy in % by epoch: {_told(accuracy)}", low=low, high=100, first=1
            ),
        ),
        element(
            "figure",
            element("figcaption", "training loss"),
            lines({"loss": loss}, f"Training loss by epoch: {_told(loss)}", high=max(*loss, 1e-9), first=1),
        ),
    ]
    headers = ["epoch", "training loss", "test accuracy, %", "rate"]
    rows = ([str(e["number"]), f"{e['loss']:.4f}", f"{100 * e['accuracy']:.2f}", f"{e['lr']:.2e}"] for e in epochs)
    numbers = table(headers, rows, numeric=range(1, 4), label="Epochs")
    best = max(range(len(epochs)), key=lambda place: accuracy[place])
    text = (
        f"{count(len(epochs), 'epoch')}; test accuracy {accuracy[-1]:.2f} % at the end, {accuracy[best]:.2f} % at "
        f"best, in epoch {epochs[best]['number']}."
    )
    tables = numbers if len(epochs) <= 10 else folded(f"All {count(len(epochs), 'epoch')}", numbers)
    return joined([element("p", text), element("div", panels, class_="panels"), tables])


def _told(values: Sequence[float]) -> str:
    """The first and the last of some values, in words."""
    return f"{values[0]:.3g} at first, {values[-1]:.3g} at the end"


# -------------------------------------------------------------------------------------------------------------- angles


def _angles(contents: Contents, angles: Angles) -> Markup:
    if angles.reason:
        return element("p", f"Not measured: the network does not run with these inputs: {angles.reason}", class_="note")
    if not angles.after:
        return element("p", "Not measured: the inputs reach no angular layer, or the network is folded.", class_="note")
    names = list(angles.after)
    chosen = _chosen(contents, names)
    everything = [*angles.before.values(), *angles.after.values()]
    reach = max(max(90 - spread.quantile(0.005), spread.quantile(0.995) - 90) for spread in everything)
    reach = min(90.0, max(5.0, 5.0 * math.ceil(reach / 5)))
    low, high = 90 - reach, 90 + reach
    panels = [_panel(name, angles, low, high) for name in chosen]
    what = "Angles between the patches and the filters of a layer"
    text = f"{what}, measured on {angles.inputs}; 90° is a right angle, where the output is 0."
    if angles.before:
        text += " The area is the original, the line the converted network"
        text += ", whose angles count the pooled radius" if any(contents.radii.values()) else ""
        text += "; each is drawn to the same height. The numbers are mean ± standard deviation."
    else:
        text += " The original is not at hand, so these are the angles of the converted network alone."
    legend = None
    if angles.before:
        legend = element(
            "ul",
            element("li", element("i", class_="key before"), "original"),
            element("li", element("i", class_="key stroke s0"), "converted"),
            class_="legend",
        )
    shown = [element("p", text), legend, element("div", panels, class_="panels")]
    return joined([*shown, folded(f"All {count(len(names), 'layer')} in numbers", _angle_table(angles, low, high))])


def _chosen(contents: Contents, names: list[str]) -> list[str]:
    """The layers with histograms: the least explained ones, the first and the last, and others at equal distances."""
    if len(names) <= PANELS:
        return names
    fits = contents.fits
    chosen = {fit.name for fit in fits[: PANELS // 3] if fit.name in names}
    spaces = PANELS - len(chosen)
    chosen |= {names[round(place * (len(names) - 1) / (spaces - 1))] for place in range(spaces)}
    return [name for name in names if name in chosen]


def _panel(name: str, angles: Angles, low: float, high: float) -> Markup:
    after, before = angles.after[name], angles.before.get(name)
    told = f"{_spread(after)} after" if before is None else f"{_spread(before)} before, {_spread(after)} after"
    earlier = None if before is None else before.histogram(low, high, BINS)
    label = f"Angles of {name or 'the model'}: {told}"
    chart = histogram(earlier, after.histogram(low, high, BINS), low, high, label)
    numbers = _spread(after) if before is None else f"{_spread(before)} → {_spread(after)}"
    caption = element("figcaption", element("code", name or "(the model)"), element("small", numbers))
    return element("figure", caption, chart)


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.1f}° ± {spread.deviation:.1f}"


def _angle_table(angles: Angles, low: float, high: float) -> Markup:
    def quantiles(spread: Spread | None) -> tuple[float, float, float] | None:
        return None if spread is None else (spread.quantile(0.05), spread.quantile(0.5), spread.quantile(0.95))

    rows = []
    for name, after in angles.after.items():
        before = angles.before.get(name)
        last = quantiles(after)
        assert last is not None
        label = f"Middle 90 % of the angles of {name or 'the model'}"
        chart = ranges(quantiles(before), last, low, high, label)
        earlier = [_spread(before) if before is not None else ""] if angles.before else []
        rows.append([element("code", name or "(the model)"), *earlier, _spread(after), chart])
    headers = ["layer", *(["original"] if angles.before else []), "converted", f"middle 90 %, {low:g}° to {high:g}°"]
    numeric = range(1, 3 if angles.before else 2)
    return table(
        headers, rows, numeric=numeric, label="Angles of each layer: mean and standard deviation", class_="fits"
    )


# ------------------------------------------------------------------------------------------------------------ energies


def _energies(contents: Contents) -> Markup:
    text = "How evenly the filters of each layer are spread over the sphere: the lower, the more evenly."
    parts: list[Any] = [element("p", text)]
    if contents.energy is not None:
        rows = contents.energy.layers
        values = [value for row in rows for value in (row.energy, row.least) if value is not None]
        low, high = min(values), max(values)
        high = high if high > low else low + 1

        def cells(row: LayerEnergy) -> list[Any]:
            filters = f"{row.groups}×{row.filters}" if row.groups > 1 else str(row.filters)
            least = "" if row.least is None else f"{row.least:.4f}"
            bound = f", at least {least}" if least else ""
            chart = dots(row.energy, low, high, row.least, f"energy {row.energy:.4f}{bound}")
            name = [element("code", row.layer or "(the model)"), element("small", " output") if row.is_output else None]
            return [name, filters, f"{row.fan_in:,}", f"{row.energy:.4f}", chart, least]

        headers = ["layer", "filters", "fan-in", "energy", f"{low:.4g} to {high:.4g}", "least possible"]
        numbers = table(headers, map(cells, rows), numeric=[1, 2, 3, 5], label="Energies", class_="fits")
        about = f"Measure: {contents.energy.measure}. The line is the least possible energy, where that is known."
        parts += [element("p", about), _long(len(rows), "layer", numbers)]
    if contents.without_energy:
        names = ", ".join(contents.without_energy)
        parts.append(element("p", f"Left out for their number of filters: {names}.", class_="note"))
    return joined(parts)


# --------------------------------------------------------------------------------------------------------- every layer


def _layers(contents: Contents) -> Markup:
    fates, total = contents.fates, contents.costs.total
    rows = []
    for decision in contents.plan.decisions:
        fate = fates[decision.name]
        radius, cost = contents.radii.get(decision.name), contents.costs.sites.get(decision.name)
        names = [
            element("code", shown_name(decision)),
            *(element("small", f" = {alias}") for alias in decision.aliases),
        ]
        rows.append(
            [
                [element("i", class_=f"key {fate.key}"), *names],
                fate.label,
                decision.kind,
                "×".join(map(str, decision.shape)),
                f"{radius:.3g}" if radius else "",
                amount(cost) if cost is not None and total else "",
                percent(cost / total) if cost is not None and total else "",
                decision.reason,
            ]
        )
    headers = ["layer", "what happened", "kind", "weight", "ρ", "multiplications", "share", "why"]
    every = table(headers, rows, numeric=[4, 5, 6], label="Every layer", class_="every")
    return folded(f"All {count(len(rows), 'layer')}, with shapes, costs and reasons", every)
