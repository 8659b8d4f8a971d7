"""Angles of a report, against arccos of plain products, patch by patch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import apply_plan, fold, plan_conversion
from sphereify.errors import UsageError
from sphereify.report import measure_angles, write_report


def degrees(patches, filters, radius=0.0, eps=1e-4):
    """The angles between all patches (B, P, D), pooled over P, and filters (N, D), sorted."""
    patches, filters = patches.double(), filters.double().flatten(1)
    squares = patches.square().sum(-1, keepdim=True)
    norms = (squares + radius**2 * squares.mean(1, keepdim=True) + eps).sqrt()
    cos = patches @ filters.T / (norms * (filters.square().sum(1) + eps).sqrt())
    return (cos.clamp(-1, 1).acos() * 180 / math.pi).flatten().sort().values


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular")
        self.table = nn.Parameter(torch.randn(5, 3))
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(F.linear(self.conv(x).mean((2, 3)), self.table))


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_angles_are_those_of_patches_and_filters(radius):
    torch.manual_seed(0)
    original, x = Net(), torch.randn(4, 2, 6, 6)
    options = {"radius": radius} if radius else {}
    model = apply_plan(original, plan_conversion(original, example_inputs=x, **options))
    angles = measure_angles(model, original, x)
    assert angles.reason == ""
    assert list(angles.before) == list(angles.after) == ["conv", "table", "fc"]
    patches = F.unfold(F.pad(x, [1] * 4, mode="circular"), 3, stride=2).mT
    close = {"atol": 2e-3, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(angles.before["conv"].values, degrees(patches, original.conv.weight, eps=0), **close)
    torch.testing.assert_close(angles.after["conv"].values, degrees(patches, original.conv.weight, radius), **close)
    features = original.conv(x).mean((2, 3))[:, None]
    torch.testing.assert_close(angles.before["table"].values, degrees(features, original.table, eps=0), **close)
    scores = F.linear(features, original.table)
    torch.testing.assert_close(angles.before["fc"].values, degrees(scores, original.fc.weight, eps=0), **close)


def test_the_spread_of_known_angles():
    plain = nn.Linear(2, 2, bias=False)
    plain.weight.data = torch.eye(2)
    model = apply_plan(plain, plan_conversion(plain, example_inputs=torch.ones(1, 2)))
    spread = measure_angles(model, plain, torch.tensor([[1.0, 0.0]])).before[""]
    assert spread.values.tolist() == [0.0, 90.0]
    assert (spread.mean, spread.deviation) == (45.0, 45.0)
    assert spread.histogram(0, 180, 2) == pytest.approx([0.5 / 90, 0.5 / 90])


def test_inputs_with_which_the_network_does_not_run_leave_a_reason():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    model = apply_plan(plain, plan_conversion(plain, example_inputs=torch.zeros(1, 3, 4, 4)))
    angles = measure_angles(model, plain, torch.zeros(1, 3, 9, 9))
    assert not angles.after
    assert "got x of shape (1, 196) and weight of shape (2, 16)" in angles.reason


def test_inputs_by_keyword_and_projections_of_attention():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.attention = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, tokens):
            x = self.words(tokens)
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    original, inputs = Reader(), {"tokens": torch.arange(6).view(2, 3)}
    plan = plan_conversion(original, example_inputs=inputs, attention="convert")
    angles = measure_angles(apply_plan(original, plan), original, inputs)
    assert list(angles.after) == ["attention.in_proj_weight", "attention.out_proj"]
    expected = degrees(original.words.weight[:6][:, None], original.attention.in_proj_weight, eps=0)
    torch.testing.assert_close(
        angles.before["attention.in_proj_weight"].values, expected, atol=2e-3, rtol=0, check_dtype=False
    )


def test_a_folded_network_has_no_angles(tmp_path):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    inputs = torch.randn(2, 3, 4, 4)
    folded = fold(apply_plan(plain, plan_conversion(plain, example_inputs=inputs)).eval())
    assert not measure_angles(folded, None, inputs).after
    text = write_report(folded, tmp_path / "r.html", inputs=inputs).read_text()
    assert "reach no angular layer, or the network is folded" in text


def test_a_plain_model_is_refused():
    with pytest.raises(UsageError, match="measure_angles: Linear was not converted"):
        measure_angles(nn.Linear(2, 2))
