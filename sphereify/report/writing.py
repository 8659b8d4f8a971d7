"""Writing a report."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from sphereify.annotations import CALIBRATION_FIT, PLAN
from sphereify.calibration.results import Calibration
from sphereify.convert.arguments import Inputs
from sphereify.convert.plan import ConversionPlan
from sphereify.convert.rewrite import apply_plan, check_fit
from sphereify.errors import UsageError, invalid, wrong_type
from sphereify.files import as_path, write_text
from sphereify.nn.modules import check_module
from sphereify.report.contents import contents_of_model, contents_of_plan
from sphereify.report.page import page
from sphereify.sources import versions


def write_report(
    model_or_plan: nn.Module | ConversionPlan,
    path: str | Path,
    *,
    original: nn.Module | None = None,
    inputs: Inputs = None,
    inputs_described: str = "",
    calibration: Calibration | None = None,
    robustness: Mapping[str, Any] | None = None,
    epochs: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | Sequence[str] = (),
    name: str = "",
) -> Path:
    """Write what a conversion did, layer by layer, as one HTML file that needs no other and opens from the disk.

    Args:
        model_or_plan: a converted model, trained further or not; or a plan, for a report on what would happen.
        path: file to write, with the suffix .html or .htm; a file that lies there is replaced, whole or not at all.
        original: the plain network, for its angles beside the converted ones. With a plan, a copy of it is converted.
        inputs: as `example_inputs` of `plan_conversion`, to measure angles on; of a batch, the first eight samples.
            Default: the inputs that the model is assumed to take, filled with noise.
        inputs_described: these inputs in words, such as "8 of the calibration images".
        calibration: what `calibrate` returned, for the R² of each layer. Default: what a converted model, or its
            artifact, tells of its calibration; training after it has changed the layers.
        robustness: accuracies under corruption, as in robustness.json or from `Robustness.to_json()`.
        epochs: epochs of a training, as in the lines of metrics.jsonl.
        facts: further numbers for the summary, such as {"test accuracy": "93.4 %"}.
        options: options that were given, by name, or each as it is written.
        name: name of the model for the title; default: its class.

    Returns:
        The file.

    Raises:
        ArgumentTypeError: neither a model nor a plan, or an original that is no module.
        UsageError: a model that was not converted, or another suffix.
        PlanMismatchError: an original of another architecture.
        ArtifactError: the file cannot be written.
    """
    file = checked_path(path)
    if calibration is None and (fit := CALIBRATION_FIT.of(model_or_plan)) is not None:
        calibration = Calibration.from_json(fit)
    parts = {
        "calibration": calibration,
        "robustness": robustness,
        "epochs": epochs,
        "facts": dict(facts or {}),
        "options": [f"{k}={v!r}" for k, v in options.items()] if isinstance(options, Mapping) else list(options),
    }
    if isinstance(model_or_plan, ConversionPlan):
        plan = model_or_plan
        model = None if original is None else apply_plan(original, plan)
    elif isinstance(model_or_plan, nn.Module):
        model = model_or_plan
        plan = PLAN.of(model)  # type: ignore[assignment]
        if plan is None:
            raise UsageError(
                f"{type(model).__name__} was not converted: give what sphereify(model) returns, or the plan that "
                f"plan_conversion(model) makes"
            )
    else:
        raise wrong_type("write_report", model_or_plan, "a converted model or a ConversionPlan")
    if original is not None:
        check_module(original, "original")
        check_fit(original, plan)
    if model is None:
        contents = contents_of_plan(plan, name, **parts)
    else:
        run = {"original": original, "inputs": inputs, "described": inputs_described}
        contents = contents_of_model(model, plan, name, **run, **parts)  # type: ignore[arg-type]
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip()
    write_text(file, page(contents, date=date, versions=versions()))
    return file


def checked_path(path: str | Path) -> Path:
    """The path of a report.

    Raises:
        ArgumentTypeError: neither text nor a path.
        UsageError: another suffix than .html and .htm, or a folder.
    """
    file = as_path("report", path)
    if file.suffix.lower() not in (".html", ".htm"):
        raise invalid("report", str(path), "a file with the suffix .html", "For example: report.html")
    if file.is_dir():
        raise UsageError(f"{path}: is a folder, expected a file to write the report to")
    return file
