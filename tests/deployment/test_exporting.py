"""Files for other runtimes: they compute what the model does, for any batch size, or are not left behind."""

import copy
import functools
import math
import os
import re
from collections import Counter

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from sphereify import load, save, sphereify
from sphereify.choices import OPERATORS
from sphereify.deployment.exporting import export
from sphereify.deployment.formats import FORMATS, TorchExport
from sphereify.deployment.options import ExportOptions
from sphereify.errors import ArgumentTypeError, ExportError, UnsupportedModelError, UsageError
from sphereify.nn import SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from tests.convert.models import OwnWeight, Power, conv, images, plain
from tests.deployment.networks import assert_standard, scrambled, without
from tests.grids import grid


def network(operator):
    """Followed by a norm and not, depthwise, grouped, strided, 1×1, 'same' with an even window, linear, with a head."""
    layers = [
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding="same"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 2, groups=2, padding="same"), nn.ReLU(),
        nn.Conv2d(12, 18, 1), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(18, 6), nn.GELU(), nn.Linear(6, 5),
    ]  # fmt: skip
    torch.manual_seed(0)
    return scrambled(sphereify(nn.Sequential(*layers), operator=operator))


def run_onnx(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


def run_program(path, *inputs):
    return torch.export.load(path).module()(*inputs)


RUNTIMES = {"onnx": run_onnx, "torch-export": run_program}
SUFFIXES = {"onnx": "onnx", "torch-export": "pt2"}


@torch.no_grad()
def assert_same(output, model, *inputs):
    expected = model(*inputs)
    assert output.shape == expected.shape
    assert expected.abs().max() > 1e-3
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.export
@pytest.mark.parametrize("format", RUNTIMES)
@pytest.mark.parametrize("operator", [*OPERATORS, Power(2)], ids=str)
def test_every_operator_computes_the_same_elsewhere_at_another_batch_and_image_size(operator, format, tmp_path):
    model = network(operator)
    path = tmp_path / f"model.{SUFFIXES[format]}"
    written = export(model, path, images(size=16), format=format, dynamic_size=True)
    assert written.difference <= 1e-5
    for batch, size in ((1, 16), (5, 24)):
        x = images(batch=batch, size=size)
        assert_same(RUNTIMES[format](path, x), model, x)
    if format == "onnx":
        inputs = assert_standard(path).graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in inputs] == ["batch", 3, "height", "width"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


FORMS = {
    "image": (nn.Conv2d(3, 16, 3, stride=2, padding=1), 16),
    "patches": (nn.Conv2d(3, 12, 4, stride=4), 16),
    "dense": (nn.Conv2d(16, 16, 3, padding=1), 8),
    "dense, few filters": (nn.Conv2d(16, 3, 3, dilation=2), 8),
    "more filters": (nn.Conv2d(16, 24, 1), 8),
    "fewer filters": (nn.Conv2d(24, 16, 1), 8),
    "shortcut": (nn.Conv2d(16, 24, 1, stride=2), 8),
    "one position": (nn.Conv2d(24, 6, 1), 1),
    "depthwise": (nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16), 9),
    "depthwise, two filters a channel": (nn.Conv2d(8, 16, 3, groups=8), 8),
    "grouped": (nn.Conv2d(16, 24, 3, padding=1, groups=4), 8),
    "asymmetric": (nn.Conv2d(8, 8, (1, 7), padding=(0, 3)), 8),
    "even, same": (nn.Conv2d(8, 8, 2, padding="same"), 8),
}
"""Convolutions that differ in the form in which they are exported, with the size of their images."""


def exact(model, x):
    """The outputs of the model itself, not folded, in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


@pytest.mark.parametrize(
    ("form", "operator", "radius"),
    [
        ("dense", "cosine", 0.0),
        ("depthwise", "cosine", 2.0),
        *(pytest.param(form, "cosine", 0.0, marks=pytest.mark.export) for form in FORMS if form != "dense"),
        *(pytest.param(form, "linear", 2.0, marks=pytest.mark.export) for form in FORMS),
        *(pytest.param(form, "learnable-sigmoid", 0.0, marks=pytest.mark.export) for form in FORMS),
    ],
)
def test_every_form_of_a_convolution_is_exact_for_images_of_one_size(form, operator, radius, tmp_path):
    layer, size = FORMS[form]
    torch.manual_seed(0)
    wrapped = nn.Sequential(copy.deepcopy(layer), nn.BatchNorm2d(layer.out_channels), nn.Hardswish())
    model = scrambled(sphereify(wrapped, operator=operator, radius=radius, head="keep"))
    assert isinstance(model[0], SphereConv2d)
    x = torch.randn(5, layer.in_channels, size, size)
    x[0] = 0  # patches without an angle
    export(model, tmp_path / "m.onnx", x[:2])
    assert_standard(tmp_path / "m.onnx")
    for batch in (x, x[1:2]):
        expected = exact(model, batch)
        assert (run_onnx(tmp_path / "m.onnx", batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.export
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("operator", ["cosine", "sigmoid"])
def test_rows_are_normalized_by_one_operation_of_the_runtime(operator, opset, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 3))
    model = scrambled(sphereify(net, operator=operator, head="keep"))
    x = torch.randn(5, 7, 8)
    export(model, tmp_path / "m.onnx", x[:2], opset=opset)
    assert_standard(tmp_path / "m.onnx", opset)
    expected = exact(model, x)
    assert (run_onnx(tmp_path / "m.onnx", x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    name = "RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"
    assert as_run(tmp_path / "m.onnx")[name] == 2


def as_run(path):
    """How often ONNX Runtime uses each operator of the file when it has optimized it."""
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    settings.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node)


def test_the_runtime_fuses_activations_and_residuals_as_it_does_in_the_original(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = conv(16, 16), conv(16, 16), nn.Conv2d(16, 32, 1)
            self.last = nn.Conv2d(32, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

        def forward(self, x):
            y = self.norms[0](self.first(x)).relu()
            y = (self.norms[1](self.second(y)) + y).relu()
            return self.last(self.third(y).relu())

    torch.manual_seed(0)
    model = scrambled(sphereify(Block(), head="keep"))
    x = torch.randn(2, 16, 8, 8)
    export(model, tmp_path / "m.onnx", x)
    assert_same(run_onnx(tmp_path / "m.onnx", x), model, x)
    operators = as_run(tmp_path / "m.onnx")
    if "ReorderInput" not in operators:
        pytest.skip("this processor has no layout of its own in ONNX Runtime")
    assert operators["Relu"] == 0
    assert operators["Add"] == 3  # those of ε, to one channel of each angular layer


@pytest.mark.export
def test_arcsin_of_zero_is_zero_and_of_a_rounded_one_a_number(tmp_path):
    torch.manual_seed(0)
    layer = nn.Sequential(SphereLinear(4, 6, bias=False, operator="linear")).eval()
    x = torch.cat([torch.zeros(1, 4), 1e4 * layer[0].weight.detach(), -1e4 * layer[0].weight.detach()])
    export(layer, tmp_path / "m.onnx", x)
    outputs = run_onnx(tmp_path / "m.onnx", x)
    assert torch.equal(outputs[0], layer(x[:1]).detach()[0])
    torch.testing.assert_close(outputs, layer(x).detach(), atol=1e-3, rtol=0)  # near ±1 the slope has no bound


@pytest.mark.export
def test_a_gelu_is_one_operation_of_the_runtime(tmp_path):
    torch.manual_seed(0)
    model = scrambled(sphereify(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3)), head="keep"))
    x = torch.randn(5, 8)
    export(model, tmp_path / "m.onnx", x)
    assert_same(run_onnx(tmp_path / "m.onnx", x), model, x)
    operators = as_run(tmp_path / "m.onnx")
    assert "Erf" not in operators


@pytest.mark.export
def test_what_does_not_depend_on_the_input_is_computed_before(tmp_path):
    model = network("learnable-sigmoid")
    for folded in (True, False):
        operators = export(model, tmp_path / "m.onnx", images(size=16), folded=folded).operators
        assert not {"CastLike", "Cast", "Expand", "Identity"} & set(operators)


def pooled(learn):
    """A network in which every convolution has a radius, one of them in a functional call."""
    torch.manual_seed(0)
    options = {"operator": "linear", "radius": 2.0, "learn_radius": learn, "example_inputs": images(size=16)}
    return scrambled(sphereify(OwnWeight(), **options))


@pytest.mark.export
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("format", RUNTIMES)
@pytest.mark.parametrize("folded", [True, False])
def test_a_radius_pools_elsewhere_at_another_batch_and_image_size(folded, format, learn, tmp_path):
    model = pooled(learn)
    path = tmp_path / f"model.{SUFFIXES[format]}"
    export(model, path, images(size=16), format=format, dynamic_size=True, folded=folded)
    for batch, size in ((1, 16), (5, 24)):
        x = images(batch=batch, size=size)
        assert_same(RUNTIMES[format](path, x), model, x)
        # Each sample has a pool of its own, there too.
        alone = RUNTIMES[format](path, x[:1])
        torch.testing.assert_close(RUNTIMES[format](path, x)[:1], alone, rtol=1e-4, atol=1e-5)
    if format == "onnx":
        assert_standard(path)


REAL = {
    "resnet18": ("cosine", 64, True, {}),
    "mobilenetv3_small_050": ("linear", 64, True, {}),
    "vit_tiny_patch16_224": ("sigmoid", 32, False, {"img_size": 32, "depth": 3}),
    "convnext_atto": ("learnable-sigmoid", 64, True, {"depths": (1, 1, 2, 1)}),
}
"""Operator, image size, whether any size will do, and what makes it smaller: an export takes seconds a block."""


@pytest.mark.export
@pytest.mark.parametrize("name", REAL)
def test_a_real_model_computes_the_same_in_onnxruntime(name, tmp_path):
    operator, size, any_size, smaller = REAL[name]
    torch.manual_seed(0)
    model = scrambled(sphereify(timm.create_model(name, num_classes=10, **smaller), operator=operator))
    export(model, tmp_path / "m.onnx", torch.randn(2, 3, size, size), dynamic_size=any_size)
    x = torch.randn(3, 3, size + 32 * any_size, size)
    assert_same(run_onnx(tmp_path / "m.onnx", x), model, x)
    assert_standard(tmp_path / "m.onnx")


@pytest.mark.export
def test_a_real_model_computes_the_same_as_an_exported_program(tmp_path):
    model = scrambled(sphereify(timm.create_model("resnet18"), operator="sigmoid"))
    export(model, tmp_path / "m.pt2", torch.randn(2, 3, 64, 64), format="torch-export", dynamic_size=True)
    x = torch.randn(3, 3, 96, 64)
    assert_same(run_program(tmp_path / "m.pt2", x), model, x)


@pytest.mark.export
@pytest.mark.parametrize("format", RUNTIMES)
def test_a_model_that_is_not_folded_exports_too(format, tmp_path):
    model = network("linear")
    path = tmp_path / f"model.{SUFFIXES[format]}"
    kept = export(model, path, images(size=16), format=format, folded=False)
    folded = export(model, path, images(size=16), format=format)
    batch_norms = {"onnx": "BatchNormalization", "torch-export": "aten.batch_norm.default"}
    assert kept.operators.get(batch_norms[format]) == 2
    assert batch_norms[format] not in folded.operators
    x = images(size=16, batch=3)
    assert_same(RUNTIMES[format](path, x), model, x)


@pytest.mark.export
@pytest.mark.parametrize("layer", [SphereConv1d(3, 4, 3), SphereConv3d(3, 4, 3)], ids=["1d", "3d"])
def test_convolutions_of_other_dimensions_export(layer, tmp_path):
    dims = layer.weight.dim() - 2
    model = scrambled(nn.Sequential(layer, nn.ReLU()))
    export(model, tmp_path / "m.onnx", torch.randn(2, 3, *[8] * dims), dynamic_size=True)
    x = torch.randn(3, 3, *[9] * dims)
    assert_same(run_onnx(tmp_path / "m.onnx", x), model, x)


@pytest.mark.export
@pytest.mark.parametrize("format", RUNTIMES)
def test_functional_calls_and_computed_weights_export(format, tmp_path):
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=2)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), conv(4, 4), nn.ReLU())
    for plain_model, size in ((beit, 224), (normed, 16)):
        model = scrambled(sphereify(plain_model, operator="linear"))
        path = tmp_path / f"model.{SUFFIXES[format]}"
        export(model, path, torch.randn(2, 3, size, size), format=format)
        x = torch.randn(1, 3, size, size)
        assert_same(RUNTIMES[format](path, x), model, x)


@pytest.mark.export
def test_two_inputs_share_the_batch(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = SphereConv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, left, right):
            return self.fc((self.a(left) * self.a(right)).mean((2, 3)))

    model = Pair().eval()
    export(model, tmp_path / "m.onnx", (images(), images(seed=2)))
    x = (images(batch=4, seed=3), images(batch=4, seed=4))
    assert_same(run_onnx(tmp_path / "m.onnx", *x), model, *x)


@pytest.mark.export
def test_a_fixed_batch_and_a_higher_opset(tmp_path):
    model = sphereify(plain()).eval()
    written = export(model, tmp_path / "m.onnx", images(batch=1), batch_size=1, opset=20)
    assert written.opset == 20
    shape = assert_standard(tmp_path / "m.onnx", 20).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape] == [1, 3, 8, 8]


def test_the_images_have_the_size_that_is_asked_for_and_the_batch_is_fixed(tmp_path):
    written = export(sphereify(plain()), tmp_path / "m.pt2", format="torch-export", img_size=12, batch_size=3)
    assert written.note == "checked with torch on a random input of 3×3×12×12"


@pytest.mark.export
def test_the_images_of_a_loaded_model_have_the_size_that_it_was_trained_on(tmp_path):
    save(sphereify(plain()), tmp_path / "artifact", training={"image_size": [3, 20, 24]})
    model = load(tmp_path / "artifact", factory=plain)
    written = export(model, tmp_path / "m.pt2", format="torch-export", folded=False)
    assert written.note == "checked with torch on a random input of 3×3×20×24"


@pytest.mark.parametrize(("format", "other"), [("onnx", "torch-export"), ("torch-export", "onnx")])
def test_a_name_of_the_other_format_is_refused(format, other, tmp_path):
    with pytest.raises(UsageError, match=f"is the name of a file for format='{other}', and the format is {format}"):
        export(sphereify(plain()), tmp_path / f"m.{SUFFIXES[other]}", format=format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "suffix"), [("onnx", ".onnx"), ("torch_export", ".pt2")])
def test_each_format_has_its_suffix(format, suffix):
    assert ExportOptions(format).suffix == suffix


def test_a_model_that_runs_on_no_usual_input_needs_examples(tmp_path):
    model = sphereify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    with pytest.raises(UsageError, match=r"Sequential does not run on .*; give img_size or example_inputs"):
        export(model, tmp_path / "m.pt2", format="torch-export")


def test_the_model_is_not_touched(tmp_path):
    model = sphereify(plain()).train()
    export(model, tmp_path / "m.pt2", images(), format="torch-export")
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ what is refused


class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = SphereConv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


@functools.cache
def refused_models():
    """A convolutional network and a small ViT. Look, don't touch."""
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, img_size=32)
    return sphereify(plain()).eval(), sphereify(vit)


def refusals(tmp_path):
    model, vit = refused_models()
    (tmp_path / "folder.onnx").mkdir()
    file = tmp_path / "m.onnx"
    torch_opset = {"format": "torch-export", "opset": 18}
    return {
        "unknown format": (model, file, images(), {"format": "onxx"}, UsageError, "Did you mean 'onnx'"),
        "low opset": (model, file, images(), {"opset": 17}, UsageError, "opset: got 17, expected a number"),
        "high opset": (model, file, images(), {"opset": 999}, UsageError, "opset: got 999, expected at most"),
        "folder": (model, tmp_path / "folder.onnx", images(), {}, UsageError, "is a folder"),
        "no folder": (model, tmp_path / "nowhere/m.onnx", images(), {}, UsageError, "there is no folder"),
        "plain model": (plain(), file, images(), {}, UsageError, "nothing in Sequential is angular"),
        "fixed size": (vit, file, None, {"dynamic_size": True}, ExportError, "leave out dynamic_size"),
        "values": (Deciding(), file, images(), {}, ExportError, "cannot be traced by torch.export"),
        "inputs": (model, file, "images", {}, ArgumentTypeError, "example_inputs: got str, expected a tensor"),
        "no batch": (model, file, torch.tensor(1.0), {}, UsageError, "expected the batch in dimension 0"),
        "no model": ("resnet18", file, images(), {}, ArgumentTypeError, "got str, expected a torch.nn.Module"),
        "size twice": (model, file, images(), {"img_size": 16}, UsageError, "img_size: has no effect with"),
        "other batch": (model, file, images(), {"batch_size": 3}, UsageError, "batch_size: got 3, expected that of"),
        "no such opset": (model, file, images(), torch_opset, UsageError, "opset: has no effect on format="),
        "wrapped": (nn.DataParallel(model), file, images(), {}, UnsupportedModelError, "DataParallel"),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "unknown format", "low opset", "high opset", "folder", "no folder", "plain model", "fixed size", "values", "inputs",
    "wrapped", "no batch", "no model", "size twice", "other batch", "no such opset",
])  # fmt: skip
def test_what_cannot_be_done_is_said_and_leaves_no_file(case, tmp_path):
    model, path, inputs, options, error, text = refusals(tmp_path)[case]
    with pytest.raises(error, match=re.escape(text)):
        export(model, path, inputs, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.onnx"]


def test_a_model_that_is_random_in_evaluation_is_refused_with_that_reason(tmp_path):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(nn.functional.dropout(self.layer(x), 0.5, training=True))

    with pytest.raises(ExportError, match="differ from pass to pass, since it is random in evaluation"):
        export(sphereify(Random()).eval(), tmp_path / "m.pt2", torch.randn(4, 6), format="torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, factor):
    path = tmp_path / "m.pt2"
    path.write_text("what was there before")
    wrong = TorchExport()
    wrong.run = lambda path, inputs: [run_program(path, *inputs.args) * factor]
    monkeypatch.setitem(FORMATS, "torch-export", wrong)
    with pytest.raises(ExportError, match="computes something else than the model"):
        export(sphereify(plain()), path, images(), format="torch-export")
    assert path.read_text() == "what was there before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_missing_packages_are_named_with_what_installs_them(tmp_path, monkeypatch):
    without(monkeypatch, "onnx", "onnxscript")
    with pytest.raises(UsageError, match=re.escape("onnx and onnxscript must be installed to write it: pip install")):
        export(sphereify(plain()), tmp_path / "m.onnx", images())


def test_without_onnxruntime_it_says_that_nothing_was_checked(tmp_path, monkeypatch):
    without(monkeypatch, "onnxruntime")
    written = export(sphereify(plain()), tmp_path / "m.onnx", images())
    assert written.difference is None
    assert written.note == "not checked: onnxruntime is not installed"
    assert (tmp_path / "m.onnx").is_file()


@pytest.mark.parametrize(
    ("operator", "folded"),
    [
        ("linear", True),
        *(
            pytest.param(*case, marks=pytest.mark.export)
            for case in [("linear", False), ("cosine", True), ("cosine", False)]
        ),
    ],
)
def test_black_images_are_no_division_by_zero(tmp_path, operator, folded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model = sphereify(net, operator=operator, eps=1e-9).eval()
    x = torch.randn(2, 3, 4, 4)
    export(model, tmp_path / "net.onnx", x, folded=folded)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for image in (x * 0, x.clone().index_fill_(3, torch.tensor([0, 1, 2]), 0)):
        (got,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(image), rtol=1e-4, atol=1e-5)


def normalized_by_itself(norm):
    """Of zeros it makes rounding errors, which each normalization by its own spread enlarges."""
    torch.manual_seed(0)
    blocks = [layer for c in (3, 8, 8) for layer in (nn.Conv2d(c, 8, 3, padding=1), norm(8), nn.ReLU())]
    return sphereify(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))).eval()


@pytest.mark.parametrize("norm", grid([nn.InstanceNorm2d, nn.BatchNorm2d], lambda norm: norm is nn.InstanceNorm2d))
def test_where_rounding_decides_the_outputs_for_zeros_they_are_no_test(tmp_path, norm):
    model = normalized_by_itself(norm)
    x = images()
    nearly = 1e-6 * images(seed=5)
    assert (model(nearly) - model(x * 0)).abs().max() > 1e-3 * model(x * 0).abs().max()  # so is the model itself
    written = export(model, tmp_path / "m.onnx", x)
    assert_same(run_onnx(tmp_path / "m.onnx", x), model, x)
    assert written.note.startswith("checked with onnxruntime on a random input of 3×3×8×8")


@pytest.mark.parametrize(("norm", "zeros"), [(nn.InstanceNorm2d, math.nan), (nn.Identity, 1.0)])
def test_outputs_for_zeros_that_are_not_finite_or_not_rounding_are_refused(tmp_path, monkeypatch, norm, zeros):
    wrong = TorchExport()
    wrong.run = lambda path, inputs: [run_program(path, *inputs.args) + (0 if inputs.first.any() else zeros)]
    monkeypatch.setitem(FORMATS, "torch-export", wrong)
    with pytest.raises(ExportError, match="computes something else than the model: on zeros"):
        export(normalized_by_itself(norm), tmp_path / "m.pt2", images(), format="torch-export")


def test_a_batch_of_one_is_enough_to_export_for_any_batch(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    export(sphereify(net), tmp_path / "net.pt2", torch.randn(1, 3, 4, 4), format="torch-export")
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.randn(5, 3, 4, 4)).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_its_own_precision(tmp_path, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    output = export(sphereify(net), tmp_path / "net.pt2", torch.randn(2, 3, 4, 4).to(dtype), format="torch-export")
    assert output.difference < 0.1


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(UsageError, match="no regular file"):
        export(sphereify(net), tmp_path / "pipe", torch.randn(1, 3, 4, 4))


def test_a_long_name_is_no_obstacle(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    path = tmp_path / ("n" * 250 + ".pt2")
    export(sphereify(net), path, torch.randn(2, 3, 4, 4), format="torch-export")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


class ByKeyword(nn.Module):
    """Takes what it looks at after optional arguments, some by keyword alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, first=None, x=None, other=None, *, scale=None):
        return self.fc(x) * scale


@pytest.mark.parametrize("format", ["torch-export", pytest.param("onnx", marks=pytest.mark.export)])
def test_inputs_by_keyword_are_exported_in_the_order_of_the_signature(format, tmp_path):
    torch.manual_seed(0)
    given = {"scale": torch.rand(3, 1), "x": torch.randn(3, 4)}
    model = sphereify(ByKeyword(), example_inputs=given).eval()
    path = tmp_path / f"model.{SUFFIXES[format]}"
    assert export(model, path, given, format=format).difference <= 1e-5
    new = {"x": torch.randn(5, 4), "scale": torch.rand(5, 1)}
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        assert [slot.name for slot in session.get_inputs()] == ["x", "scale"]
        output = torch.from_numpy(session.run(None, {name: one.numpy() for name, one in new.items()})[0])
    else:
        output = torch.export.load(path).module()(**new)
    torch.testing.assert_close(output, model(**new), rtol=1e-4, atol=1e-5)


def test_shapes_without_values_are_enough_to_export(tmp_path):
    model = network("cosine")
    written = export(model, tmp_path / "model.pt2", torch.empty(2, 3, 16, 16, device="meta"), format="torch-export")
    assert written.difference <= 1e-5


# ---------------------------------------------------------------------------------------------- files beside the file


@pytest.fixture
def with_large_weights(monkeypatch):
    monkeypatch.setattr("sphereify.deployment.formats.LARGEST_ONNX", 1000)


def broad():
    torch.manual_seed(0)
    return sphereify(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 30))).eval()


def test_large_weights_lie_in_a_second_file_that_is_named_counted_and_found(tmp_path, with_large_weights):
    model, x = broad(), torch.randn(2, 3, 4, 4)
    written = export(model, tmp_path / "m.onnx", x)
    files = {"m.onnx", "m.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert written.companions == (tmp_path / "m.onnx.data",)
    assert written.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert (tmp_path / "m.onnx.data").stat().st_size > 64 * 30 * 4
    assert_same(run_onnx(tmp_path / "m.onnx", x), model, x)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in files:
        (tmp_path / name).rename(moved / name)
    assert_same(run_onnx(moved / "m.onnx", x), model, x)


@pytest.mark.export
def test_what_belongs_to_an_old_file_goes_with_it(tmp_path, monkeypatch):
    x = torch.randn(2, 3, 4, 4)
    with monkeypatch.context() as patch:
        patch.setattr("sphereify.deployment.formats.LARGEST_ONNX", 1000)
        export(broad(), tmp_path / "m.onnx", x)
    written = export(broad(), tmp_path / "m.onnx", x)
    assert written.companions == ()
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.export
def test_a_failed_export_leaves_all_files_as_they_were(tmp_path, monkeypatch, with_large_weights):
    model, x = broad(), torch.randn(2, 3, 4, 4)
    export(model, tmp_path / "m.onnx", x)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("sphereify.deployment.formats.Onnx.run", lambda self, path, inputs: [torch.ones(3, 30)])
    with pytest.raises(ExportError, match="computes something else"):
        export(sphereify(nn.Sequential(nn.Flatten(), nn.Linear(48, 30))), tmp_path / "m.onnx", x)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.export
def test_a_file_of_another_owner_is_not_overwritten(tmp_path, with_large_weights):
    (tmp_path / "m.onnx.data").write_text("mine")
    with pytest.raises(ExportError, match=r"m\.onnx\.data is in the way, and belongs to no m\.onnx"):
        export(broad(), tmp_path / "m.onnx", torch.randn(2, 3, 4, 4))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.onnx.data", "mine")]
