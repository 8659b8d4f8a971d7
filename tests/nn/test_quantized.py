"""Quantized weights where plain ones are needed: each place says what to do instead."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sphereify import fold, plan_conversion, save, sphereify
from sphereify.errors import UnsupportedModelError, UsageError
from sphereify.nn.quantized import is_quantized


class Packed(Tensor):
    """A tensor as quantization libraries have them: it calls itself fp32 and must be dequantized to be read."""

    def dequantize(self):
        return self.as_subclass(Tensor)


def packed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().as_subclass(Packed), requires_grad=False)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def test_quantized_tensors_are_told_from_plain_ones_of_any_class():
    assert is_quantized(packed(torch.ones(2)))
    assert not is_quantized(torch.ones(2))
    assert not is_quantized(nn.Parameter(torch.ones(2)))


def test_quantizing_an_angular_layer_is_refused_and_changes_nothing():
    model = sphereify(network(), example_inputs=torch.randn(1, 6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"SphereLinear: its weight is being quantized \(Packed\).*fold"):
        model[2].weight = packed(model[2].weight)
    assert not is_quantized(model[2].weight)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_quantized_network_is_not_converted_and_its_layer_is_named():
    model = network()
    model[2].weight = packed(model[2].weight)
    with pytest.raises(UnsupportedModelError, match=r"2 \(Linear\) is quantized.*quantize afterwards.*exclude='2'"):
        plan_conversion(model, example_inputs=torch.randn(1, 6))


def test_a_folded_network_can_be_quantized_but_not_saved(tmp_path):
    folded = fold(sphereify(network(), example_inputs=torch.randn(1, 6)))
    x = torch.randn(5, 6)
    expected = folded(x)
    folded[2].weight = packed(folded[2].weight)
    torch.testing.assert_close(folded(x).as_subclass(Tensor), expected)
    with pytest.raises(UsageError, match=r"2\.weight: is quantized \(Packed\).*quantize what load returns"):
        save(folded, tmp_path / "model")
    assert not list(tmp_path.iterdir())
