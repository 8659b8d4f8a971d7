"""What `import sphereify` promises: its names, its version, and that it costs nothing."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sphereify
from sphereify.errors import Interrupted

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "timm", "safetensors", "sklearn", "typer", "rich", "matplotlib", "PIL", "numpy"}

# design.md's public contract, as far as it exists. The margin losses and the hyperspherical energy come later.
PUBLIC = {
    "sphereify": "sphereify plan_conversion apply_plan load save param_groups ConversionPlan Decision calibrate fold",
    "sphereify.nn": (
        "LinearOperator CosineOperator SigmoidOperator LearnableSigmoidOperator "
        "SphereConv1d SphereConv2d SphereConv3d SphereLinear AngularHead"
    ),
    "sphereify.nn.functional": "sphere_conv1d sphere_conv2d sphere_conv3d sphere_linear",
    "sphereify.training": "finetune Settings Epoch accuracy",
}


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*(sys.modules.keys() & {HEAVY!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_importing_the_package_loads_no_other():
    assert loaded_after("import sphereify; dir(sphereify); sphereify.__version__; sphereify.__all__") == set()


def test_help_loads_nothing_but_the_terminal():
    code = "sys.argv[1:] = ['convert', '--help']\nfrom sphereify.cli import main\ntry: main()\nexcept SystemExit: 0"
    loaded = loaded_after(code)
    assert "typer" in loaded
    assert loaded <= {"typer", "rich"}


def test_the_layers_need_nothing_but_torch():
    assert loaded_after("import sphereify.nn") <= {"torch", "numpy"}


def test_converting_needs_no_terminal_and_no_timm():
    code = (
        "from torch import nn; from sphereify import sphereify\n"
        "sphereify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))"
    )
    assert not loaded_after(code) & {"timm", "typer", "rich", "matplotlib", "sklearn"}


def test_parameter_groups_need_nothing_but_torch():
    assert loaded_after("from sphereify import param_groups") <= {"torch", "numpy"}


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
