"""The top of the report: what was converted and which layers resist, at a glance."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby

from sphereify.convert.plan import Decision
from sphereify.report.charts import bar
from sphereify.report.contents import Contents
from sphereify.report.fates import ALL, Fate
from sphereify.report.markup import Markup, element, folded, joined
from sphereify.report.wording import amount, general_reason, percent, r2, shown_name
from sphereify.wording import count

LOW = 0.8
"""R² below which a layer is said to resist."""
WORST = 5
"""Number of the least explained layers that are shown at the top."""
MOST_GROUPS = 16
"""Largest number of groups of layers that are named below the strip."""


def headline(contents: Contents) -> Markup:
    """One sentence that says it all."""
    angular, sites = len(contents.angular), len(contents.plan.decisions)
    of = f"All {count(sites, 'layer')} are" if angular == sites else f"{angular} of {count(sites, 'layer')} are"
    parts = [element("strong", f"{of} angular"), ""]
    if contents.share is not None:
        parts[1] = f", with {percent(contents.share)} of the multiplications"
    sentence = joined([*parts, ". "])
    fits = contents.fits
    if not fits:
        return sentence
    worst, low = fits[0], sum(fit.after < LOW for fit in fits)
    name = element("code", worst.name or "(the model)")
    if not low:
        return joined([sentence, "The least explained one, ", name, f", has an R² of {r2(worst.after)}."])
    resisting = f"{count(low, 'layer')} resist{'s' if low == 1 else ''}, with an R² below {LOW:g}: "
    rest = f" ({r2(worst.after)})" if low == 1 else f" most ({r2(worst.after)})"
    return joined([sentence, element("strong", resisting), name, f"{rest}."])


def cards(contents: Contents) -> Markup:
    """The numbers of the summary."""
    numbers = list(_numbers(contents))
    items = (
        element("div", element("dt", label), element("dd", value, element("small", remark) if remark else None))
        for label, value, remark in numbers
    )
    return element("dl", items, class_="cards")


def _numbers(contents: Contents) -> Iterator[tuple[str, str, str]]:
    """Label, value and remark of each number."""
    sites = len(contents.plan.decisions)
    yield "angular layers", str(len(contents.angular)), f"of {sites}"
    yield "kept layers", str(len(contents.kept)), ""
    if contents.share is not None:
        run = f", run on {contents.plan.inputs}" if contents.plan.inputs else ""
        total = f"of {amount(contents.costs.total)}{run}"
        yield "multiplications that are angular", percent(contents.share), total
    if contents.parameters is not None:
        before = contents.parameters_before
        more = contents.parameters - before if before is not None else 0
        yield "parameters", amount(contents.parameters), f"{more:+,} by the conversion" if more else ""
    radii = sorted({round(radius, 3) for radius in contents.radii.values()})
    if radii and radii[-1]:
        yield "pooled radius ρ", f"{radii[0]:g}" if len(radii) == 1 else f"{radii[0]:g} to {radii[-1]:g}", ""
    if fits := contents.fits:
        before, after = (statistics.mean(getattr(fit, name) for fit in fits) for name in ("before", "after"))
        yield "mean R² of the layers", r2(after), f"{r2(before)} with copied weights"
    for label, value in contents.facts.items():
        yield label, value, ""


# ------------------------------------------------------------------------------------------------------------ the strip


def strip(contents: Contents) -> Markup:
    """The layers in the order in which they run: as wide as they cost, coloured by what happened, filled to R²."""
    decisions, fates = contents.plan.decisions, contents.fates
    has_costs = contents.costs.total > 0
    floor = 0.15 * sum(contents.costs.sites.values()) / max(len(decisions), 1) if has_costs else 1.0
    groups = []
    for name, members in _groups(decisions):
        layers, width = [], 0.0
        for decision in members:
            cost = contents.costs.sites.get(decision.name, 0) / (floor or 1.0) if has_costs else 0.0
            layers.append(_layer(decision, fates[decision.name], cost + 1.0, contents))
            width += cost + 1.0
        label = element("span", element("bdi", name), class_="group", title=name) if name else None
        blocks = element("span", layers, class_="blocks")
        groups.append(element("span", blocks, label, class_="part", style=f"flex-grow:{width:.2f}"))
    converted = ", ".join(f"{number} {fate.label}" for fate, number in _counted(fates.values()))
    told = f"The network as a strip of {count(len(decisions), 'layer')} in order of execution: {converted}."
    dense = " dense" if len(decisions) > 120 else ""
    picture = element("div", groups, class_=f"strip{dense}", role="img", aria_label=told)
    return joined([picture, element("p", class_="hover", aria_live="polite"), _legend(contents), _caption(contents)])


def _layer(decision: Decision, fate: Fate, width: float, contents: Contents) -> Markup:
    explained = contents.r2(decision)
    about = [shown_name(decision), f"{decision.kind}, {fate.label}"]
    if decision.name in contents.costs.sites and contents.costs.total:
        about.append(f"{amount(contents.costs.sites[decision.name])} multiplications")
    if contents.radii.get(decision.name):
        about.append(f"ρ {contents.radii[decision.name]:.3g}")
    if explained is not None:
        about.append(f"R² {r2(explained)}")
    about.append(decision.reason)
    fill = None
    if explained is not None:
        fill = element("b", style=f"height:{100 * max(0.0, 1 - max(explained, 0.0)):.0f}%")
    style = f"flex-grow:{width:.2f}"
    return element("i", fill, class_=f"layer {fate.key}", style=style, title=" · ".join(filter(None, about)))


def _groups(decisions: list[Decision]) -> list[tuple[str, list[Decision]]]:
    """Neighbours whose names begin alike: by as many parts of the name as give few groups."""
    groups: list[tuple[str, list[Decision]]] = [("", decisions)]
    for depth in (1, 2, 3):

        def beginning(decision: Decision, depth: int = depth) -> str:
            return ".".join(decision.name.split(".")[:depth])

        finer = [(name, list(members)) for name, members in groupby(decisions, beginning)]
        if len(finer) <= MOST_GROUPS:
            groups = finer
    return groups


def _counted(fates: Iterable[Fate]) -> list[tuple[Fate, int]]:
    """The classes that there are, in the order of the legend, with their numbers."""
    counts = Counter(fates)
    return [(fate, counts[fate]) for fate in ALL if counts[fate]]


def _legend(contents: Contents) -> Markup:
    entries = (
        element("li", element("i", class_=f"key {fate.key}"), fate.label, element("small", str(number)))
        for fate, number in _counted(contents.fates.values())
    )
    return element("ul", entries, class_="legend")


def _caption(contents: Contents) -> Markup:
    text = "Each block is a layer, in the order in which they run"
    if contents.costs.total:
        text += ", as wide as its share of the multiplications (with a least width, so that all are seen)"
    else:
        text += ", all of one width, since the multiplications are not known"
    if contents.fits:
        text += "; filled to R², so that what is pale is not explained"
    if contents.costs.total and contents.costs.other:
        share = percent(contents.costs.other / contents.costs.total)
        text += f". Products that no layer makes, such as those of queries with keys, are {share}"
    inputs = f" Counted in a run on {contents.plan.inputs}." if contents.plan.inputs and contents.costs.total else ""
    return element("p", f"{text}.{inputs}", class_="caption")


# ------------------------------------------------------------------------------------------------------ what resists


def resisting(contents: Contents) -> Markup:
    """The least explained layers, and those that are kept."""
    return element(
        "div",
        element("div", element("h3", "Least explained"), _least_explained(contents)),
        element("div", element("h3", "Kept as they are"), _kept(contents)),
        class_="two",
    )


def _least_explained(contents: Contents) -> Markup:
    fits = contents.fits[:WORST]
    if not fits:
        return element(
            "p",
            "Not measured. A calibration, which keeps what a trained network knows, measures R²: the share of each "
            "layer's output that the angle explains.",
            class_="quiet",
        )
    rows = (
        element(
            "li",
            element("code", fit.name or "(the model)"),
            bar(fit.after, label=f"R² {r2(fit.after)}"),
            element("span", r2(fit.after), class_="value"),
            class_="low" if fit.after < LOW else None,
        )
        for fit in fits
    )
    return element("ol", rows, class_="worst")


def _kept(contents: Contents) -> Markup:
    if not contents.kept:
        return element("p", "None: every layer is angular.", class_="quiet")
    return reason_list(contents, contents.kept)


def reason_list(contents: Contents, decisions: list[Decision]) -> Markup:
    """Reasons with their counts, the names of the layers folded."""
    groups: dict[tuple[Fate, str], list[Decision]] = defaultdict(list)
    fates = contents.fates
    for decision in decisions:
        groups[fates[decision.name], general_reason(decision)].append(decision)
    items = []
    for (fate, reason), members in sorted(groups.items(), key=lambda item: (ALL.index(item[0][0]), -len(item[1]))):
        cost = sum(contents.costs.sites.get(decision.name, 0) for decision in members)
        share = f", {percent(cost / contents.costs.total)} of the multiplications" if contents.costs.total else ""
        summary = joined(
            [
                element("i", class_=f"key {fate.key}", title=fate.label),
                element("strong", str(len(members))),
                " ",
                reason or fate.label,
                element("small", f"{fate.label}{share}"),
            ]
        )
        names = element("p", _separated(element("code", shown_name(decision)) for decision in members), class_="names")
        items.append(element("li", folded(summary, names)))
    return element("ul", items, class_="reasons")


def _separated(items: Iterable[Markup]) -> Markup:
    return Markup(", ".join(items))
