"""What users install: the files in the sdist and the wheel, and the wheel at work in an environment of its own."""

import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests import release

pytestmark = pytest.mark.exhaustive

for package in ("build", "hatchling"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel."""
    return release.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    return release.Installed(built[1], tmp_path_factory.mktemp("environment"))


# ---- The files


def test_the_sdist_has_what_a_reader_needs_and_nothing_of_this_machine(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "Makefile"} <= names
    assert {
        "examples/demo.sh",
        "examples/cnn.py",
        "sphereify/nn/passes/kernels.cpp",
        "sphereify/nn/passes/curves.h",
        "tests/test_packaging.py",
    } <= names
    assert not [name for name in names if re.match(r"(data|demo|dist|\.venv|\.git/)", name) or name.endswith(".pyc")]


def test_the_wheel_has_the_package_with_its_kernels_its_mark_of_types_and_the_looks_of_the_report(built):
    root = release.ROOT
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    modules = {path.relative_to(root).as_posix() for path in (root / "sphereify").rglob("*.py")}
    others = {
        *(f"nn/passes/{name}" for name in ("kernels.cpp", "curves.h", "windows.h")),
        "py.typed",
        "report/report.css",
        "report/report.js",
    }
    assert modules | {f"sphereify/{other}" for other in others} == {name for name in names if ".dist-info/" not in name}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert len(metadata.get_all("Project-URL")) == 2
    for minor in (10, 11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in metadata.get_all("Classifier")


# ---- At work


def test_the_wheel_is_what_runs(installed, tmp_path):
    where = installed.run("python", "-c", "import sphereify; print(sphereify.__file__)", folder=tmp_path).strip()
    assert Path(where).is_relative_to(installed.packages)


def test_help_and_the_version_both_ways(installed, tmp_path):
    for command in (["sphereify"], ["python", "-m", "sphereify"]):
        assert "finetune" in installed.run(*command, "--help", folder=tmp_path)
        assert re.fullmatch(r"sphereify \d+\.\d+\.\d+\n", installed.run(*command, "--version", folder=tmp_path))


def test_a_network_is_converted_by_the_compiled_kernels_of_the_wheel(installed, tmp_path):
    printed = installed.run("sphereify", "convert", "test_resnet", folder=tmp_path)
    assert "15 convolutions converted, the head swapped for w-softmax" in printed
    code = """
        import sphereify, torch
        from sphereify.nn.passes import compiled
        model = sphereify.load("test_resnet-cosine")
        print(tuple(model(torch.randn(2, 3, 64, 64)).shape), compiled.state())
    """
    cache = {"SPHEREIFY_CACHE": str(tmp_path / "cache")}
    printed = installed.run("python", "-c", textwrap.dedent(code), folder=tmp_path, **cache)
    assert printed.startswith("(2, 1000) ")
    assert "fp32 on the CPU" in printed or "compiler" in printed


# ---- Typed

PROGRAM = '''
import torch
from torch import Tensor, nn

from sphereify import (
    AngularLoss, ConversionOptions, ConversionPlan, Decision, HypersphericalEnergy, Settings, apply_plan, load,
    plan_conversion, save, sphereify,
)
from sphereify.nn import SphereConv2d


def converted(model: nn.Module) -> nn.Module:
    """Plan, look at the plan, apply it."""
    plan: ConversionPlan = plan_conversion(model, operator="cosine", radius=2.0, overrides={"fc": "keep"})
    kept: list[Decision] = plan.kept
    share: float | None = plan.angular_share
    print([decision.name.upper() for decision in kept], share, plan.summary().strip())
    assert ConversionPlan.from_json(plan.to_json()) == plan
    return apply_plan(model, plan)


def loss_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    criterion = AngularLoss(model, label_smoothing=0.1)
    loss: Tensor = criterion(model(images), classes) + HypersphericalEnergy()(model)
    return loss


options = ConversionOptions(operator="sigmoid", k=0.4, exclude=["layer1.*"])
settings = Settings(epochs=3, lr=1e-3)
network = sphereify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), learn_radius=True, inplace=True)
layer = SphereConv2d(3, 8, 3, operator="linear")
features: Tensor = layer(torch.ones(1, 3, 8, 8))
save(network, "folder")
again: nn.Module = load("folder")
'''
WRONG = {
    'ConversionOptions(radius="two")': "arg-type",
    'Settings(epochs="3")': "arg-type",
    'sphereify(nn.ReLU(), radius="two")': "arg-type",
    "sphereify(nn.ReLU(), operatr='cosine')": "call-arg",
    "plan_conversion(nn.ReLU()).decisions[0].nam": "attr-defined",
    "save(nn.ReLU(), 3)": "arg-type",
}
"""Mistakes, and the code of mypy's error."""


def test_the_types_of_the_wheel_accept_a_program_and_refuse_mistakes(installed, tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    wrong = tmp_path / "wrong.py"
    program.write_text(PROGRAM)
    head = "from torch import nn\nfrom sphereify import ConversionOptions, Settings, plan_conversion, save, sphereify\n"
    wrong.write_text(head + "".join(f"{line}\n" for line in WRONG))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.python, program, wrong],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""},
    )  # fmt: skip
    errors = re.findall(r"^(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    expected = [("wrong", str(number), code) for number, code in enumerate(WRONG.values(), start=3)]
    assert errors == expected, done.stdout + done.stderr


# ---- Completion


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (
            "sphereify ",
            {"convert", "inspect", "suggest", "finetune", "evaluate", "compare", "predict", "export", "push", "doctor"},
        ),
        ("sphereify con", {"convert"}),
        ("sphereify convert resnet18 --oper", {"--operator"}),
        ("sphereify inspect resnet18 --al", {"--all"}),
    ],
)
def test_bash_completes_commands_and_options(installed, tmp_path, typed, offered):
    *before, last = typed.split(" ")
    script = f"""
        eval "$(_SPHEREIFY_COMPLETE=source_bash sphereify)"
        COMP_WORDS=({" ".join(before)} "{last}") COMP_CWORD={len(before)}
        _sphereify_completion sphereify
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    (tmp_path / "complete.sh").write_text(textwrap.dedent(script))
    done = subprocess.run(
        ["bash", "complete.sh"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PATH": f"{installed.bin}:/usr/bin:/bin"},
    )  # fmt: skip
    assert set(done.stdout.split()) == offered, done.stderr


# ---- Citation


def test_the_citation_names_the_software_and_both_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((release.ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= paper.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
    assert {paper["url"] for paper in citation["references"]} == {
        "https://arxiv.org/abs/1711.03189",
        "https://arxiv.org/abs/1805.09298",
    }


def test_the_release_check_names_what_disagrees(monkeypatch, tmp_path):
    assert release.version(tmp_path) == ""
    for file in ("pyproject.toml", "sphereify/__init__.py", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((release.ROOT / file).read_text())
    monkeypatch.setattr(release, "ROOT", tmp_path)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## 9.9.9 (unreleased)\n")
    assert "CHANGELOG.md: 9.9.9" in release.version(tmp_path)
    assert "expected '## VERSION (YYYY-MM-DD)'" in release.date(tmp_path)
    changelog.write_text("# Changelog\n\n## 9.9.9 (2031-02-03)\n")
    assert release.date(tmp_path) == ""
