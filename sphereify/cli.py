"""The command line: parse, one library call, print.

Whatever needs torch is imported inside the commands, so that `--help` answers at once.
"""

import functools
import inspect as python_inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sphereify import __version__, choices
from sphereify.errors import SphereifyError, UsageError

app = typer.Typer(
    name="sphereify",
    help="Rewrite a PyTorch network that exists into a hyperspherical one, and train it further.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

MODEL_HELP = "A timm name, torchvision:NAME, package.module:factory, path/to/file.py:factory, or a saved artifact."
ANGLES, WHERE, LOSS, SOURCE, OUTPUT = "Angular layers", "Which layers", "Loss", "The model", "Output"


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
        prefix = "error" if known else f"error: {type(error).__name__}"
        hint = "" if known else "\nThis was not foreseen; --debug shows the traceback."
        print(f"{prefix}: {error}{hint}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


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
    orthogonality: Annotated[
        float, _loss("Weight of ‖ŴᵀŴ-I‖² over the filters of each hidden layer; usual: 1e-4.")
    ] = 0.0,
) -> dict[str, Any]:
    """What `sphereify.finetune.Terms` takes."""
    return locals()


def _sharing(**shared: Callable[..., dict[str, Any]]) -> Callable[[Callable], Callable]:
    """Give a command the options of other functions; it receives what each of those returns, under its name."""

    def decorate(command: Callable) -> Callable:
        own = [p for p in python_inspect.signature(command).parameters.values() if p.name not in shared]
        theirs = {name: list(python_inspect.signature(f).parameters.values()) for name, f in shared.items()}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {name: f(**{p.name: values.pop(p.name) for p in theirs[name]}) for name, f in shared.items()}
            command(**values, **made)

        parameters = [*own, *(p for group in theirs.values() for p in group)]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = python_inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-OPERATOR.", rich_help_panel=OUTPUT)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.", rich_help_panel=OUTPUT)]
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]


# ---------------------------------------------------------------------------------------------------------- commands


@app.command()
@_sharing(options=_conversion, source=_source)
def convert(
    model: Model,
    options: Any,
    source: Any,
    output: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a network hyperspherical and save it, with a table of what was converted and what was kept and why."""
    folder = output or _default_output(model, options["operator"])
    _check_output(folder, force)

    from sphereify.artifact import save
    from sphereify.convert import sphereify

    network = _open_model(model, **source)
    before = getattr(network, "conversion_plan", None)
    converted = sphereify(network, inplace=True, **options)
    save(converted, folder)
    _show_plan(converted.conversion_plan, json)
    if not json:
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
    from sphereify.convert import plan_conversion

    network = _open_model(model, **source)
    if energy or energy_plot is not None:
        _show_energy(network, energy_plot)
        return
    plan = plan_conversion(network, **options)
    if not plan.converted:  # an artifact, with nothing left to convert: how it was converted
        plan = getattr(network, "conversion_plan", plan)
    _show_plan(plan.verify(network) if verify else plan, json)


@app.command()
@_sharing(options=_conversion, terms=_objective)
def finetune(
    model: Annotated[str, typer.Argument(help="An artifact, or a model to convert first.", show_default=False)],
    data: Annotated[str, typer.Option(help="digits, or a folder with train/ and val/ (or test/).", show_default=False)],
    options: Any,
    terms: Any,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default MODEL-finetuned.")] = None,
    force: Force = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="On plain weights; angular ones have none.")] = 0.05,
    img_size: Annotated[int | None, typer.Option(help="Pixels; default 32 for digits, else the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights drawn anew, order and augmentation.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    factory: Annotated[str | None, typer.Option(help="Makes the plain model of an artifact of your own.")] = None,
) -> None:
    """Train a converted network on labelled images and save it with its accuracy."""
    folder = output or Path(f"{Path(model.rpartition(':')[2]).name}-finetuned")
    _check_output(folder, force)

    from sphereify.artifact import save
    from sphereify.finetune import Settings, Terms
    from sphereify.finetune import finetune as train

    settings = Settings(epochs, batch_size, lr, weight_decay, seed, workers, device, Terms(**terms))
    network, images = _network_and_data(model, data, img_size, seed, factory, options)
    with _Progress(settings.epochs) as progress:
        history = train(network, images, settings, on_step=progress.step, on_epoch=progress.epoch)
    accuracy = history[-1].accuracy
    save(network, folder, training={"data": images.name, "classes": images.classes, "accuracy": accuracy,
                                    "image_size": images.image_size, "epochs": epochs})  # fmt: skip
    print(f"test accuracy {accuracy:.2%}, saved to {folder}/")


def _open_model(spec: str, *, pretrained: bool = False, weights: Path | None = None, num_classes: int | None = None,
                in_chans: int | None = None, factory: str | None = None, seed: int = 0) -> Any:  # fmt: skip
    import torch

    from sphereify.artifact import is_artifact, load
    from sphereify.sources import build_model, find_model, load_weights

    if Path(spec).is_dir() or is_artifact(spec):
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
    torch.manual_seed(seed)
    model = build_model(find_model(spec, num_classes=num_classes, in_chans=in_chans), pretrained=pretrained)
    if weights:
        load_weights(model, weights)
    return model


def _network_and_data(spec: str, data: str, img_size: int | None, seed: int, factory: str | None,
                      options: dict[str, Any]) -> tuple[Any, Any]:  # fmt: skip
    """An artifact as it is; a plain model is built for the classes of the data and converted."""
    from sphereify.artifact import is_artifact
    from sphereify.convert import sphereify
    from sphereify.sources import find_model, input_channels, load_data

    if Path(spec).is_dir() or is_artifact(spec):
        usual = {name: p.default for name, p in python_inspect.signature(_conversion).parameters.items()}
        for name, value in options.items():
            if value != usual.get(name):
                raise UsageError(
                    f"--{name.replace('_', '-')}: does not go with the artifact {spec}, which is converted already"
                )
        model = _open_model(spec, factory=factory)
        config = getattr(model, "pretrained_cfg", None)
        return model, load_data(data, channels=input_channels(model), img_size=img_size, config=config)
    find_model(spec)  # a wrong name is told before the data is read
    plain = _open_model(spec, num_classes=len(load_data(data).classes), seed=seed)
    config = getattr(plain, "pretrained_cfg", None)
    images = load_data(data, channels=input_channels(plain), img_size=img_size, config=config)
    return sphereify(plain, inplace=True, **options), images


def _default_output(model: str, operator: str) -> Path:
    name = model.rpartition(":")[2] if not Path(model).exists() else Path(model).name
    return Path(f"{name}-{choices.canonical(operator)}")


def _check_output(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; --output names a folder")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise UsageError(f"{folder}: exists already; --force replaces the artifact in it, -o names another folder")


def _show_plan(plan: Any, as_json: bool) -> None:
    from sphereify.report import console, print_plan

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


class _Progress:
    """A bar for each epoch in a terminal; one line an epoch everywhere."""

    def __init__(self, epochs: int):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from sphereify.report import console

        self.epochs = epochs
        self.console = console()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task("training", total=None)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, steps: int, loss: float) -> None:
        self.bar.update(self.task, completed=step, total=steps, description=f"loss {loss:.3f}")

    def epoch(self, epoch: Any) -> None:
        line = f"epoch {epoch.number:>3}/{self.epochs}  loss {epoch.loss:.4f}  test accuracy {epoch.accuracy:.2%}"
        self.console.print(line)
