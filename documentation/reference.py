"""The reference of Python's names: which are public, and the page that shows their docstrings."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A module whose names the reference shows."""

    module: str
    title: str
    names: tuple[str, ...] = ()
    """The names; default: those of the module's `__all__`."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The names that this section shows."""
        return self.names or tuple(importlib.import_module(self.module).__all__)


SECTIONS = (
    Section("sphereify", "The package"),
    Section("sphereify.nn", "Layers, heads, losses"),
    Section(
        "sphereify.nn.functional",
        "Functional forms",
        ("sphere_conv1d", "sphere_conv2d", "sphere_conv3d", "sphere_linear"),
    ),
    Section("sphereify.convert", "Conversion"),
    Section("sphereify.convert.plan", "Rows of a plan", ("PlanRow",)),
    Section("sphereify.convert.costs", "Multiplications", ("multiplications", "costs")),
    Section("sphereify.convert.multiplied", "Results of counting", ("Costs",)),
    Section("sphereify.calibration.agreement", "Choice of a radius", ("choose_radius", "RadiusChoice", "Trial")),
    Section("sphereify.calibration.results", "Results of a calibration", ("Calibration", "LayerFit")),
    Section("sphereify.calibration.suggestion", "Results of suggest", ("Suggestion",)),
    Section("sphereify.calibration.distillation", "Steps towards the original", ("distill",)),
    Section("sphereify.training", "Training"),
    Section("sphereify.training.morph", "Morphing", ("Morph", "start_as_original")),
    Section(
        "sphereify.training.robustness",
        "Robustness",
        ("robustness", "Robustness", "CorruptedAccuracy", "ContrastStandardized", "write_robustness"),
    ),
    Section("sphereify.training.corruptions", "Corruptions", ("corrupt",)),
    Section(
        "sphereify.training.verification",
        "Verification",
        ("verification", "Verification", "Roc", "write_verification"),
    ),
    Section("sphereify.training.embeddings", "Embeddings", ("embeddings", "Embeddings")),
    Section("sphereify.training.pairs", "Pairs", ("Pairs", "pairs_of", "read_pairs")),
    Section(
        "sphereify.class_splits", "Classes that are left out", ("choose_classes", "without_classes", "only_classes")
    ),
    Section(
        "sphereify.datasets",
        "Data",
        ("Data", "load_data", "load_images", "training_images", "choose_images", "class_count"),
    ),
    Section("sphereify.models", "Models by name", ("SourceOptions", "open_model")),
    Section("sphereify.report", "Reports"),
    Section("sphereify.report.angles", "Results of measuring angles", ("Angles", "Spread")),
    Section("sphereify.prediction.predicting", "Results of predict", ("Prediction", "Guess")),
    Section(
        "sphereify.preparation", "Preparation of images", ("Preparation", "PreparationOptions", "read_class_names")
    ),
    Section("sphereify.model_images", "Images of a model", ("preparation_of", "set_preparation")),
    Section("sphereify.sharing.pushing", "Model cards, and results of push_to_hub", ("card_of", "Pushed")),
    Section("sphereify.deployment.exporting", "Results of an export", ("Exported",)),
    Section("sphereify.deployment.folding", "Results of folding", ("Folding",)),
    Section("sphereify.nn.energy_report", "Energies of layers", ("EnergyReport", "LayerEnergy")),
    Section("sphereify.artifact", "Artifacts", ("read_document",)),
    Section("sphereify.doctor", "The machine", ("examine", "Examination", "PassReport")),
    Section(
        "sphereify.plots",
        "Pictures",
        ("plot_energy", "plot_run", "plot_confusion", "plot_comparison", "plot_robustness", "plot_verification"),
    ),
    Section("sphereify.errors", "Errors", ("SphereifyError", "SphereifyWarning")),
)
"""What is public. A module with an `__all__` is shown whole."""


def page() -> str:
    """The page of all public names, in the Markdown of mkdocstrings. A name is documented where it first appears."""
    lines = [
        "# Python",
        "",
        "Every public name with its docstring. The keyword arguments of functions such as `sphereify` are the options "
        "of [ConversionOptions](options.md); those classes of options have their tables there.",
    ]
    seen: dict[int, str] = {}
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", f"`{section.module}`", ""]
        for name in section.shown:
            path = f"{section.module}.{name}"
            value = getattr(importlib.import_module(section.module), name)
            first = seen.setdefault(id(value), path)
            if first != path:
                lines += [f"[`{name}`][{first}]: the same as `{first}`", f"{{ #{path} }}", ""]
                continue
            lines += [f"::: {path}", "    options:", "      heading_level: 3", *_members(value), ""]
    return "\n".join(lines)


def _members(value: object) -> list[str]:
    """The choice of members: an options class shows none, since `options.md` has the table."""
    is_table = any("option" in field.metadata for field in getattr(value, "__dataclass_fields__", {}).values())
    return ["      members: []"] if is_table else []
