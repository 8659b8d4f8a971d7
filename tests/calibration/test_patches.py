"""Patches of a layer's input against torch's own unfolding, the convolution, and a loop."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import calibrate, sphereify
from sphereify.calibration import rows
from sphereify.calibration.patches import Geometry
from sphereify.nn import SphereConv2d
from sphereify.nn.radius import HasRadius
from tests.calibration.networks import GEOMETRIES, SPHERE, conv, hidden, images


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of an angular convolution, or of a plain one in its place."""
    if not isinstance(layer, HasRadius):
        vars(layer).update(eps=1e-4, radius_value=0.0)
    shape = tuple(layer.weight.shape)
    return Geometry.of(
        SimpleNamespace(layer=layer, decision=SimpleNamespace(kind=f"conv{len(shape) - 2}d", shape=shape))
    )


def unrolled(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, groups, positions, fan_in): every patch of a convolution."""
    shape = tuple(layer.weight.shape)
    patches = geometry_of(layer).patches(x).flatten(1, len(shape) - 2)
    return patches.unflatten(2, (layer.groups, -1)).flatten(3).movedim(2, 1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 0), ((2, 3), (1, 2)), (1, 0)])
def test_unrolled_patches_are_those_of_unfold(groups, stride, dilation, kernel, padding):
    torch.manual_seed(0)
    layer = SphereConv2d(4, 8, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, 4, 8, 9)
    unfolded = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)  # (B, positions, C · kernel)
    expected = torch.stack(unfolded.chunk(groups, dim=2), 1)
    torch.testing.assert_close(unrolled(layer, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_unit_rows_times_the_unit_filters_are_the_cosines_of_the_layer(dim, geometry, radius):
    torch.manual_seed(3)
    layer, x = SPHERE[dim].from_conv(conv(dim, **{"bias": False, **geometry}), radius=radius), images(dim, 2)
    with torch.no_grad():
        cosines = layer(x)
        shape = geometry_of(layer)
        positions = torch.randperm(cosines.numel() // cosines.shape[1])[:20].sort().values
        rows = shape.unit(shape.patches(x), positions, shape.norms(x))  # (groups, n, fan_in)
        filters = F.normalize(layer.weight.flatten(1), dim=1).unflatten(0, (layer.groups, -1))
    expected = cosines.movedim(1, -1).flatten(0, -2)[positions]
    torch.testing.assert_close(torch.einsum("gnf,gof->ngo", rows, filters).flatten(1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_unrolled_patches_times_the_filters_are_the_convolution(dim, geometry):
    torch.manual_seed(1)
    layer = conv(dim, **{"bias": False, **geometry})
    x = images(dim, 2)
    groups = layer.groups
    filters = layer.weight.flatten(1).unflatten(0, (groups, -1))  # (groups, filters of one, fan_in)
    product = torch.einsum("bgpf,gof->bgop", unrolled(layer, x), filters).flatten(1, 2)
    torch.testing.assert_close(product, layer(x).flatten(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dim", [1, 3])
def test_unrolled_patches_are_those_of_a_loop(dim, dilation, groups):
    torch.manual_seed(2)
    layer = SPHERE[dim](4, 4, 2, stride=2, padding=1, dilation=dilation, groups=groups)
    x = images(dim, 2, size=5)
    padded = torch.zeros(2, 4, *[7] * dim)
    padded[(..., *[slice(1, 6)] * dim)] = x
    places = range(0, 7 - dilation, 2)
    patches = [
        [
            [padded[(b, slice(g * 4 // groups, (g + 1) * 4 // groups),
                     *(slice(p, p + dilation + 1, dilation) for p in place))].flatten()
             for place in itertools.product(places, repeat=dim)]
            for g in range(groups)
        ]
        for b in range(2)
    ]  # fmt: skip
    expected = torch.stack([torch.stack([torch.stack(group) for group in image]) for image in patches])
    torch.testing.assert_close(unrolled(layer, x), expected, rtol=0, atol=0)


def test_the_bound_on_memory_changes_nothing(monkeypatch):
    torch.manual_seed(3)
    original = hidden(nn.Conv2d(4, 8, 3, groups=2))
    x = images(2, 12)
    whole, pieces = sphereify(original), sphereify(original)
    calibrate(whole, original, [x])
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    monkeypatch.setattr(rows, "CACHE_BYTES", 1)
    calibrate(pieces, original, [x])
    torch.testing.assert_close(pieces(x), whole(x), rtol=1e-4, atol=1e-4)
