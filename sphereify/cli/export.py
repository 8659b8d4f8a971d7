"""The command export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sphereify import choices
from sphereify.errors import UsageError, option


def export(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A saved artifact.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default ARTIFACT.onnx or ARTIFACT.pt2.")
    ] = None,
    format: Annotated[str, typer.Option(help=f"One of: {', '.join(choices.EXPORT_FORMATS)} (.pt2).")] = "onnx",
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Let the file take any image size; not every model allows it.")
    ] = False,
    img_size: Annotated[
        int | None, typer.Option(help="Pixels of the images; default those it was trained on, else the model's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Fix the batch to so many images; default any number.")] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators, 18 or more; default 18.")] = None,
    no_fold: Annotated[
        bool, typer.Option("--no-fold", help="Leave normalizations and filter norms as they are: slower.")
    ] = False,
    factory: Annotated[
        str | None, typer.Option(help="What makes the plain model of an artifact of your own: see convert.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write an artifact to one file for other runtimes, folded for inference, and check the file against it."""
    from sphereify.models import SourceOptions, is_saved, open_model

    if not is_saved(model):
        raise UsageError(f"{model}: is no saved artifact; make one with: sphereify convert {model}")
    for name, value in (("img_size", img_size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{option(name)}: got {value}, expected 1 or more")
    if opset is not None and choices.canonical(format) != "onnx":
        raise UsageError(f"{option('opset')}: belongs to ONNX and has no effect on {format}")
    suffix = {"torch-export": "pt2"}.get(choices.canonical(format), "onnx")
    file = output or Path(f"{Path(model).resolve().name}.{suffix}")
    if file.exists() and not force:
        raise UsageError(
            f"{file}: exists already; {option('force')} replaces it, {option('output')} names another file"
        )

    from sphereify.artifact import read_document
    from sphereify.deployment.exporting import LOWEST_OPSET
    from sphereify.deployment.exporting import export as write
    from sphereify.tables import print_export
    from sphereify.terminal import console

    training = read_document(model).get("training") or {}
    network = open_model(model, SourceOptions(factory=factory))
    size = [img_size] * 2 if img_size else (training.get("image_size") or [])[-2:]
    images = _random_images(network, batch_size or 2, size)
    written = write(network, file, images, format=format, folded=not no_fold, dynamic_batch=batch_size is None,
                    dynamic_size=dynamic_size, opset=LOWEST_OPSET if opset is None else opset)  # fmt: skip
    print_export(console(), written)


def _random_images(model: Any, batch: int, size: list[int]) -> Any:
    """Images to trace with, of that size or the model's own; None where nothing says it, and the usual are tried."""
    import torch

    from sphereify.convert.model_inputs import data_config, input_channels

    size = size or list(data_config(model).get("input_size") or ())[-2:]
    if not size:
        if batch != 2:
            raise UsageError(
                f"{option('batch_size')}: goes with {option('img_size')} for a model that does not say the size of its "
                f"images"
            )
        return None
    return torch.randn(batch, input_channels(model), *size)
