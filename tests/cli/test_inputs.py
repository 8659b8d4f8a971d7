"""Inputs on the command line: their shapes, files of tensors, image sizes, and what the plan says of them."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sphereify import load
from sphereify.convert.input_options import parse_inputs
from tests.cli.words import TINY, one_line


@pytest.fixture
def weighted(folder):
    """A network of which only weights, an optional argument, lead to one of its layers."""
    (folder / "weighted.py").write_text(
        textwrap.dedent("""
            from torch import nn

            class Weighted(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed = nn.Embedding(20, 6)
                    self.plain, self.weighted, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

                def forward(self, tokens, weights=None):
                    x = self.embed(tokens)
                    x = self.plain(x) if weights is None else self.weighted(x * weights[..., None])
                    return self.fc(x.relu().mean(1))

            def make():
                return Weighted()

            class Patches(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.fc = nn.Linear(16, 6), nn.Linear(6, 3)

                def forward(self, x):
                    b, c, h, w = x.shape
                    x = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 16 * c)
                    return self.fc(self.embed(x).mean(1))

            def patches():
                return Patches()
        """)
    )
    return "weighted.py:make"


SHAPES = ["--input", "tokens=int64:4x5", "--input", "weights=float32:4x5"]


def called(out):
    return {d["name"]: d["called"] for d in json.loads(out)["decisions"]}


@pytest.mark.parametrize("verify", [[], ["--verify"]])
@pytest.mark.parametrize("given", [SHAPES, ["--input", "int64:4x5", "--input", "float32:4x5"], ["--input", "file"]])
def test_inspect_runs_the_model_on_the_inputs(run, weighted, given, verify):
    if given[-1] == "file":
        tensors = {"tokens": torch.randint(0, 20, (4, 5)), "weights": torch.rand(4, 5)}
        save_file(tensors, "batch.safetensors")
        given = ["--input", "batch.safetensors"]
    code, out, err = run("inspect", weighted, *given, *verify, "--json")
    assert (code, err) == (0, "")
    assert called(out) == {"embed": True, "weighted": True, "fc": True, "plain": False}
    assert json.loads(out)["inputs"].count("int64 4×5") == 1


def test_convert_and_export_take_the_inputs(run, weighted):
    assert run("convert", weighted, *SHAPES, "-o", "out")[0] == 0
    factory = ["--factory", weighted]
    assert {d.name for d in load("out", factory=_factory()).conversion_plan.converted} == {"weighted", "fc"}
    code, out, err = run("export", "out", *SHAPES, *factory, "-o", "out.pt2", "--format", "torch-export")
    assert (code, err) == (0, "")
    assert "checked with torch on a random input of 5×5, 5×5" in out
    program = torch.export.load("out.pt2").module()
    model = load("out", factory=_factory()).eval()
    given = {"tokens": torch.randint(0, 20, (3, 5)), "weights": torch.rand(3, 5)}
    torch.testing.assert_close(program(**given), model(**given), rtol=1e-4, atol=1e-5)


def _factory():
    scope: dict = {}
    exec(Path("weighted.py").read_text(), scope)
    return scope["make"]


def test_the_size_of_images_may_be_given(run, weighted):
    code, out, _ = run("inspect", TINY, "--img-size", 96, "--json")
    assert code == 0
    assert json.loads(out)["inputs"] == "float32 2×3×96×96"
    code, out, _ = run("inspect", "weighted.py:patches", "--img-size", 20, "--json")
    assert json.loads(out)["inputs"] == "float32 2×1×20×20"  # a linear map of 16 pixels of one channel
    code, _, err = run("inspect", weighted, "--img-size", 96)
    assert code == 2
    assert "--img-size: Weighted does not seem to take images; give --input instead" in one_line(err)
    code, _, err = run("inspect", "vit_tiny_patch16_224", "--img-size", 96)
    assert code == 2
    assert "--img-size: VisionTransformer does not run with these inputs: AssertionError: Input height" in one_line(err)


def test_the_inputs_are_said_below_the_table(run, weighted):
    _, out, _ = run("inspect", weighted)
    assert "run on assumed inputs: int64 2×16" in out
    _, out, _ = run("inspect", weighted, *SHAPES)
    assert "run on tokens int64 4×5, weights float32 4×5" in out


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (["float99:2x3"], ["--input: type of numbers in 'float99:2x3': got 'float99'", "Did you mean 'float"]),
        (["tokens"], ["--input: got 'tokens', expected NAME=DTYPE:SHAPE such as input_ids=int64:2x16"]),
        (["x=float32:2x0"], ["--input: got 'x=float32:2x0', expected"]),
        (["none.safetensors"], ["--input: there is no file none.safetensors"]),
        (["weighted.py"], ["--input: weighted.py is no safetensors file"]),
        (["a=int64:2", "a=int64:3"], ["--input: got 'a' twice"]),
        (["word=int64:2x5"], ["--input: Weighted does not run with these inputs", "got word int64 2×5"]),
    ],
)
def test_inputs_that_do_not_fit_are_named_by_the_option(run, weighted, given, fragments):
    code, out, err = run("inspect", weighted, *(word for one in given for word in ("--input", one)))
    assert code in (1, 2)
    assert out == ""
    assert "Traceback" not in err
    for fragment in fragments:
        assert fragment in one_line(err)


def test_both_a_shape_and_a_size_are_too_many(run):
    code, _, err = run("inspect", TINY, "--input", "float32:2x3x32x32", "--img-size", 32)
    assert code == 2
    assert "--input and --img-size: got both" in one_line(err)


def test_a_file_whose_names_are_numbers_holds_positional_arguments(folder):
    tensors = {str(i): torch.full((i + 1,), float(i)) for i in range(11)}
    save_file({**tensors, "scale": torch.ones(1)}, "batch.safetensors")
    arguments = parse_inputs(("batch.safetensors",))
    assert [len(tensor) for tensor in arguments.args] == list(range(1, 12))
    assert list(arguments.kwargs) == ["scale"]


def test_verbose_prints_what_the_notes_count(run, weighted):
    Path("weighted.py").write_text(
        Path("weighted.py").read_text().replace("x = self.embed", "assert tokens.sum() >= 0; x = self.embed")
    )
    _, out, _ = run("inspect", weighted)
    assert "note: Weighted: not traced (" in out
    assert "--verbose prints the details" in out
    _, verbose, _ = run("inspect", weighted, "--verbose")
    assert verbose.count("Weighted: not traced (") == 2
