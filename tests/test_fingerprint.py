"""The texts and numbers that stand for the tensors of a network."""

import zlib

import pytest
import torch

from sphereify.fingerprint import checksum, fingerprint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
OTHERS = [
    {"c": TENSORS["a"], "b": TENSORS["b"]},
    {"a": TENSORS["a"].view(3, 2), "b": TENSORS["b"]},
    {"a": TENSORS["a"].half(), "b": TENSORS["b"]},
    {"a": TENSORS["a"] + 1e-6, "b": TENSORS["b"]},
]


@pytest.mark.parametrize("of", [fingerprint, checksum])
@pytest.mark.parametrize("other", OTHERS)
def test_a_name_a_shape_a_dtype_and_a_value_change_what_stands_for_tensors(of, other):
    assert of(TENSORS) != of(other)
    assert of(TENSORS) == of({name: tensor.clone().t().contiguous().t() for name, tensor in TENSORS.items()})


def test_a_checksum_is_the_crc_of_all_names_shapes_and_values_one_behind_the_other():
    values = [tensor.numpy().tobytes() for tensor in TENSORS.values()]
    assert checksum(TENSORS) == zlib.crc32(b"a (2, 3)" + values[0] + b"b ()" + values[1])
