"""The command predict."""

import json as plain_json
from pathlib import Path
from typing import Annotated

import typer

from sphereify.cli.options import Fields, with_options
from sphereify.errors import DataError
from sphereify.models import SourceOptions
from sphereify.prediction.options import PredictOptions
from sphereify.preparation import PreparationOptions


@with_options()
def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="A saved artifact, in a folder or on the hub (hf-hub:USER/NAME); an exported file, NAME.onnx or "
            "NAME.pt2; or a plain model with its weights.",
            show_default=False,
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of them at any depth.", show_default=False)],
    how: PredictOptions,
    preparation: PreparationOptions,
    source: Annotated[SourceOptions, Fields(only=("factory", "pretrained", "weights", "num_classes", "in_chans"))],
    json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an entry for each image.")] = False,
) -> None:
    """Name the likeliest classes of images, with probabilities. Files that cannot be read do not stop the others."""
    from sphereify.prediction.predicting import predict as run
    from sphereify.progress import ImagesProgress
    from sphereify.tables import print_predictions
    from sphereify.terminal import console

    with ImagesProgress("predicting") as progress:
        predictions = run(model, images, preparation=preparation, source=source, on_images=progress.images, **vars(how))
    if json:
        print(plain_json.dumps([prediction.to_json() for prediction in predictions], indent=1, ensure_ascii=False))
    else:
        print_predictions(console(), predictions)
    failed = [prediction for prediction in predictions if prediction.error is not None]
    if failed:
        reasons = "\n".join(str(prediction.error) for prediction in failed)
        raise DataError(f"{len(failed)} of {len(predictions)} images without a prediction:\n{reasons}")
