"""The inputs of a calibration, good and bad."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import calibrate, sphereify
from sphereify.errors import DataError, UsageError
from tests.calibration.networks import Residual, hidden, r_squared, small, smooth_images, state


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_named_before_anything_changes(bad):
    original = Residual()
    model = sphereify(original)
    before = copy.deepcopy(model.state_dict())
    x = smooth_images(32)
    x[20, 0, 3, 3] = bad
    with pytest.raises(DataError, match="batch 1 holds 1 values that are not finite"):
        calibrate(model, original, x.split(16))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_images_in_another_range_than_the_model_was_trained_on_are_noted():
    original = Residual()
    original.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model = sphereify(original, example_inputs=smooth_images(2))
    with pytest.warns(UserWarning, match=r"the images lie in \[0.00, 255.00\]"):
        calibration = calibrate(model, original, [torch.linspace(0, 255, 3 * 144 * 16).view(16, 3, 12, 12)])
    assert "Normalize" in calibration.notes[0]
    normal = ((torch.rand(16, 3, 12, 12) - 0.45) / 0.225).clamp(-2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(sphereify(original, example_inputs=smooth_images(2)), original, [normal])


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([torch.zeros(0, 3, 12, 12)], "batch 0 is empty"),
        ([(torch.randn(4, 3, 12, 12), torch.zeros(4))], "Leave labels out"),
    ],
)
def test_batches_that_a_network_cannot_take_are_told(batches, told):
    original = Residual()
    with pytest.raises((UsageError, DataError), match=told):
        calibrate(sphereify(original), original, batches)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (None, "got NoneType, expected batches"),
        ([[torch.randn(4, 3, 12, 12), torch.zeros(4)]], "got list, expected a tensor for each batch"),
    ],
)
def test_objects_that_are_no_batches_are_type_errors(batches, told):
    original = Residual()
    with pytest.raises(TypeError, match=told):
        calibrate(sphereify(original), original, batches)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x * scale), 1.0)


def test_a_batch_may_be_a_tuple_of_arguments():
    torch.manual_seed(4)
    original = TwoInputs()
    x, scale = torch.randn(24, 3, 8, 8), torch.full((24, 1, 1, 1), 3.0)
    pairs = list(zip(x.split(8), scale.split(8), strict=True))
    model = sphereify(original, calibration=pairs)
    assert r_squared(model(x, scale).flatten(1), original(x, scale).flatten(1)) > 0.5
    one = sphereify(hidden(copy.deepcopy(original.conv)), calibration=[(x * scale,)])
    torch.testing.assert_close(model(x, scale), one(x * scale), rtol=1e-3, atol=1e-3)


def test_batches_may_come_from_a_generator():
    torch.manual_seed(5)
    original = small()
    x = torch.randn(40, 3, 6, 6)
    model = sphereify(original, calibration=(batch for batch in x.split(10)))
    again = sphereify(original, calibration=x.split(10))
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_no_batches_are_an_error():
    original = small()
    before = state(original)
    with pytest.raises(UsageError, match="calibration: got no batches, expected tensors of inputs"):
        sphereify(original, calibration=[])
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)


def test_a_network_that_writes_to_its_input_gets_its_own_each_time():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.leaky_relu(self.conv(input=x.mul_(2).sub_(1)), 1.0)

    torch.manual_seed(9)
    original, x = Writes(), torch.rand(32, 3, 8, 8)
    before = x.clone()
    model = sphereify(original)
    calibration = calibrate(model, original, x.split(16), steps=2)
    assert torch.equal(x, before)
    assert calibration.r2["conv"] > 0.5


class SomeClasses(nn.Module):
    """A classifier whose other classes are masked out."""

    def __init__(self, mask=float("-inf")):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 4)
        self.mask = mask

    def forward(self, x):
        return self.fc(self.body(x).relu()).masked_fill(torch.tensor([False, True, False, False]), self.mask)


@pytest.mark.parametrize("options", [{}, {"calibration_steps": 3}], ids=["least squares", "steps"])
def test_classes_that_are_masked_out_do_not_keep_a_network_from_being_calibrated(options):
    batch = torch.randn(64, 6)
    options["calibration"] = [batch]
    model, finite = sphereify(SomeClasses(), **options).eval(), sphereify(SomeClasses(0.0), **options).eval()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(model(batch)[:, kept], finite(batch)[:, kept], rtol=1e-3, atol=1e-3)


def test_a_network_with_nothing_but_masks_is_no_original():
    with pytest.raises(DataError, match="output is not finite"):
        sphereify(SomeClasses(float("nan")), calibration=[torch.randn(8, 6)])
