"""Options of commands are made from the dataclasses that declare them, and messages refer to them as they are typed."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import typer.main
from typer.testing import CliRunner

from sphereify.cli.options import Fields, parse_override, with_options
from sphereify.cli.spelling import Spelling
from sphereify.convert.options import Overrides
from sphereify.errors import UsageError, option
from sphereify.options import Option, check_options, option_field, options_of

RATES, PLACES = "Rates", "Places"


@dataclass(frozen=True)
class Loss:
    smoothing: float = option_field(0.0, "Share that is spread.", panel="Loss", at_least=0)
    annealed: bool = option_field(True, "Let the margin grow.", panel="Loss")


@dataclass(frozen=True)
class Training:
    lr: float = option_field(1e-3, "Peak rate [per step].", panel=RATES, above=0, usual="1e-4 to 1e-3")
    steps: int | None = option_field(None, f"Number of steps; with {option('lr')}.", panel=RATES)
    fast: bool = option_field(False, "Hurry.", panel=RATES)
    schedule: str = option_field("cosine", "Schedule.", panel=RATES, metavar="NAME")
    weights: Path | None = option_field(None, "A file.", panel=PLACES)
    freeze: str | Iterable[str] | None = option_field(None, "Layers.", panel=PLACES)
    milestones: tuple[int, ...] = option_field((), "Epochs.", panel=RATES)
    overrides: Overrides = option_field(None, "Exceptions.", panel=PLACES, command_line="--override")
    operator: str | Callable = option_field("cosine", "g(θ).")
    hidden: int = option_field(7, "Not for the terminal.", command_line="-")
    seed: int = option_field(0, "Random seed of the training.")
    loss: Loss = field(default_factory=Loss)

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class Source:
    seed: int = option_field(0, "Random seed of the weights.")
    name: str = option_field("net", "A name.")


def command_of(function: Callable[..., None], **about: Any) -> typer.Typer:
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    app.command()(with_options(**about)(function))
    return app


@pytest.fixture
def call() -> Callable[..., dict[str, Any]]:
    """What a command receives for these words."""
    received: dict[str, Any] = {}

    def command(model: str, training: Training, source: Source, output: Path | None = None) -> None:
        received.update(model=model, training=training, source=source, output=output)

    def call(*words: str) -> dict[str, Any]:
        result = CliRunner().invoke(command_of(command), ["a-model", *words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return received

    return call


def test_without_options_the_dataclasses_have_their_defaults(call):
    assert call() == {"model": "a-model", "training": Training(), "source": Source(), "output": None}


WORDS = {
    "a number": (["--lr", "0.5"], {"lr": 0.5}),
    "a number or none": (["--steps", "3"], {"steps": 3}),
    "a flag": (["--fast"], {"fast": True}),
    "a word": (["--schedule", "step"], {"schedule": "step"}),
    "a path": (["--weights", "w.pt"], {"weights": Path("w.pt")}),
    "one pattern": (["--freeze", "a.*"], {"freeze": ("a.*",)}),
    "two patterns": (["--freeze", "a.*", "--freeze", "re:b"], {"freeze": ("a.*", "re:b")}),
    "two numbers": (["--milestones", "1", "--milestones", "2"], {"milestones": (1, 2)}),
    "overrides": (["--override", "a=keep", "--override", "b=k:0.5"], {"overrides": {"a": "keep", "b": {"k": 0.5}}}),
    "a word or a function": (["--operator", "linear"], {"operator": "linear"}),
    "a flag that is on, inside another dataclass": (["--no-annealed"], {"loss": Loss(annealed=False)}),
    "a number inside another dataclass": (["--smoothing", "0.1"], {"loss": Loss(smoothing=0.1)}),
}


@pytest.mark.parametrize(("words", "meant"), WORDS.values(), ids=WORDS)
def test_words_become_values_of_the_declared_types(call, words, meant):
    assert call(*words)["training"] == Training(**meant)


def test_two_dataclasses_share_an_option_of_one_name(call):
    received = call("--seed", "5")
    assert (received["training"].seed, received["source"].seed) == (5, 5)


def test_an_invalid_value_is_the_error_of_the_dataclass(call):
    with pytest.raises(UsageError, match=r"lr: got -1\.0, expected a number above 0"):
        call("--lr", "-1")


def test_what_has_no_place_at_the_terminal_is_not_there():
    def command(training: Training) -> None: ...

    result = CliRunner().invoke(command_of(command), ["--hidden", "3"])
    assert result.exit_code == 2


def test_help_says_what_the_declaration_says():
    def command(source: Source, training: Training) -> None: ...

    parameters = {p.name: p for p in typer.main.get_command(command_of(command)).params}
    assert parameters["lr"].help == r"Peak rate \[per step]. Usual: 1e-4 to 1e-3."
    assert parameters["steps"].help == "Number of steps; with --lr."
    assert parameters["seed"].help == "Random seed of the weights.", "the first of two declarations"
    assert parameters["schedule"].metavar == "NAME"
    assert parameters["lr"].rich_help_panel == RATES
    assert parameters["weights"].rich_help_panel == PLACES
    assert parameters["overrides"].opts == ["--override"]
    assert (parameters["annealed"].opts, parameters["annealed"].secondary_opts) == (["--annealed"], ["--no-annealed"])
    assert (parameters["fast"].opts, parameters["fast"].secondary_opts) == (["--fast"], [])
    assert CliRunner().invoke(command_of(command), ["--help"], env={"COLUMNS": "200"}).output.count("[per step]") == 1


def test_options_come_in_the_order_of_their_declaration():
    def command(training: Training, source: Source) -> None: ...

    names = [p.name for p in typer.main.get_command(command_of(command)).params if p.name != "help"]
    declared = [name for cls in (Training, Loss, Source) for name in options_of(cls)]
    assert names == list(dict.fromkeys(name for name in declared if name != "hidden"))


def test_a_command_may_take_some_fields_of_a_dataclass():
    received = {}

    def command(
        training: Annotated[Training, Fields(only=("lr", "smoothing"), panel="Mine")],
        source: Annotated[Source, Fields(without=("seed",))],
    ) -> None:
        received.update(training=training, source=source)

    app = command_of(command)
    parameters = {p.name: p for p in typer.main.get_command(app).params if p.name != "help"}
    assert parameters.keys() == {"lr", "smoothing", "name"}
    assert parameters["lr"].rich_help_panel == "Mine"
    assert CliRunner().invoke(app, ["--lr", "0.5", "--smoothing", "0.25", "--name", "x"]).exit_code == 0
    assert received == {"training": Training(lr=0.5, loss=Loss(smoothing=0.25)), "source": Source(name="x")}


def test_a_command_may_take_the_values_alone():
    received = {}

    def command(source: Annotated[dict[str, Any], Fields(of=Training, only=("lr", "freeze"))]) -> None:
        received.update(source=source)

    assert CliRunner().invoke(command_of(command), ["--lr", "-1", "--freeze", "a"]).exit_code == 0
    assert received["source"] == {"lr": -1.0, "freeze": ("a",)}, "unchecked"


def test_values_can_be_prepared_before_anything_is_made_of_them():
    received = {}

    def command(context: typer.Context, source: Source) -> None:
        received.update(source=source, obj=context.obj)

    def prepare(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
        context.obj = dict(values)
        return {**values, "name": "prepared"}

    assert CliRunner().invoke(command_of(command, prepare=prepare), ["--seed", "3"]).exit_code == 0
    assert received == {"source": Source(3, "prepared"), "obj": {"seed": 3, "name": "net"}}


# ------------------------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("layer1.*=keep", ("layer1.*", "keep")),
        (
            "layer1.*=operator:sigmoid, k:0.7 ,rescale:always",
            ("layer1.*", {"operator": "sigmoid", "k": 0.7, "rescale": "always"}),
        ),
        ("re:layer1(?=.0).*=keep", ("re:layer1(?=.0).*", "keep")),
    ],
)
def test_an_override_is_a_pattern_and_what_holds_for_it(text, pair):
    assert parse_override(text) == pair


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer1.*", "got 'layer1.*', expected PATTERN=keep or PATTERN=operator:linear,k:0.3"),
        ("=keep", "got '=keep', expected PATTERN=keep"),
        ("fc=linear", "got 'linear' in 'fc=linear', expected key:value, such as operator:linear"),
        ("fc=k:big", "k: got 'big', expected a number"),
    ],
)
def test_an_override_of_another_form_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        parse_override(text)
    assert str(caught.value).startswith(f"--override: {message}")


# ------------------------------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("batch_size", None, "--batch-size"),
        ("head", "keep", "--head keep"),
        ("freeze", "layer1.*", "--freeze 'layer1.*'"),
        ("lr", 0.5, "--lr 0.5"),
        ("include", ["a", "b.*"], "--include a --include 'b.*'"),
        ("fast", True, "--fast"),
        ("fast", False, "no --fast"),
        ("annealed", True, "--annealed"),
        ("annealed", False, "--no-annealed"),
        ("overrides", None, "--override"),
        ("overrides", {"a": "keep", "b": {"k": 1, "operator": "sigmoid"}},
         "--override a=keep --override b=k:1,operator:sigmoid"),
        ("loss", None, "--accuracy-loss"),
    ],
)  # fmt: skip
def test_a_reference_to_an_option_is_written_as_it_is_typed(name, value, typed):
    spelling = Spelling({"loss": "--accuracy-loss"})
    for cls in (Training, Loss):
        for declared in dataclasses.fields(cls):
            if declared.name in options_of(cls):
                spelling.learn(declared.name, declared.default, options_of(cls)[declared.name])
    assert UsageError(option(name, value)).spelled(spelling) == typed


def test_a_flag_with_a_name_of_its_own_for_off():
    spelling = Spelling()
    spelling.learn("folded", True, Option("Fold.", command_line="--fold/--no-fold"))
    assert (spelling("folded"), spelling("folded", "False")) == ("--fold", "--no-fold")
