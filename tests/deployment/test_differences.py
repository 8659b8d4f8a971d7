"""Outputs that are not finite: equal ones agree, and a network without a number is told by its layer."""

import math

import pytest
import torch
from torch import nn

from sphereify import fold, sphereify
from sphereify.deployment.differences import difference, has_numbers, not_finite
from sphereify.deployment.exporting import export
from sphereify.errors import ExportError, UnsupportedModelError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("output", "expected", "apart"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, -INF], [1.0, -INF], 0),
        ([1.0, -INF], [2.0, -INF], 0.5),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, 2.0], [1.0, -INF], INF),
        ([1.0, -INF], [1.0, 2.0], INF),
        ([NAN, 1.0], [NAN, 1.0], 0),
        ([NAN, 1.0], [1.0, NAN], INF),
        ([NAN, NAN], [NAN, NAN], 0),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0),
        ([1j], [2j], 0.5),
        ([1.0, -1e9], [2.0, -1e9], 0.5),
        ([1.0, -3e38], [2.0, -3e38], 0.5),
        ([1.0, -1e4, -65504.0], [2.0, -1e4, -65504.0], 0.5),
        ([8192.0, 1.0], [8192.0, 2.0], 2**-13),
    ],
    ids=str,
)
def test_equal_values_agree_finite_or_not(output, expected, apart):
    assert difference(torch.tensor(output), torch.tensor(expected)) == apart


def test_numbers_are_looked_for_in_all_outputs():
    ids, nans, one = torch.arange(3), torch.full((3,), NAN), torch.tensor([-INF, 1.0])
    assert has_numbers([nans, one])
    assert has_numbers([ids])
    assert not has_numbers([ids, nans])
    assert not_finite([ids, nans, one]) == "4 of 5 output values are not finite"
    assert not_finite([ids]) == ""


class Masked(nn.Module):
    """A classifier that leaves out two of its classes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        scores = self.fc(self.conv(x).mean((2, 3)))
        return scores.masked_fill(torch.tensor([False, True, False, True]), -INF)


@pytest.mark.parametrize("format", ["torch-export", pytest.param("onnx", marks=pytest.mark.export)])
def test_masked_classes_are_folded_and_exported(tmp_path, format):
    x = torch.randn(2, 3, 9, 9)
    model = sphereify(Masked(), example_inputs=x).eval()
    torch.testing.assert_close(fold(model, x)(x), model(x), rtol=1e-5, atol=1e-5)
    written = export(model, tmp_path / "masked", x, format=format)
    assert written.difference < 1e-5
    assert written.note.endswith("6 of 12 output values are not finite, in the file as in the model")


@pytest.mark.parametrize("what", ["weight", "activation"])
def test_a_network_without_a_finite_output_is_refused_with_its_layer(tmp_path, what):
    torch.manual_seed(0)
    model = sphereify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))).eval()
    with torch.no_grad():
        (model[0].weight if what == "weight" else model[0].beta).fill_(NAN)
    x = torch.randn(2, 3, 3, 3)
    text = r"are not finite.* the first layer with a value that is not finite is 0 \(its"
    with pytest.raises(UnsupportedModelError, match=text):
        fold(model, x)
    for folded in (True, False):
        with pytest.raises(ExportError, match=text):
            export(model, tmp_path / "m.pt2", x, format="torch-export", folded=folded)
    assert list(tmp_path.iterdir()) == []
