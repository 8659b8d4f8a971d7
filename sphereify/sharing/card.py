"""The model card of a converted network: README.md of its repository, made from what its artifact says."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sphereify.artifact import DOCUMENT, stored_preparation
from sphereify.convert.plan import ConversionPlan
from sphereify.errors import refused
from sphereify.preparation import Preparation
from sphereify.sharing.options import PushOptions
from sphereify.wording import count, in_one_line

NAMED_LICENCES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc0-1.0", "ecl-2.0", "epl-2.0", "eupl-1.1", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "openrail", "openrail++", "osl-3.0", "pddl", "unknown",
    "unlicense", "wtfpl", "zlib",
)  # fmt: skip
"""Licences that the hub has a word for; any other goes by its name."""


@dataclass(frozen=True)
class Facts:
    """Facts that an artifact states about its network, for a model card."""

    document: dict[str, Any]
    """The content of conversion.json."""
    plan: ConversionPlan
    preparation: Preparation | None

    @property
    def training(self) -> dict[str, Any]:
        """The record of its training; empty without one."""
        return self.document.get("training") or {}

    @property
    def fit(self) -> dict[str, Any]:
        """The results of its calibration; empty without one."""
        return self.document.get("calibration") or {}

    @property
    def is_classifier(self) -> bool:
        """True if it is known to name classes of images."""
        return self.preparation is not None and bool(self.preparation.classes)

    @property
    def source(self) -> dict[str, Any]:
        """The origin of the plain network; empty where only a function of its author's builds it."""
        source = self.document.get("source") or {}
        return {} if source.get("library") == "factory" else source


def facts_of(document: dict[str, Any]) -> Facts:
    """The facts in the content of conversion.json.

    Raises:
        ArtifactError: it is damaged.
    """
    return Facts(
        document, ConversionPlan.from_json(json.dumps(document["plan"])), stored_preparation(document, DOCUMENT)
    )


def model_card(document: dict[str, Any], repository: str, options: PushOptions) -> str:
    """The model card of an artifact.

    Args:
        document: the content of its conversion.json.
        repository: "user/name", where it goes.
        options: its licence, and what the artifact does not know.

    Raises:
        UsageError: no licence is known.
    """
    facts = facts_of(document)
    licence, whence = _licence(facts, options)
    head = _head(facts, repository, licence, options)
    sections = [
        _introduction(facts, repository, options),
        _use(facts, repository),
        _conversion(facts),
        _kept(facts, options),
        _images(facts),
        _limits(facts, options),
        f"## Licence\n\n{licence}, {whence}.\n",
    ]
    data = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{data}---\n\n" + "\n".join(section for section in sections if section)


# ----------------------------------------------------------------------------------------------------------------- head


def _licence(facts: Facts, options: PushOptions) -> tuple[str, str]:
    """The licence, and whence it is known."""
    if options.license is not None:
        return in_one_line(options.license), "as its author says"
    licence = (facts.document.get("base") or {}).get("license") or _licence_of_timm(facts.source)
    if not licence:
        name = facts.source.get("name") or facts.plan.model
        raise refused(
            "license",
            f"is missing; the configuration of the base model {name} names no licence. Look up the one under which its "
            f"weights may be shared, such as apache-2.0, mit or cc-by-nc-4.0",
        )
    return str(licence), f"the licence that the configuration of its base model {facts.source.get('name', '')} names"


def _licence_of_timm(source: dict[str, Any]) -> str | None:
    if source.get("library") != "timm":
        return None
    import timm

    config = timm.get_pretrained_cfg(source["name"], allow_unregistered=True)
    return getattr(config, "license", None)


def _head(facts: Facts, repository: str, licence: str, options: PushOptions) -> dict[str, Any]:
    word = licence.lower()
    head: dict[str, Any] = {"license": word} if word in NAMED_LICENCES else {"license": "other", "license_name": word}
    head["library_name"] = "sphereify"
    if facts.is_classifier:
        head["pipeline_tag"] = "image-classification"
    operators = {decision.operator for decision in facts.plan.converted if decision.operator}
    library = [facts.source["library"]] if facts.source else []
    head["tags"] = ["sphereify", "hyperspherical", *library, *sorted(name for name in operators if "." not in name)]
    base = _base_repository(facts, options)
    if base is not None:
        head["base_model"] = base
    if (data := _hub_data(facts.training.get("data"))) is not None:
        head["datasets"] = [data]
    if (accuracy := _accuracy(facts, options)) is not None:
        head["metrics"] = ["accuracy"]
        data_name = _data_name(facts)
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data_name, "type": data or "other"},
            "metrics": [{"type": "accuracy", "value": round(accuracy, 4)}],
        }
        head["model-index"] = [{"name": repository.rpartition("/")[2], "results": [result]}]
    return head


def _base_repository(facts: Facts, options: PushOptions) -> str | None:
    """The repository of the base model on the hub, if it has one there."""
    base = options.base_model or (facts.document.get("base") or {}).get("model")
    return base if base and base.count("/") == 1 and ":" not in base else None


def _hub_data(name: str | None) -> str | None:
    """The name on the hub of a data set of timm's that has one."""
    words = str(name or "").partition(",")[0]
    return next((words.removeprefix(start) for start in ("hfds/", "hfids/") if words.startswith(start)), None)


def _data_name(facts: Facts) -> str:
    """The data set of the training, without the path of the folder that it lies in."""
    data = str(facts.training.get("data") or "its test images")
    name, comma, more = data.partition(",")
    return in_one_line((Path(name).name if Path(name).is_absolute() or "\\" in name else name) + comma + more)


def _accuracy(facts: Facts, options: PushOptions) -> float | None:
    value = facts.training.get("accuracy") if options.accuracy is None else options.accuracy
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------------- sections


def _introduction(facts: Facts, repository: str, options: PushOptions) -> str:
    name = facts.source.get("name") or facts.plan.model.rpartition(".")[2]
    library = f" of {facts.source['library']}" if facts.source else ""
    base = options.base_model or (facts.document.get("base") or {}).get("model")
    start = f" It started from the weights of {in_one_line(base)}." if base else ""
    return (
        f"# {repository.rpartition('/')[2]}\n\n"
        f"The network `{name}`{library}, made hyperspherical with sphereify: {len(facts.plan.converted)} of its "
        f"{len(facts.plan.decisions)} layers compute a function of the angle between a filter and its input.{start}\n"
    )


def _use(facts: Facts, repository: str) -> str:
    factory = "" if facts.source else ", factory=build"
    lines = [
        "## How to use it\n",
        "```\npip install 'sphereify[hub]'\n```\n",
        "```python",
        "import sphereify",
        "",
        *([] if facts.source else [f"# build() returns the plain {facts.plan.model}, which its author has to share."]),
        f'model = sphereify.load("hf-hub:{repository}"{factory})',
    ]
    if facts.preparation is not None:
        lines.append('print(sphereify.predict(model, "photo.jpg")[0].guesses)')
    lines.append("```\n")
    if facts.preparation is not None and facts.source:
        lines.append(f"```\nsphereify predict hf-hub:{repository} photo.jpg\n```\n")
    return "\n".join(lines)


def _conversion(facts: Facts) -> str:
    converted = facts.plan.converted
    rows = [("operator", _tally(d.operator for d in converted if d.operator))]
    radii = sorted({d.radius for d in converted if d.radius})
    if radii:
        learned = ", learned" if any(d.learn_radius for d in converted) else ""
        span = f"{radii[0]:.3g}" if len(radii) == 1 else f"{radii[0]:.3g} to {radii[-1]:.3g}"
        rows.append(("pooled radius ρ", f"{span}{learned}, {count(sum(d.radius > 0 for d in converted), 'layer')}"))
    magnitudes = [d.magnitude for d in converted if d.magnitude is not None]
    if magnitudes:
        rows.append(("magnitude", _tally(str(magnitude) for magnitude in magnitudes)))
    rescaled = sum(d.rescale for d in converted)
    if rescaled:
        rows.append(("SphereNorm rescaling", count(rescaled, "layer")))
    if heads := [d.head for d in converted if d.head]:
        rows.append(("head", _tally(heads)))
    rows.append(("converted", f"{count(len(converted), 'layer')} of {len(facts.plan.decisions)}"))
    rows += [("kept", f"{count(times, 'layer')}: {why}") for why, times in _reasons(facts.plan)]
    if facts.document.get("folding") is not None:
        rows.append(("folded", "for inference; it cannot be trained further"))
    versions = facts.document.get("versions") or {}
    rows.append(("made with", ", ".join(f"{name} {version}" for name, version in versions.items())))
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"## Conversion\n\n| | |\n| --- | --- |\n{table}\n\nThe plan of every layer is in `conversion.json`.\n"


def _reasons(plan: ConversionPlan) -> list[tuple[str, int]]:
    return Counter(decision.reason for decision in plan.kept).most_common()


def _tally(words: Iterable[str]) -> str:
    return ", ".join(f"{word} ({times})" for word, times in Counter(words).most_common())


def _cell(text: str) -> str:
    return in_one_line(text).replace("|", "\\|")


def _kept(facts: Facts, options: PushOptions) -> str:
    """The section on what of the original's knowledge is left, as far as it was measured."""
    lines = []
    r2 = {name: fit["calibrated"] for name, fit in (facts.fit.get("r2") or {}).items() if fit["calibrated"] is not None}
    if r2:
        worst = min(r2, key=r2.__getitem__)
        lines.append(
            f"- Calibrated without labels on {facts.fit.get('inputs')} inputs: the layers then explained "
            f"{_mean(r2):.2f} of the variance of the original's outputs on average (R²), {r2[worst]:.2f} at the least "
            f"(`{worst}`)."
        )
    if facts.fit.get("agreement") is not None:
        lines.append(
            f"- After the calibration, {facts.fit['agreement']:.1%} of {facts.fit['agreement_inputs']} inputs that it "
            f"had not seen got the class that the original gives them."
        )
    if facts.training:
        epochs = facts.training.get("epochs")
        further = " further, which changed the layers since," if lines else ""
        lines.append(
            f"- Trained{further} on {_data_name(facts)}" + (f" for {count(epochs, 'epoch')}." if epochs else ".")
        )
    after, before = _accuracy(facts, options), options.original_accuracy
    if after is not None:
        beside = f"; the original: {before:.2%}" if before is not None else ""
        lines.append(f"- Accuracy on the test images: {after:.2%}{beside}.")
    elif before is not None:
        lines.append(f"- Accuracy of the original: {before:.2%}.")
    return "## What was measured\n\n" + "\n".join(lines) + "\n" if lines else ""


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _images(facts: Facts) -> str:
    if facts.preparation is None:
        return ""
    names = facts.preparation.classes
    first = in_one_line("; ".join(name.partition(",")[0] for name in names[:20]))
    shown = f"\n\nClasses: {first}{'; …' if len(names) > 20 else '.'}" if names else ""
    return f"## Images\n\n{facts.preparation.described()}.{shown}\n"


def _limits(facts: Facts, options: PushOptions) -> str:
    limits = ["It runs with sphereify, or as a file that `sphereify export` writes of it."]
    if any(d.kind.startswith("conv") and not d.radius for d in facts.plan.converted):
        limits.append(
            "Layers without a radius do not see how strong a patch is, only its direction: differences of contrast "
            "alone are lost on them."
        )
    if not facts.document.get("calibrated") and not facts.training:
        limits.append(
            "It was neither calibrated nor trained after the conversion, as far as its artifact says: expect no useful "
            "answers before a training."
        )
    elif _accuracy(facts, options) is None:
        limits.append("Its accuracy was not measured.")
    if facts.preparation is None:
        limits.append("How its inputs are prepared is not part of it.")
    elif not facts.preparation.classes:
        limits.append("The names of its classes are not part of it.")
    if not facts.source:
        limits.append("The plain network is code that this repository does not hold.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits) + "\n"
