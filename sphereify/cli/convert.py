"""Commands before any training: convert, inspect, suggest."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphereify import choices
from sphereify.annotations import PLAN, TRAINING_RECORD
from sphereify.calibration.options import CalibrationOptions, SuggestionOptions
from sphereify.cli.options import Fields, with_options
from sphereify.cli.output import OUTPUT, Force, check_folder, name_of
from sphereify.cli.report import Report, check_report, given, write
from sphereify.convert.input_options import InputOptions
from sphereify.convert.options import ConversionOptions
from sphereify.errors import exclusive
from sphereify.models import SPECIFICATION, SourceOptions, open_model, untrained_part
from sphereify.preparation import PreparationOptions

if TYPE_CHECKING:
    from sphereify.calibration.agreement import RadiusChoice
    from sphereify.calibration.results import Calibration
    from sphereify.convert.plan import ConversionPlan

Model = Annotated[str, typer.Argument(help=SPECIFICATION, show_default=False)]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print what the notes count, line by line.", rich_help_panel=OUTPUT)
]
All = Annotated[
    bool,
    typer.Option(
        "--all", help="Print a row for each layer, instead of one for layers that repeat.", rich_help_panel=OUTPUT
    ),
]
FLAGS = {"example_inputs": "--input"}
"""Options of the library that have another name here."""
Json = Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.", rich_help_panel=OUTPUT)]


@with_options(flags=FLAGS)
def convert(
    model: Model,
    conversion: Annotated[dict[str, Any], Fields(of=ConversionOptions)],
    source: SourceOptions,
    calibration: Annotated[CalibrationOptions, Fields(without=("img_size",))],
    preparation: PreparationOptions,
    inputs: Annotated[InputOptions, Fields(only=("input",))],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; default: MODEL-OPERATOR.", rich_help_panel=OUTPUT),
    ] = None,
    force: Force = False,
    report: Report = None,
    json: Json = False,
    every: All = False,
    verbose: Verbose = False,
) -> None:
    """Make a network hyperspherical and save it, with a table of what was converted and what was kept and why."""
    # Where an agreement chooses the radius, a learned one has no start before.
    learned = conversion["learn_radius"] and calibration.agreement is None
    options = ConversionOptions(**{**conversion, "learn_radius": learned})
    folder = output or Path(f"{name_of(model)}-{choices.canonical(str(options.operator))}")
    check_folder(folder, force)
    check_report(report, force)

    from sphereify.artifact import save
    from sphereify.calibration.images import calibration_images
    from sphereify.conversion import sphereify
    from sphereify.model_images import prepare_as, unknown_preparation
    from sphereify.tables import print_calibration, print_radius_choice
    from sphereify.terminal import console

    network = open_model(model, source)
    prepare_as(network, preparation, size_is_used=calibration.data is not None)
    if calibration.data is not None:
        calibration = dataclasses.replace(calibration, img_size=preparation.img_size)
    before = PLAN.of(network)
    example_inputs = inputs.for_model(network)
    batches = None if calibration.data is None else calibration_images(network, calibration)
    choice = result = None
    if calibration.agreement is not None:
        choice = _choose_radius(network, batches, calibration, {**conversion, "example_inputs": example_inputs})
        converted, result = choice.network, choice.calibration
    else:
        inplace = batches is None and report is None
        converted = sphereify(network, inplace=inplace, example_inputs=example_inputs, **options.keywords())
        if batches is not None:
            result = _calibrate(converted, network, batches, calibration)
    save(converted, folder, training=TRAINING_RECORD.of(network) if converted.conversion_plan == before else None)
    _print_plan(converted.conversion_plan, json, every, verbose)  # type: ignore[arg-type]
    if report is not None:
        agreement = {} if choice is None else {"inputs with the original's class": f"{100 * choice.agreement:.1f} %"}
        write(
            report,
            converted,
            original=network if before is None else None,
            inputs=example_inputs if batches is None else batches[0],
            inputs_described="" if batches is None else f"images of the calibration ({calibration.data})",
            calibration=result,
            facts=agreement,
            options=given(options, calibration, source, inputs),
            name=name_of(model),
            quiet=json,
        )
    if json:
        return
    if new := untrained_part(network):
        print(f"note: {new}")
    if result is not None:
        print_calibration(console(), result)
    elif source.pretrained or source.weights is not None:
        print(
            "note: the weights were copied, which loses most of what they know; --calibrate IMAGES fits the layers to "
            "the original on unlabelled images and keeps it"
        )
    if choice is not None:
        print_radius_choice(console(), choice)
    if what := unknown_preparation(converted):
        print(f"note: {what}\nnote: --mean, --std and --img-size store it in the artifact")
    if converted.conversion_plan == before:
        print("nothing new was converted: other options need the plain model, not its artifact")
    print(f"saved to {folder}/ (model.safetensors, conversion.json)")


@with_options(flags=FLAGS)
def inspect(
    model: Model,
    conversion: ConversionOptions,
    source: SourceOptions,
    inputs: InputOptions,
    report: Report = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the report if it exists.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    every: All = False,
    verbose: Verbose = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run the model to see that each layer is called.", rich_help_panel=OUTPUT),
    ] = False,
    energy: Annotated[
        bool,
        typer.Option("--energy", help="Print the hyperspherical energy of each layer instead.", rich_help_panel=OUTPUT),
    ] = False,
    energy_plot: Annotated[
        Path | None,
        typer.Option(help="Draw these energies to a picture, such as energy.png.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Show what convert would do, layer by layer and why, without writing anything."""
    check_report(report, force)
    if report is not None and (energy or energy_plot is not None):
        other = "energy" if energy else "energy_plot"
        raise exclusive("report", other, "one of them; the report has the energies, too")

    from sphereify.convert.planner import plan_conversion

    network = open_model(model, source)
    if energy or energy_plot is not None:
        _print_energy(network, energy_plot)
        return
    example_inputs = inputs.for_model(network)
    plan = plan_conversion(network, example_inputs=example_inputs, **conversion.keywords())
    is_done = not plan.converted  # an artifact, with nothing left to convert: how it was converted
    if is_done:
        plan = PLAN.of(network) or plan
    plan = plan.verify(network, example_inputs) if verify else plan
    _print_plan(plan, json, every, verbose)
    if report is not None:
        from sphereify.training.robustness import read_robustness

        # An artifact as it is, unless options ask what else could be converted.
        is_done = is_done or (PLAN.is_on(network) and conversion == ConversionOptions())
        about: dict[str, Any] = {"robustness": read_robustness(Path(model))} if is_done else {"original": network}
        about |= {"options": given(conversion, source, inputs), "name": name_of(model), "inputs": example_inputs}
        write(report, network if is_done else plan, **about, quiet=json)


@with_options(flags=FLAGS)
def suggest(
    model: Model,
    conversion: ConversionOptions,
    source: SourceOptions,
    calibration: Annotated[CalibrationOptions, Fields(without=("steps", "contrast_jitter", "agreement"))],
    inputs: Annotated[InputOptions, Fields(only=("input",))],
    asked: SuggestionOptions,
) -> None:
    """Find the radius, and the layers to exclude, with which a trained model keeps what it knows. Writes nothing."""
    from sphereify.calibration.images import calibration_images
    from sphereify.calibration.suggestion import suggest as find
    from sphereify.tables import print_suggestion
    from sphereify.terminal import console, say

    network = open_model(model, source)
    batches = calibration_images(network, calibration)

    def show(excluded: int, agreement: float) -> None:
        say(console(), f"{excluded} layers excluded: {agreement:.1%} agreement")

    def show_radius(trial: Any) -> None:
        say(console(), f"{trial.described}: {trial.agreement:.1%} agreement")

    suggestion = find(
        network,
        batches,
        loss=asked.loss,
        example_inputs=inputs.for_model(network),
        on_trial=show,
        on_radius=show_radius,
        **conversion.keywords(),
    )
    print_suggestion(console(), suggestion)


def _calibrate(converted: Any, original: Any, batches: Any, options: CalibrationOptions) -> "Calibration":
    """Calibrate with a bar in a terminal, on the GPU where there is one."""
    from sphereify.calibration.least_squares import calibrate
    from sphereify.progress import CalibrationProgress

    with CalibrationProgress(len(converted.conversion_plan.converted), options.steps) as progress:
        return calibrate(
            converted,
            original,
            batches,
            steps=options.steps,
            contrast_jitter=options.contrast_jitter,
            device="auto",
            on_layer=progress.layer,
            on_step=progress.step,
        )


def _choose_radius(
    original: Any, batches: Any, calibration: CalibrationOptions, conversion: dict[str, Any]
) -> "RadiusChoice":
    """Choose a radius, with a bar and a line for each trial, on the GPU where there is one."""
    from sphereify.calibration.agreement import choose_radius
    from sphereify.progress import CalibrationProgress

    with CalibrationProgress(None, calibration.steps) as progress:
        return choose_radius(
            original,
            batches,
            agreement=calibration.agreement or 0.0,
            steps=calibration.steps,
            contrast_jitter=calibration.contrast_jitter,
            device="auto",
            on_trial=progress.trial,
            on_layer=progress.layer,
            on_step=progress.step,
            **conversion,
        )


def _print_plan(plan: "ConversionPlan", as_json: bool, every: bool, verbose: bool) -> None:
    from sphereify.tables import print_plan
    from sphereify.terminal import console

    if as_json:
        print(plan.to_json())
    else:
        print_plan(console(), plan, verbose=verbose, every=every)


def _print_energy(network: Any, picture: Path | None) -> None:
    from sphereify.nn import HypersphericalEnergy

    report = HypersphericalEnergy().report(network)
    print(report)
    if picture is not None:
        from sphereify.plots import plot_energy

        print(f"drawn to {plot_energy(report, picture)}")
