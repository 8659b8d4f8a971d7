"""The command export."""

from pathlib import Path
from typing import Annotated

import typer

from sphereify.cli.options import Fields, with_options
from sphereify.convert.input_options import InputOptions
from sphereify.deployment.options import ExportOptions
from sphereify.errors import UsageError, option
from sphereify.models import SourceOptions, is_saved, open_model


@with_options(flags={"example_inputs": "--input"})
def export(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A saved artifact.", show_default=False)],
    form: ExportOptions,
    source: Annotated[SourceOptions, Fields(only=("factory",), panel="")],
    inputs: Annotated[InputOptions, Fields(only=("input",), panel="")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: ARTIFACT.onnx or ARTIFACT.pt2.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write an artifact to one file for other runtimes, folded for inference, and check the file against it."""
    if not is_saved(model):
        raise UsageError(f"{model}: is no saved artifact; make one with: sphereify convert {model}")
    file = output or Path(f"{Path(model).resolve().name}{form.suffix}")
    form.check_suffix(file)
    if file.exists() and not force:
        raise UsageError(
            f"{file}: exists already; {option('force')} replaces it, {option('output')} names another file"
        )

    from sphereify.deployment.exporting import export as write
    from sphereify.tables import print_export
    from sphereify.terminal import console

    network = open_model(model, source)
    print_export(console(), write(network, file, inputs.for_model(network), **vars(form)))
