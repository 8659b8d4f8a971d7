"""The promises of `import sphereify`: its names, its version, that it costs nothing, and how its messages speak."""

import ast
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import sphereify
from sphereify import errors
from sphereify.calibration.agreement import choose_radius
from sphereify.calibration.distillation import distill
from sphereify.errors import ArgumentTypeError, Interrupted, SphereifyError, SphereifyWarning, UsageError, option
from sphereify.report import measure_angles, write_report
from sphereify.training import Settings, accuracy, variants
from sphereify.training.embeddings import embeddings
from sphereify.training.robustness import robustness
from sphereify.training.verification import verification
from tests.training.small import CPU, images, net

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "timm", "safetensors", "sklearn", "typer", "rich", "matplotlib", "PIL", "numpy",
         "huggingface_hub"}  # fmt: skip

# The public contract: code outside of the package relies on these names.
PUBLIC = {
    "sphereify": (
        "sphereify plan_conversion apply_plan ConversionOptions ConversionPlan Decision calibrate suggest fold export "
        "load save finetune evaluate compare Settings AngularLoss HypersphericalEnergy OrthogonalityPenalty "
        "param_groups predict push_to_hub"
    ),
    "sphereify.nn": (
        "LinearOperator CosineOperator SigmoidOperator LearnableSigmoidOperator "
        "SphereConv1d SphereConv2d SphereConv3d SphereLinear AngularHead "
        "AngularLoss HypersphericalEnergy OrthogonalityPenalty"
    ),
    "sphereify.nn.functional": "sphere_conv1d sphere_conv2d sphere_conv3d sphere_linear",
    "sphereify.training": "finetune evaluate compare Settings Terms Epoch accuracy param_groups",
    "sphereify.models": "SourceOptions open_model",
}
COMMANDS = ["convert", "inspect", "suggest", "finetune", "evaluate", "compare", "predict", "export", "push"]


def modules_after(*steps: str) -> list[set[str]]:
    """The modules that a fresh interpreter has loaded after each step."""
    script = "\n".join(["import sys", *(f"{step}\nprint(*sys.modules, file=sys.stderr)" for step in steps)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stderr.splitlines()]


def loaded_after(*steps: str) -> list[set[str]]:
    """The heavy packages that a fresh interpreter has loaded after each step."""
    return [modules & HEAVY for modules in modules_after(*steps)]


def test_importing_the_package_loads_no_other():
    assert loaded_after("import sphereify; dir(sphereify); sphereify.__version__; sphereify.__all__") == [set()]


def test_options_need_no_torch():
    names = "ConversionOptions, Settings"
    assert loaded_after(f"from sphereify import {names}; from sphereify.models import SourceOptions") == [set()]


def test_help_loads_nothing_but_the_terminal():
    code = textwrap.dedent(f"""
        from sphereify.cli import main
        for command in {COMMANDS!r}:
            sys.argv[1:] = [command, "--help"]
            try:
                main()
            except SystemExit as end:
                assert not end.code
    """)
    (loaded,) = loaded_after(code)
    assert "typer" in loaded
    assert loaded <= {"typer", "rich"}


def test_layers_parameter_groups_and_conversions_load_what_they_need():
    torch_alone, layers, groups, conversion = modules_after(
        "import torch",
        "import sphereify.nn",
        "from sphereify import param_groups",
        "import sphereify; from torch import nn\n"
        "convolution = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()\n"
        "classifier = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)\n"
        "sphereify.sphereify(nn.Sequential(*convolution, *classifier))",
    )
    assert layers & HEAVY <= {"torch", "numpy"}
    assert "triton" not in layers - torch_alone
    assert groups & HEAVY <= {"torch", "numpy"}
    assert {"sphereify.nn.layers", "sphereify.training.optim"} <= groups
    assert not {module for module in groups if module.startswith("sphereify.convert")}
    assert not conversion & {"timm", "typer", "rich", "matplotlib", "sklearn"}


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in PUBLIC.items() for name in names.split()])
def test_public_names_are_there_and_listed(module, name):
    home = __import__(module, fromlist=[name])
    value = getattr(home, name)
    assert value.__doc__, f"{module}.{name} has no docstring"
    if hasattr(home, "__all__"):
        assert name in home.__all__


def test_all_lists_names_that_exist_once_each_in_order():
    assert len(set(sphereify.__all__)) == len(sphereify.__all__)
    assert sorted(sphereify.__all__) == sphereify.__all__
    for name in sphereify.__all__:
        assert getattr(sphereify, name) is not None


def test_a_star_import_brings_what_all_lists():
    names: dict = {}
    exec("from sphereify import *", names)
    assert set(sphereify.__all__) <= names.keys()


def test_a_name_is_the_same_object_wherever_it_is_taken_from():
    from sphereify.artifact import load
    from sphereify.convert import apply_plan
    from sphereify.training.optim import param_groups

    assert sphereify.load is load
    assert sphereify.apply_plan is apply_plan
    assert sphereify.param_groups is param_groups
    assert callable(sphereify.sphereify)


def test_dir_lists_the_public_names():
    listed = dir(sphereify)
    assert set(sphereify.__all__) <= set(listed)
    assert "__version__" in listed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sphereify' has no attribute 'spherify'"):
        sphereify.spherify  # noqa: B018
    assert not hasattr(sphereify, "nothing_of_the_kind")
    with pytest.raises(ImportError, match="cannot import name 'spherify'"):
        exec("from sphereify import spherify")


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text()
    project = text.partition("[project]")[2].partition("\n[")[0]
    assert re.search(r'^version = "(.*)"$', project, re.M).group(1) == sphereify.__version__


def test_the_changelog_speaks_of_this_version():
    assert re.search(rf"^##? .*{re.escape(sphereify.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_package_says_that_it_is_typed():
    assert (Path(sphereify.__file__).parent / "py.typed").is_file()


def test_an_interruption_comes_unchanged_from_another_process():
    error = pickle.loads(pickle.dumps(Interrupted("stopped by SIGTERM", 15)))
    assert (type(error), str(error), error.exit_code) == (Interrupted, "stopped by SIGTERM", 143)


# ------------------------------------------------------------------------------------------------- what is not a model


TAKES_A_MODEL = {
    "AngularLoss": lambda model, plain, path: sphereify.AngularLoss(model),
    "HypersphericalEnergy": lambda model, plain, path: sphereify.HypersphericalEnergy()(model),
    "OrthogonalityPenalty": lambda model, plain, path: sphereify.OrthogonalityPenalty()(model),
    "apply_plan": lambda model, plain, path: sphereify.apply_plan(model, sphereify.plan_conversion(plain)),
    "calibrate": lambda model, plain, path: sphereify.calibrate(model, plain, [torch.ones(2, 4)]),
    "calibrate: original": lambda model, plain, path: sphereify.calibrate(
        sphereify.sphereify(plain), model, [torch.ones(2, 4)]
    ),
    "choose_radius": lambda model, plain, path: choose_radius(model, []),
    "compare": lambda model, plain, path: sphereify.compare(model, images(), variants("cosine"), output=path),
    "compare: what it builds": lambda model, plain, path: sphereify.compare(
        lambda: model, images(), variants("cosine"), output=path
    ),
    "distill": lambda model, plain, path: distill(model, plain, [torch.ones(2, 4)], steps=1),
    "distill: original": lambda model, plain, path: distill(plain, model, [torch.ones(2, 4)], steps=1),
    "embeddings": lambda model, plain, path: embeddings(model, images().test, (2, 6, 6)),
    "accuracy": lambda model, plain, path: accuracy(model, []),
    "evaluate": lambda model, plain, path: sphereify.evaluate(model, images()),
    "export": lambda model, plain, path: sphereify.export(model, path / "model.pt2"),
    "finetune": lambda model, plain, path: sphereify.finetune(model, images()),
    "finetune: teacher": lambda model, plain, path: sphereify.finetune(net(), images(), Settings(**CPU), teacher=model),
    "fold": lambda model, plain, path: sphereify.fold(model),
    "measure_angles": lambda model, plain, path: measure_angles(model),
    "measure_angles: original": lambda model, plain, path: measure_angles(sphereify.sphereify(plain), model),
    "param_groups": lambda model, plain, path: sphereify.param_groups(model),
    "plan_conversion": lambda model, plain, path: sphereify.plan_conversion(model),
    "predict": lambda model, plain, path: sphereify.predict(model, __file__),
    "push_to_hub": lambda model, plain, path: sphereify.push_to_hub(model, "user/name"),
    "robustness": lambda model, plain, path: robustness(model, images()),
    "robustness: against": lambda model, plain, path: robustness(plain, images(), against=model),
    "save": lambda model, plain, path: sphereify.save(model, path),
    "sphereify": lambda model, plain, path: sphereify.sphereify(model),
    "sphereify: agreement": lambda model, plain, path: sphereify.sphereify(model, calibration=[], agreement=0.9),
    "suggest": lambda model, plain, path: sphereify.suggest(model, []),
    "verification": lambda model, plain, path: verification(model, images()),
    "verify": lambda model, plain, path: sphereify.plan_conversion(plain).verify(model),
    "write_report": lambda model, plain, path: write_report(model, path / "report.html"),
    "write_report: original": lambda model, plain, path: write_report(
        sphereify.plan_conversion(plain), path / "report.html", original=model
    ),
}


@pytest.mark.parametrize("call", TAKES_A_MODEL.values(), ids=TAKES_A_MODEL)
def test_what_is_no_model_is_a_type_error(call, tmp_path):
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ArgumentTypeError, match=r"^[\w()]+: got int, expected a "):
        call(5, plain, tmp_path)


def test_a_module_in_place_of_the_function_that_builds_one_is_a_type_error(tmp_path):
    expected = "build: got Linear, expected a function that returns the plain network"
    with pytest.raises(ArgumentTypeError, match=expected):
        sphereify.compare(nn.Linear(2, 2), images(), variants("cosine"), output=tmp_path)


# ------------------------------------------------------------------------------------------------------------- messages

AT_THE_TERMINAL = ("cli/", "tables.py")
"""What speaks to the person at the terminal alone, and so may name the options of the command line."""


def strings_of(file: Path) -> list[tuple[int, str]]:
    """The string constants of a file that are no docstrings, with their lines."""
    tree = ast.parse(file.read_text())
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, node.value) for node in constants if id(node) not in statements]


DECLARATIONS = {"convert/options.py", "calibration/options.py", "deployment/options.py"}
"""Files that declare options, each with its flag."""

SHELL_COMMANDS = ("pip install --upgrade", "--nproc-per-node", "finetune --resume")
"""Commands for a shell that messages may show, whoever reads them."""


def names_an_option(text: str) -> bool:
    for command in SHELL_COMMANDS:
        text = text.replace(command, "")
    return re.search(r"(?<![\w-])--[a-z]", text) is not None


def test_no_message_of_the_library_names_an_option_of_the_command_line():
    package = Path(sphereify.__file__).parent
    files = {file.relative_to(package).as_posix(): file for file in sorted(package.rglob("*.py"))}
    library = {name: file for name, file in files.items() if not name.startswith(AT_THE_TERMINAL)}
    assert {"artifact.py", "training/run.py", "sources.py"} <= library.keys()
    offending = [
        f"{name}:{line}: {text}"
        for name, file in library.items()
        if name not in DECLARATIONS
        for line, text in strings_of(file)
        if names_an_option(text)
    ]
    assert not offending


def test_errors_and_warnings_never_show_the_marks_of_their_references():
    error = UsageError(f"{option('lr')}: no effect on {option('head', 'keep')}")
    assert str(error) == "lr: no effect on head='keep'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(SphereifyWarning(f"give {option('factory')}")) == "give factory"
    for member in vars(errors).values():
        if inspect.isclass(member) and issubclass(member, SphereifyError) and member is not Interrupted:
            assert str(member(option("lr", 1))) == "lr=1"
