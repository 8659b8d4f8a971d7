"""Each linear operation of a convolution's geometry with its adjoint: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sphereify.nn.geometry import (
    Projection,
    box_spread,
    box_sum,
    output_size,
    per_axis,
    project,
    project_backward,
    resolve,
)
from tests.nn.oracle import normal

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def geometries(draw):
    """(size, kernel, projection)"""
    dim = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dim))

    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 3), each(1, 2)
    spans = zip(kernel, dilation, padding, strict=True)
    size = tuple(max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 2)) for k, d, p in spans)
    return size, kernel, Projection(stride, padding, dilation, draw(st.sampled_from([1, 1, 2])))


# The adjoint has a way of its own for a stride of 1 and padding within reach, with dilation too.
@example(((6,), (2,), Projection((1,), (0,), (2,), 1)))
@example(((5, 6), (3, 2), Projection((1, 1), (1, 0), (2, 1), 2)))
@example(((2, 3), (2, 2), Projection((1, 1), (3, 2), (1, 1), 1)))
@example(((5, 6), (3, 2), Projection((2, 1), (0, 1), (1, 1), 1)))
@given(geometries())
def test_box_sum_is_a_convolution_with_ones_and_box_spread_its_adjoint(geometry):
    size, kernel, projection = geometry
    x = normal(2, projection.groups, *size)
    got = box_sum(x.clone(), kernel, projection)
    ones = torch.ones(projection.groups, 1, *kernel, dtype=x.dtype)
    torch.testing.assert_close(got, CONVOLUTIONS[len(kernel)](x, ones, None, *projection), rtol=0, atol=1e-12)
    y = normal(*got.shape, seed=1)
    spread = box_spread(y, size, kernel, projection)
    torch.testing.assert_close((got * y).sum(), (x * spread).sum(), rtol=1e-10, atol=1e-10)


@given(geometries())
def test_products_are_torchs_own_and_their_backward_the_adjoints(geometry):
    size, kernel, projection = geometry
    x, filters = normal(2, 2 * projection.groups, *size), normal(2 * projection.groups, 2, *kernel, seed=1)
    got = project(x, filters, projection)
    torch.testing.assert_close(got, CONVOLUTIONS[len(kernel)](x, filters, None, *projection), rtol=0, atol=1e-12)
    assert list(got.shape[2:]) == output_size(size, kernel, projection)
    y = normal(*got.shape, seed=2)
    for gradient, argument in zip(project_backward(y, x, filters, projection, (True, True)), (x, filters), strict=True):
        torch.testing.assert_close((got * y).sum(), (argument * gradient).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leading", [(3,), (2, 3)])
def test_products_of_a_linear_map_have_its_adjoints(leading):
    x, filters = normal(*leading, 5), normal(4, 5, seed=1)
    got, y = project(x, filters, None), normal(*leading, 4, seed=2)
    torch.testing.assert_close(got, F.linear(x, filters), rtol=0, atol=1e-14)
    for gradient, argument in zip(project_backward(y, x, filters, None, (True, True)), (x, filters), strict=True):
        torch.testing.assert_close((got * y).sum(), (argument * gradient).sum(), rtol=1e-12, atol=1e-12)
    assert project_backward(y, x, filters, None, (False, False)) == (None, None)


@pytest.mark.parametrize(
    ("padding", "kernel", "size", "expected"),
    [
        ("valid", (3, 2), (5, 6), (0, 0)),
        ("same", (3, 5), (5, 6), (1, 2)),
        ("same", (3, 2), (7, 7), (0, 0)),  # an even reach is padded in x: one row in front and behind, a column behind
        (2, (3, 3), (5, 6), (2, 2)),
        ([2], (3, 3), (5, 6), (2, 2)),
        ((2, 1), (3, 3), (5, 6), (2, 1)),
    ],
)
def test_padding_becomes_numbers(padding, kernel, size, expected):
    for x in (normal(2, 3, 5, 6), normal(3, 5, 6)):
        batch, projection = resolve(x, kernel, 1, padding, 1, 3)
        assert projection == Projection((1, 1), expected, (1, 1), 3)
        assert tuple(batch.shape) == (2 if x.dim() == 4 else 1, 3, *size)
    assert per_axis(2, 3) == per_axis([2], 3) == per_axis((2, 2, 2), 3) == (2, 2, 2)


class Names(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.add(function.overloadpacket._qualified_op_name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("stride", [1, 2])
def test_no_convolution_rounds_the_sums_on_another_device_than_a_cpu(stride):
    """cuDNN would round squares to TF32; the meta device stands for a GPU here."""
    projection, squares = Projection((stride,) * 2, (1, 1), (1, 1), 1), torch.empty(2, 1, 9, 9, device="meta")
    with Names() as names:
        sums = box_sum(squares, (3, 3), projection)
        assert box_spread(sums, (9, 9), (3, 3), projection).shape == squares.shape
    assert not {name for name in names.seen if "conv" in name}
