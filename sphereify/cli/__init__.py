"""The command line: parse, one library call, print.

Whatever needs torch is imported inside the commands, so that `--help` answers at once.
"""

import functools
import inspect as python_inspect
import json as json_library
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sphereify import __version__, choices
from sphereify.calibration.options import CalibrationOptions
from sphereify.deployment.options import ExportOptions
from sphereify.errors import ArtifactError, DataError, Interrupted, SphereifyError, UsageError
from sphereify.options import options_of

app = typer.Typer(
    name="sphereify",
    help="Rewrite a PyTorch network that exists into a hyperspherical one, and train it further.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

MODEL_HELP = "A timm name, torchvision:NAME, package.module:factory, path/to/file.py:factory, or a saved artifact."
ANGLES, WHERE, LOSS, SOURCE, OUTPUT = "Angular layers", "Which layers", "Loss", "The model", "Output"
TRAINING, DATA = "Training", "Images"


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the work failed, 2 wrong use."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="sphereify")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exception(error)
            sys.exit(getattr(error, "exit_code", 1))
        known = isinstance(error, SphereifyError)
        prefix = "error: " if known else f"error: {type(error).__name__}: "
        prefix = "" if isinstance(error, Interrupted) else prefix
        if isinstance(error, Interrupted) and not _speaks():
            sys.exit(error.exit_code)
        hint = "" if known else "\nThis was not foreseen; --debug shows the traceback."
        message = error.spelled(_spell) if isinstance(error, SphereifyError) else error
        print(f"{prefix}{message}{hint}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


def _spell(name: str, value: str | None) -> str:
    """An option as it is written on the command line."""
    shared = {n: about.command_line for n, about in options_of(CalibrationOptions).items() if about.command_line}
    flag = shared.get(name) or f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag} {value.strip(chr(39))}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sphereify {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


# -------------------------------------------------------------------------------------- options that commands share


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(words)


def _angles(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=ANGLES)


def _where(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=WHERE)


def _conversion(
    operator: Annotated[str, _angles(f"g(θ) in place of the inner product: {_listed(choices.OPERATORS)}.")] = "cosine",
    k: Annotated[
        float | None, _angles("Curvature of the sigmoid (default 0.3), or start of a learnable one (0.5).", "--k")
    ] = None,
    share_k: Annotated[str, _angles(f"Who shares a learnable k: {_listed(choices.SHARE_K)}.")] = "filter",
    head: Annotated[
        str, _angles(f"Classifier: {_listed(choices.HEADS)}. auto: w-softmax where a linear classifier is found.")
    ] = "auto",
    head_operator: Annotated[str | None, _angles("g(θ) of the head, if another than --operator.")] = None,
    margin: Annotated[float, _angles("Angular margin m ≥ 1 of ga-softmax and a-softmax; usual: 2 to 4.")] = 4.0,
    scale: Annotated[float, _angles("s of s-softmax; usual: 10 to 64.")] = 30.0,
    rescale: Annotated[
        str, _angles(f"SphereNorm β·g(θ)+γ: {_listed(choices.RESCALE)}. auto: where no affine norm follows.")
    ] = "auto",
    norm: Annotated[
        str, _angles(f"BatchNorm after a converted convolution: {_listed(choices.NORM)} (by SphereNorm).")
    ] = "keep",
    attention: Annotated[str, _angles(f"Projections of nn.MultiheadAttention: {_listed(choices.ATTENTION)}.")] = "keep",
    eps: Annotated[float, _angles("Added to both squared norms.")] = 1e-4,
    skip_shortcuts: Annotated[bool, _where("Keep 1×1 convolutions on residual shortcuts.", "--skip-shortcuts")] = False,
    include: Annotated[
        list[str] | None, _where("Convert only layers that match: a glob over names, or re:…; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, _where("Keep layers that match; repeatable.")] = None,
    override: Annotated[
        list[str] | None,
        _where("PATTERN=keep or PATTERN=operator:linear,k:0.3,rescale:never; first match wins; repeatable."),
    ] = None,
) -> dict[str, Any]:
    """What `sphereify.sphereify` takes, from the words of the command line."""
    options = {name: value for name, value in locals().items() if name != "override"}
    options["overrides"] = dict(_parse_override(text) for text in override) if override else None
    return options


def _parse_override(text: str) -> tuple[str, dict[str, Any] | str]:
    pattern, equals, setting = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--override: got {text!r}, expected PATTERN=keep or PATTERN=operator:linear,k:0.3")
    if setting == "keep":
        return pattern, "keep"
    values: dict[str, Any] = {}
    for part in setting.split(","):
        key, colon, value = part.partition(":")
        if not colon:
            raise UsageError(f"--override: got {part!r} in {text!r}, expected key:value, such as operator:linear")
        values[key.strip()] = _number(value) if key.strip() == "k" else value.strip()
    return pattern, values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--override: k: got {text!r}, expected a number") from None


def _source(
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the library's pretrained weights.", rich_help_panel=SOURCE)
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="Start from a checkpoint: safetensors, or a torch file of tensors.", rich_help_panel=SOURCE),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Build the model with this many classes.", rich_help_panel=SOURCE)
    ] = None,
    in_chans: Annotated[
        int | None, typer.Option(help="Build the model for this many input channels.", rich_help_panel=SOURCE)
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(help="What makes the plain model of an artifact of your own: see MODEL.", rich_help_panel=SOURCE),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights drawn anew.", rich_help_panel=SOURCE)] = 0,
) -> dict[str, Any]:
    return locals()


def _loss(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=LOSS)


def _objective(
    label_smoothing: Annotated[float, _loss("Share of the target spread over all classes; usual: 0.01 to 0.1.")] = 0.0,
    margin_anneal: Annotated[
        bool, _loss("Let a margin come in slowly, λ = max(5, 1000/(1+0.12·step)), as SphereFace did.")
    ] = True,
    mhe: Annotated[float, _loss("Weight of the hyperspherical energy, which spreads filters; usual: 1.")] = 0.0,
    mhe_s: Annotated[float, _loss("Power s of that energy ‖ŵᵢ-ŵⱼ‖⁻ˢ, ≥ 0; usual: 0 (a logarithm), 1, 2.")] = 1.0,
    mhe_half_space: Annotated[
        bool, _loss("Energy of directions: a filter and its opposite count as one.", "--mhe-half-space")
    ] = False,
    mhe_distance: Annotated[str, _loss("Distance of two filters: euclidean, or angular (A-MHE).")] = "euclidean",
    mhe_hidden: Annotated[float, _loss("Factor of the hidden layers' energy; 0 leaves them out.")] = 1.0,
    mhe_output: Annotated[float, _loss("Factor of the output layer's energy; usual: 1, or the authors' 10.")] = 1.0,
    orthogonality: Annotated[
        float, _loss("Weight of ‖ŴᵀŴ-I‖² over the filters of each hidden layer; usual: 1e-4.")
    ] = 0.0,
) -> dict[str, Any]:
    """What `sphereify.training.Terms` takes."""
    return locals()


def _sharing(
    prepare: Callable[[typer.Context, dict[str, Any]], dict[str, Any]] | None = None,
    /,
    **shared: Callable[..., dict[str, Any]],
) -> Callable[[Callable], Callable]:
    """Give a command the options of other functions; it receives what each of those returns, under its name.

    `prepare` may change the values of all options before that.
    """

    def decorate(command: Callable) -> Callable:
        own = [p for p in python_inspect.signature(command).parameters.values() if p.name not in shared]
        theirs = {name: list(python_inspect.signature(f).parameters.values()) for name, f in shared.items()}

        @functools.wraps(command)
        def run(context: typer.Context, **values: Any) -> None:
            values = prepare(context, values) if prepare is not None else values
            made = {name: f(**{p.name: values[p.name] for p in theirs[name]}) for name, f in shared.items()}
            values["context"] = context
            command(**{p.name: values[p.name] for p in own}, **made)

        context = python_inspect.Parameter("context", python_inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        unique = {p.name: p for p in [context, *own, *(p for group in theirs.values() for p in group)]}
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in unique.values()]
        run.__signature__ = python_inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _training_option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=TRAINING)


def _training(
    epochs: Annotated[int, _training_option("Passes over the training data.")] = 10,
    epoch_batches: Annotated[
        int | None, _training_option("Batches of an epoch, after which the model is tested; default: all images once.")
    ] = None,
    batch_size: Annotated[int, _training_option("Images a step on each device.")] = 64,
    lr: Annotated[float, _training_option("Peak learning rate; usual with adamw: 1e-4 to 1e-3.")] = 1e-3,
    opt: Annotated[str, _training_option("An optimizer of timm's: adamw, sgd, lamb, …")] = "adamw",
    sched: Annotated[str, _training_option("A schedule of timm's: cosine, step, multistep, poly, wsd, …")] = "cosine",
    warmup_epochs: Annotated[
        float | None, _training_option("Epochs in which the rate rises; default a tenth of all.")
    ] = None,
    min_lr: Annotated[float, _training_option("Where the schedule ends.")] = 0.0,
    decay_epochs: Annotated[
        float | None, _training_option("Epochs between two falls of step, or of the fall of wsd.")
    ] = None,
    milestones: Annotated[
        list[int] | None, _training_option("An epoch after which multistep falls; repeatable.")
    ] = None,
    decay_rate: Annotated[float, _training_option("Factor of a fall of step and multistep.")] = 0.1,
    weight_decay: Annotated[float, _training_option("On plain weights; angular ones have none.")] = 0.05,
    layer_decay: Annotated[
        float | None, _training_option("Rate of each layer relative to the next one's; usual: 0.65 to 0.9.")
    ] = None,
    accumulate: Annotated[int, _training_option("Batches whose gradients make one step.")] = 1,
    clip_grad: Annotated[float | None, _training_option("Largest norm of the gradient; usual: 1.")] = None,
    ema: Annotated[
        float | None, _training_option("Decay of a moving average of the weights, which is then saved; usual: 0.9998.")
    ] = None,
    mixup: Annotated[float, _training_option("α of mixup; usual: 0.2 to 0.8. Not with margin heads.")] = 0.0,
    cutmix: Annotated[float, _training_option("α of cutmix; usual: 1. Not with margin heads.")] = 0.0,
    amp: Annotated[str, _training_option("Half precision: none, bf16, fp16.")] = "none",
    channels_last: Annotated[bool, _training_option("Keep images channels last.", "--channels-last")] = False,
    compile: Annotated[bool, _training_option("Compile the model with torch.compile.", "--compile")] = False,
    fsdp: Annotated[
        bool, _training_option("Spread the network over torchrun's processes (FSDP2) instead of copying it.", "--fsdp")
    ] = False,
    freeze: Annotated[list[str] | None, _training_option("Layers that do not train: a glob; repeatable.")] = None,
    warmup_head_epochs: Annotated[
        int, _training_option("Epochs at first in which only k, β, γ and the head train.")
    ] = 0,
    teacher_weight: Annotated[float, _training_option("Share of the loss that follows the teacher.")] = 0.5,
    teacher_temperature: Annotated[float, _training_option("Of the teacher's scores; usual: 1 to 4.")] = 2.0,
    seed: Annotated[int, _training_option("Of weights drawn anew, order and augmentation.")] = 0,
    deterministic: Annotated[bool, _training_option("Use deterministic algorithms only.", "--deterministic")] = False,
    workers: Annotated[int, _training_option("Processes that load images.")] = 0,
    device: Annotated[str, _training_option("auto, cpu, cuda, cuda:1, …")] = "auto",
    strict: Annotated[
        bool, _training_option("End at an image that cannot be read; else such are counted.", "--strict")
    ] = False,
    checkpoint_minutes: Annotated[float, _training_option("Between checkpoints inside an epoch.")] = 10.0,
) -> dict[str, Any]:
    """What `sphereify.training.Settings` takes, but for the terms of the loss."""
    return {**locals(), "freeze": tuple(freeze or ()), "milestones": tuple(milestones or ())}


def _images(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, a folder with train/ and val/ (or test/), or a name of timm's such as torch/cifar10.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Where a data set of timm's lies.", rich_help_panel=DATA)
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Pixels; default 32 for digits, else the model's.", rich_help_panel=DATA)
    ] = None,
    augment: Annotated[
        str | None, typer.Option(help="Augmentation of timm's, such as rand-m9-mstd0.5.", rich_help_panel=DATA)
    ] = None,
    train_images: Annotated[
        int | None, typer.Option(help="Train on so many images only, drawn once and for all.", rich_help_panel=DATA)
    ] = None,
    test_images: Annotated[int | None, typer.Option(help="Test on so many images only.", rich_help_panel=DATA)] = None,
) -> dict[str, Any]:
    """Which images, for `_load_images`."""
    if data is None:
        raise UsageError("--data: is missing; digits, a folder with train/ and val/ (or test/), or a name of timm's")
    return locals()


def _calibration_option(name: str) -> Any:
    about = options_of(CalibrationOptions)[name]
    names = [about.command_line] if about.command_line else []
    return typer.Option(*names, help=about.help, rich_help_panel=about.panel)


def _calibration(
    calibrate: Annotated[str | None, _calibration_option("data")] = None,
    calibration_images: Annotated[int, _calibration_option("images")] = 1024,
    calibrate_steps: Annotated[int, _calibration_option("steps")] = 0,
    data_root: Annotated[Path | None, _calibration_option("data_root")] = None,
    img_size: Annotated[int | None, _calibration_option("img_size")] = None,
) -> Any:
    return CalibrationOptions(calibrate, calibration_images, calibrate_steps, data_root, img_size)


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-OPERATOR.", rich_help_panel=OUTPUT)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.", rich_help_panel=OUTPUT)]
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]


# ---------------------------------------------------------------------------------------------------------- commands


@app.command()
@_sharing(options=_conversion, source=_source, calibration=_calibration)
def convert(
    model: Model,
    options: Any,
    source: Any,
    calibration: Any,
    output: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a network hyperspherical and save it, with a table of what was converted and what was kept and why."""
    folder = output or _default_output(model, options["operator"])
    _check_output(folder, force)

    from sphereify.artifact import save
    from sphereify.calibration.images import calibration_images
    from sphereify.conversion import sphereify

    network = _open_model(model, **source)
    before = getattr(network, "conversion_plan", None)
    batches = calibration_images(network, calibration) if calibration.data is not None else None
    converted = sphereify(network, inplace=batches is None, **options)
    if batches is not None:
        found = _calibrate(converted, network, batches, calibration.steps)
    save(converted, folder)
    _show_plan(converted.conversion_plan, json)
    if not json:
        if batches is not None:
            from sphereify.tables import console, print_calibration

            print_calibration(console(), found)
        if converted.conversion_plan == before:
            print("nothing new was converted: other options need the plain model, not its artifact")
        print(f"saved to {folder}/ (model.safetensors, conversion.json)")


@app.command()
@_sharing(options=_conversion, source=_source)
def inspect(
    model: Model,
    options: Any,
    source: Any,
    json: Json = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run the model to see that each layer is called.", rich_help_panel=OUTPUT),
    ] = False,
    energy: Annotated[
        bool,
        typer.Option("--energy", help="Print the hyperspherical energy of each layer instead.", rich_help_panel=OUTPUT),
    ] = False,
    energy_plot: Annotated[
        Path | None, typer.Option(help="Draw these energies to a picture, such as energy.png.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Show what convert would do, layer by layer and why, without writing anything."""
    from sphereify.convert.planner import plan_conversion

    network = _open_model(model, **source)
    if energy or energy_plot is not None:
        _show_energy(network, energy_plot)
        return
    plan = plan_conversion(network, **options)
    if not plan.converted:  # an artifact, with nothing left to convert: how it was converted
        plan = getattr(network, "conversion_plan", plan)
    _show_plan(plan.verify(network) if verify else plan, json)


@app.command()
@_sharing(options=_conversion, source=_source, calibration=_calibration)
def suggest(
    model: Model,
    options: Any,
    source: Any,
    calibration: Any,
    accuracy_loss: Annotated[
        float, typer.Option(help="Share of images that may get another class than from the original, in (0, 1).")
    ] = 0.02,
) -> None:
    """Find which layers of a trained model to exclude, so that it keeps what it knows. Nothing is written."""
    if calibration.data is None:
        raise UsageError("--calibrate: is missing; the images to measure on: digits, a folder, or a name of timm's")
    if calibration.steps:
        raise UsageError("--calibrate-steps: suggest makes none; give them to convert")

    from sphereify.calibration.images import calibration_images
    from sphereify.calibration.suggestion import suggest as find
    from sphereify.tables import console, print_suggestion

    network = _open_model(model, **source)
    batches = calibration_images(network, calibration)

    def tell(excluded: int, agreement: float) -> None:
        console().print(f"{excluded} layers excluded: {agreement:.1%} agreement", markup=False)

    print_suggestion(console(), find(network, batches, loss=accuracy_loss, on_trial=tell, **options))


def _resumed(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that is continued; those given anew may only be what changes no result.

    All of them are kept in `context.obj`, for the run's own record.
    """
    if values["resume"] is None:
        context.obj = _plain(values)
        return values
    from sphereify.training.settings import WITHOUT_EFFECT

    folder = values["resume"]
    record = folder / "run.json"
    if not record.is_file():
        raise UsageError(f"--resume: {folder} is not the folder of a run, there is no run.json in it")
    try:
        before = json_library.loads(record.read_text())
    except ValueError as error:
        raise ArtifactError(f"{record}: cannot be read ({error}); the checkpoints beside it hold the weights") from None
    given = {n for n in values if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"} - {"resume"}
    plain = _plain(values)
    changed = [f"--{n.replace('_', '-')}: {before.get(n)} before, {plain[n]} now"
               for n in sorted(given) if n not in WITHOUT_EFFECT and plain[n] != before.get(n)]  # fmt: skip
    if changed:
        raise UsageError(f"{folder}: cannot be continued otherwise than it began: {'; '.join(changed)}")
    kept = {n: v for n, v in before.items() if n in values and n not in given & set(WITHOUT_EFFECT)}
    paths = {n: Path(kept[n]) for n in ("weights", "data_root", "teacher_weights") if kept.get(n) is not None}
    return {**values, **kept, **paths, "output": folder, "resume": folder}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@app.command()
@_sharing(_resumed, options=_conversion, terms=_objective, training=_training, source=_source, images=_images)
def finetune(
    context: typer.Context,
    options: Any,
    terms: Any,
    training: Any,
    source: Any,
    images: Any,
    model: Annotated[
        str | None, typer.Argument(help="An artifact, or a model to convert first.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default MODEL-finetuned.")] = None,
    force: Force = False,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.", show_default=False)] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Follow the scores of: original, a model's name, or an artifact.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="A checkpoint for the teacher.")] = None,
) -> None:
    """Train a converted network on labelled images; what is learned, how, and curves go to a folder."""
    if model is None:
        raise UsageError("MODEL: is missing; an artifact, or the name of a model to convert first")
    folder = output or Path(f"{Path(model.rpartition(':')[2]).name}-finetuned")
    if resume is None:
        _check_output(folder, force)

    from sphereify.training import Settings, Terms
    from sphereify.training import finetune as train
    from sphereify.training.run_folder import write_text

    settings = Settings(**training, terms=Terms(**terms))
    network, original, data = _network_and_data(model, images, source, options)
    trained = source["pretrained"] or source["weights"] is not None
    followed = _teacher(teacher, teacher_weights, original, len(data.classes), trained, source["pretrained"])

    def begin() -> None:
        _clear(folder)
        write_text(folder / "run.json", json_library.dumps(context.obj, indent=1) + "\n")

    with _Progress(settings.epochs) as progress:
        result = train(network, data, settings, output=folder, resume=resume is not None, teacher=followed,
                       on_start=begin, on_step=progress.step, on_epoch=progress.epoch)  # fmt: skip
    if not _speaks():
        return
    best = result.best
    print(f"test accuracy {result.accuracy:.2%}, saved to {folder}/last; best {best.accuracy:.2%} in epoch "
          f"{best.number}, saved to {folder}/best")  # fmt: skip


@app.command()
@_sharing(source=_source, images=_images)
def evaluate(
    model: Model,
    source: Any,
    images: Any,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    amp: Annotated[str, typer.Option(help="Half precision: none, bf16, fp16.")] = "none",
    strict: Annotated[bool, typer.Option("--strict", help="End at an image that cannot be read.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for evaluation.json and confusion.png.")
    ] = None,
) -> None:
    """Test a model, converted or not, on the held-out part of a data set."""
    from sphereify.artifact import read_document
    from sphereify.tables import console, print_evaluation
    from sphereify.training import Settings
    from sphereify.training import evaluate as test

    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; --output names a folder")
    settings = Settings(batch_size=batch_size, workers=workers, device=device, amp=amp, strict=strict)
    network = _open_model(model, **source)
    known = read_document(model).get("training") or {} if Path(model).is_dir() else {}
    if images["img_size"] is None and known.get("image_size"):
        images = {**images, "img_size": known["image_size"][-1]}
    data = _load_images(images, network)
    if known.get("classes", data.classes) != data.classes and len(known["classes"]) == len(data.classes):
        odd = sorted({*known["classes"]} ^ {*data.classes}) or ["in another order"]
        raise DataError(f"{model}: was trained on other classes than {data.name} has: {', '.join(odd[:5])}")
    found = test(network, data, settings)
    print_evaluation(console(), found, data.classes)
    if output is not None:
        from sphereify.plots import plot_confusion
        from sphereify.training.run_folder import write_text

        shares = [None if math.isnan(share) else share for share in found.per_class]
        numbers = {"top1": found.top1, "top5": found.top5, "images": found.images, "skipped": found.skipped,
                   "images_per_second": found.images_per_second, "classes": data.classes,
                   "per_class": shares, "confusion": found.confusion.tolist()}  # fmt: skip
        write_text(output / "evaluation.json", json_library.dumps(numbers, indent=1) + "\n")
        picture = plot_confusion(found.confusion, data.classes, output / "confusion.png")
        print(f"written to {output / 'evaluation.json'}, drawn to {picture}")


@app.command()
@_sharing(options=_conversion, terms=_objective, training=_training, source=_source, images=_images)
def compare(
    model: Model,
    options: Any,
    terms: Any,
    training: Any,
    source: Any,
    images: Any,
    operators: Annotated[str, typer.Option(help="Conversions to compare with the original, by commas.")] = "cosine",
    seeds: Annotated[int, typer.Option(help="Runs of each network, from --seed on.")] = 1,
    reach: Annotated[
        float | None, typer.Option(help="Accuracy in (0, 1] to count steps to; default 95 % of the original's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default MODEL-compared.")] = None,
) -> None:
    """Train the original and converted networks alike, and say which is better. Finished runs are not repeated."""
    from sphereify.sources import find_model
    from sphereify.tables import comparison_table, console
    from sphereify.training import Settings, Terms, Variant
    from sphereify.training import compare as run

    if Path(model).is_dir():
        raise UsageError(f"{model}: is a saved artifact; compare starts from the plain model that it was made of")
    settings = Settings(**training, terms=Terms(**terms))
    find_model(model)  # a wrong name is told before the data is read
    source = _with_classes(model, source, images)
    data = _load_images(images, _open_model(model, **source))
    names = [choices.canonical(name.strip()) for name in operators.split(",") if name.strip()]
    if not names:
        raise UsageError("--operators: got none, expected some of " + ", ".join(choices.OPERATORS))
    variants = [Variant("original", None), *(Variant(name, {**options, "operator": name}) for name in names)]
    folder = output or Path(f"{Path(model.rpartition(':')[2]).name}-compared")
    with _Progress(settings.epochs) as progress:
        found = run(lambda: _open_model(model, **{**source, "seed": None}), data, variants, settings, output=folder,
                    seeds=seeds, reach=reach, on_run=progress.run, on_step=progress.step,
                    on_epoch=progress.epoch)  # fmt: skip
    console().print(comparison_table(found))
    print(f"written to {folder}/comparison.md, .json and .png")


def _export_option(name: str) -> Any:
    about = options_of(ExportOptions)[name]
    names = [about.command_line] if about.command_line else []
    return typer.Option(*names, help=about.help, rich_help_panel=about.panel or None)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A saved artifact.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default ARTIFACT.onnx or ARTIFACT.pt2.")
    ] = None,
    format: Annotated[str, _export_option("format")] = "onnx",
    dynamic_size: Annotated[bool, _export_option("dynamic_size")] = False,
    img_size: Annotated[int | None, _export_option("img_size")] = None,
    batch_size: Annotated[int | None, _export_option("batch_size")] = None,
    opset: Annotated[int | None, _export_option("opset")] = None,
    folded: Annotated[bool, _export_option("folded")] = True,
    factory: Annotated[
        str | None, typer.Option(help="What makes the plain model of an artifact of your own: see convert.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write an artifact to one file for other runtimes, folded for inference, and check the file against it."""
    from sphereify.artifact import is_artifact

    if not (Path(model).is_dir() or is_artifact(model)):
        raise UsageError(f"{model}: is no saved artifact; make one with: sphereify convert {model}")
    options = ExportOptions(format, folded, batch_size, dynamic_size, img_size, opset)
    file = output or Path(f"{Path(model).resolve().name}{options.suffix}")
    if file.exists() and not force:
        raise UsageError(f"{file}: exists already; --force replaces it, -o names another file")

    from sphereify.deployment.exporting import export as write
    from sphereify.tables import console, print_export

    print_export(console(), write(_open_model(model, factory=factory), file, **vars(options)))


def _open_model(spec: str, *, pretrained: bool = False, weights: Path | None = None, num_classes: int | None = None,
                in_chans: int | None = None, factory: str | None = None, seed: int | None = 0) -> Any:  # fmt: skip
    import torch

    from sphereify.artifact import is_artifact, load
    from sphereify.sources import build_model, find_model, load_weights

    if spec and (Path(spec).is_dir() or is_artifact(spec)):
        given = {"--pretrained": pretrained, "--weights": weights, "--num-classes": num_classes, "--in-chans": in_chans}
        for option, value in given.items():
            if value is not None and value is not False:
                raise UsageError(f"{option}: does not go with the saved artifact {spec}, which has its own weights")
        return load(spec, factory=functools.partial(build_model, find_model(factory)) if factory else None)
    if factory:
        raise UsageError(
            f"--factory: got {factory!r}, but {spec!r} is no saved artifact; give the factory as the model"
        )
    if pretrained and weights:
        raise UsageError("--pretrained and --weights: got both, expected one source of weights")
    if seed is not None:
        torch.manual_seed(seed)
    model = build_model(find_model(spec, num_classes=num_classes, in_chans=in_chans), pretrained=pretrained)
    if weights:
        load_weights(model, weights)
    return model


def _network_and_data(spec: str, images: dict[str, Any], source: dict[str, Any],
                      options: dict[str, Any]) -> tuple[Any, Any, Any]:  # fmt: skip
    """The converted network, the plain one it was made of, and the images.

    An artifact is taken as it is, and has no original; a plain model is built for the classes of the data.
    """
    import copy

    from sphereify.artifact import is_artifact
    from sphereify.conversion import sphereify
    from sphereify.sources import find_model

    if Path(spec).is_dir() or is_artifact(spec):
        usual = {name: p.default for name, p in python_inspect.signature(_conversion).parameters.items()}
        for name, value in options.items():
            if value != usual.get(name):
                raise UsageError(
                    f"--{name.replace('_', '-')}: does not go with the artifact {spec}, which is converted already"
                )
        model = _open_model(spec, **source)
        return model, None, _load_images(images, model)
    find_model(spec)  # a wrong name is told before the data is read
    plain = _open_model(spec, **_with_classes(spec, source, images))
    data = _load_images(images, plain)
    return sphereify(plain, **options), copy.deepcopy(plain), data


def _with_classes(model: str, source: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """The source with as many classes as the data has, unless told otherwise, or unless the builder takes none."""
    from sphereify.datasets import class_count
    from sphereify.sources import accepts

    if source["num_classes"] is not None or not accepts(model, "num_classes"):
        return source
    return {**source, "num_classes": class_count(images["data"], root=images["data_root"])}


def _load_images(images: dict[str, Any], model: Any) -> Any:
    from sphereify.datasets import load_data
    from sphereify.sources import data_config, input_channels

    return load_data(images["data"], channels=input_channels(model), img_size=images["img_size"],
                     config=data_config(model), root=images["data_root"],
                     augment=images["augment"], train_images=images["train_images"],
                     test_images=images["test_images"])  # fmt: skip


def _calibrate(converted: Any, original: Any, batches: Any, steps: int) -> Any:
    """Calibrate with a bar in a terminal, on the GPU where there is one."""
    from rich.progress import Progress

    from sphereify.calibration.least_squares import calibrate
    from sphereify.tables import console

    screen = console(stderr=True)
    with Progress(console=screen, disable=not screen.is_terminal, transient=True) as bar:
        layers = bar.add_task("calibrating", total=len(converted.conversion_plan.converted))
        walk = bar.add_task("steps", total=steps, visible=steps > 0)
        return calibrate(
            converted, original, batches, steps=steps, device="auto",
            on_layer=lambda name, explained: bar.update(layers, advance=1, description=f"calibrating {name}"),
            on_step=lambda step, loss: bar.update(walk, completed=step, description=f"steps, error {loss:.3f}"),
        )  # fmt: skip


def _teacher(
    spec: str | None, weights: Path | None, original: Any, classes: int, trained: bool, pretrained: bool
) -> Any:
    """The network whose scores are followed. One with a classifier that nobody has trained is refused."""
    if weights is not None and spec in (None, "original"):
        raise UsageError("--teacher-weights: belong to a --teacher by name; the original has those of --weights")
    if spec is None:
        return None
    if spec == "original" and original is not None:
        if not trained:
            raise UsageError("--teacher original: it has not been trained; bring its weights with --weights FILE")
        if pretrained:
            _check_classifier(original, classes)
    if spec == "original":
        if original is None:
            raise UsageError(
                "--teacher original: an artifact does not hold what it was before. Give the plain model to finetune "
                "with the options of convert, or name the teacher"
            )
        return original
    if Path(spec).is_dir():
        return _open_model(spec)
    from sphereify.sources import accepts

    if weights is None and ":" in spec and not spec.startswith("torchvision:"):
        raise UsageError(f"--teacher: {spec} needs --teacher-weights")
    wanted: dict[str, Any] = {"num_classes": classes} if accepts(spec, "num_classes") else {}
    network = _open_model(spec, pretrained=weights is None, weights=weights, **wanted)
    if weights is None:
        _check_classifier(network, classes)
    return network


def _check_classifier(network: Any, classes: int) -> None:
    """Pretrained weights for another number of classes leave the classifier as it was drawn."""
    known = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes", classes)
    if known != classes:
        raise UsageError(
            f"--teacher: its pretrained weights are for {known} classes, the data has {classes}: its classifier is new "
            f"and knows nothing. Train it first, and bring its weights with --weights FILE"
        )


def _clear(folder: Path) -> None:
    """Make room for a new run in a folder that --force gave up."""
    import shutil

    for name in ("checkpoints", "last", "best", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("summary.json", "metrics.jsonl", "metrics.csv", "curves.png", "last.safetensors", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


def _default_output(model: str, operator: str) -> Path:
    name = model.rpartition(":")[2] if not Path(model).exists() else Path(model).name
    return Path(f"{name}-{choices.canonical(operator)}")


def _check_output(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; --output names a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise UsageError(f"{folder}: exists already; --force replaces the artifact in it, -o names another folder")


def _show_plan(plan: Any, as_json: bool) -> None:
    from sphereify.tables import console, print_plan

    if as_json:
        print(plan.to_json())
    else:
        print_plan(console(), plan)


def _show_energy(network: Any, picture: Path | None) -> None:
    from sphereify.nn import HypersphericalEnergy

    report = HypersphericalEnergy().report(network)
    print(report)
    if picture is not None:
        from sphereify.plots import plot_energy

        print(f"drawn to {plot_energy(report, picture)}")


def _speaks() -> bool:
    """Whether this is the one process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


class _Progress:
    """A bar with loss, rate and speed in a terminal; one line an epoch everywhere."""

    def __init__(self, epochs: int):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from sphereify.tables import console

        self.epochs = epochs
        self.console = console()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task("training", total=None)
        self.accuracy = ""

    def __enter__(self) -> "_Progress":
        if _speaks():
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def run(self, name: str, seed: int) -> None:
        self.console.print(f"{name}, seed {seed}", style="bold")
        self.accuracy = ""

    def step(self, step: Any) -> None:
        told = f"loss {step.loss:.3f}  lr {step.lr:.1e}  {step.images_per_second:.0f} images/s{self.accuracy}"
        self.bar.update(self.task, completed=step.number, total=step.steps, description=told)

    def epoch(self, epoch: Any) -> None:
        self.accuracy = f"  accuracy {epoch.accuracy:.2%}"
        skipped = f"  {epoch.skipped} images skipped" if epoch.skipped else ""
        line = f"epoch {epoch.number:>3}/{self.epochs}  loss {epoch.loss:.4f}  test accuracy {epoch.accuracy:.2%}"
        self.console.print(f"{line}  {epoch.images_per_second:.0f} images/s{skipped}")
