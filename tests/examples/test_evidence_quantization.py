"""Quantization to fewer levels and exposure, against what they mean, and the program from end to end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.evidence import quantization, quantization_report, quantization_runs
from examples.evidence.quantization_runs import exposure
from examples.evidence.quantizer import LOWEST, Setting, logits, prepare, quantize, reduce_levels, window_sums
from sphereify import export, sphereify
from tests.examples.colours import write_pictures


def test_an_exposure_is_clipped_and_rounded_to_8_bits():
    pixels = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    stored = exposure(pixels, 0.25, 0.0, seed=0)
    assert ((stored * 255 - (stored * 255).round()).abs() < 1e-4).all()
    assert (stored - pixels / 4).abs().max() <= 0.5 / 255 + 1e-6
    assert exposure(pixels, 4, 0, seed=0).max() == 1
    dark = torch.full((64, 3, 16, 16), 0.5)
    noisy = exposure(dark, 1.0, 0.03, seed=0) - 0.5
    assert noisy.std() == pytest.approx(0.03, rel=0.05)  # of the sensor: the light does not change it
    assert (exposure(dark, 0.5, 0.03, seed=0) - 0.25).std() == pytest.approx(0.03, rel=0.05)


def _layer(bits: int) -> tuple:
    """A product whose input and filters are quantized to 8 bits as ONNX Runtime writes it, then to fewer."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    x = draw.uniform(-1.5, 3.0, (50, 4)).astype(np.float32)  # beyond the range, too
    weight = draw.normal(size=(4, 3)).astype(np.float32)
    low, high = -1.0, 2.0
    scale, w_scale = np.float32((high - low) / 255), np.float32(np.abs(weight).max() / 127)
    zero = np.int8(round(-low / scale) + LOWEST)
    stored = np.rint(weight / w_scale).astype(np.int8)
    constants = {"s": scale, "z": zero, "w": stored, "ws": w_scale, "wz": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["f"], name="filters"),
        helper.make_node("MatMul", ["d", "f"], ["y"], name="product"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "one", [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 3]), value("d", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    reduce_levels(model, bits)
    return model, x, stored * w_scale, (low, high)


@pytest.mark.export
@pytest.mark.parametrize("bits", [6, 4, 2])
def test_fewer_bits_are_as_many_levels_in_the_same_range(bits):
    import onnxruntime

    model, x, weight, (low, high) = _layer(bits)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, rounded = session.run(None, {"x": x})
    step = (high - low) / (2**bits - 1)
    assert len(np.unique(rounded)) <= 2**bits
    # The ends are those of the range, moved so that 0 is a level.
    assert rounded.min() == pytest.approx(low, abs=step / 2 + 1e-5)
    assert rounded.max() == pytest.approx(high, abs=step / 2 + 1e-5)
    assert 0 in rounded
    inside = np.abs(x - x.clip(rounded.min(), rounded.max())) == 0
    assert np.abs(rounded - x)[inside].max() <= step / 2 + 1e-5
    filters = np.linalg.lstsq(rounded, y, rcond=None)[0]
    w_step = np.abs(weight).max() / (2 ** (bits - 1) - 1)
    levels = filters / w_step
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert np.abs(filters - weight).max() <= 0.51 * w_step


def _network(convert: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).eval()
    return sphereify(network, radius=4.0) if convert else network


@pytest.mark.export
@pytest.mark.parametrize("convert", [False, True])
def test_a_quantized_network_computes_nearly_the_same_and_less_so_with_fewer_bits(tmp_path, convert):
    import onnx

    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    exported, prepared, file = (tmp_path / f"{name}.onnx" for name in ("exported", "prepared", "quantized"))
    network = _network(convert)
    export(network, exported, images[:2], folded=convert)
    prepare(exported, prepared)
    with torch.no_grad():
        exact = network(images)
    torch.testing.assert_close(logits(prepared, images), exact, rtol=1e-3, atol=1e-5)
    errors = {}
    for operators, bits in (("all operators", 8), ("products", 8), ("products", 4)):
        quantize(prepared, file, images, Setting(operators, "MinMax", True, bits))
        errors[operators, bits] = ((logits(file, images) - exact).norm() / exact.norm()).item()
    assert 0 < errors["products", 8] < 0.05
    assert errors["products", 4] > 3 * errors["products", 8]
    sums = window_sums(onnx.load(str(prepared)))
    assert bool(sums) == convert  # an angular convolution sums the squares of its windows; no filter is a sum


def test_losses_are_those_of_the_same_draw():
    def run(variant, draw, fp32, eight):
        return {"network": "vgg", "variant": variant, "draw": draw, "fp32": fp32, "8 bits": eight}

    found = [run("original", 0, 0.9, 0.8), run("original", 1, 0.9, 0.82), run("converted", 0, 0.88, 0.87)]
    table = quantization_report.tables({"quantization": found, "exposure": []}, ["vgg"], ["8 bits"], 2, 1.0)
    assert "| vgg | fp32 | 90.0 ± 0.0 |  | 88.0 |  |  |" in table
    assert "| vgg | 8 bits | 81.0 ± 1.4 | 9.0 ± 1.4 | 87.0 | 1.0 | +9.0 |" in table


def test_another_network_is_not_taken_for_one_that_was_converted_before(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization_runs, "calibrate", lambda model, network, images: None)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for shift, brighter, networks in ((0, 0, 1), (1, 0, 2), (0, 1, 3), (0, 0, 3)):
        network = _network(convert=False)
        network[0].weight.data.add_(shift)
        model = quantization_runs._converted(network, "net", images + brighter, 0, tmp_path)
        assert torch.equal(model[0].weight, sphereify(network, radius=4.0)[0].weight)
        assert len(list((tmp_path / "networks").iterdir())) == networks


@pytest.mark.papers
def test_networks_are_quantized_and_exposed_once(tmp_path, monkeypatch):
    photos, output = write_pictures(tmp_path / "photos"), tmp_path / "out"
    given = ["--quick", "--data", str(photos), "-o", str(output)]
    quantization.main([*given, "--report"])
    assert (output / "table.md").read_text().count("No result yet.") == 2
    quantization.main(given)
    results = json.loads((output / "results.json").read_text())
    names = {setting.name for setting in quantization.QUICK.settings}
    assert [set(run) - {"network", "variant", "draw"} for run in results["quantization"]] == [{"fp32", *names}] * 2
    (run,) = results["exposure"]
    assert {len(shares) for title in ("original", "converted") for shares in run[title].values()} == {2}
    assert run["original"]["0"][0] == results["quantization"][0]["fp32"]  # ×1 without noise is the picture itself
    with Image.open(output / "figure.png") as image:
        assert image.width > 500
    table = (output / "table.md").read_text()
    monkeypatch.setattr(quantization_runs, "export", None)
    monkeypatch.setattr(quantization_runs, "exposure", None)
    quantization.main(given)
    assert (output / "table.md").read_text() == table


def test_networks_that_are_not_trained_are_told(tmp_path):
    with pytest.raises(SystemExit, match=r"resnet20\.pt: no such file; python -m benchmarks.plain_networks trains it"):
        quantization.main(["--data", "digits", "--plain", str(tmp_path), "-o", str(tmp_path)])
