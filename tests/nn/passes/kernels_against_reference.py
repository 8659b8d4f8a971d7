"""The Triton kernels against the reference in ATen: in Triton's interpreter on a CPU, compiled where there is CUDA.

`test_triton.py` runs this file in a process of its own, because Triton decides with its import whether it interprets.
Tiles are made small now and then, so that tensors of a few elements have many of them.
"""

import inspect
import math
import os

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sphereify.choices import OPERATORS
from sphereify.nn.functional import sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear
from sphereify.nn.geometry import Projection
from sphereify.nn.operators import CURVES, SIN_FLOOR, make_operator
from sphereify.nn.passes import self_check
from sphereify.nn.passes import triton as kernels
from tests.nn.oracle import normal

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
if DEVICE == "cpu":
    CLOSE[torch.bfloat16] = {"rtol": 4e-2, "atol": 6e-2}  # Triton 3.9's interpreter cuts digits off instead of rounding
# The interpreter is too slow for many examples, and for shrinking.
EXPENSIVE = settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.generate), derandomize=True)
CONVS = {1: sphere_conv1d, 2: sphere_conv2d}
KS = {"linear": None, "cosine": None, "sigmoid": 0.3}

dtypes = st.sampled_from(list(CLOSE))
formats = st.sampled_from(list(FORMATS))
tiles = st.sampled_from([32, 128, 2048])


def tensor(*shape, seed=0, dtype=torch.float32, layout="contiguous"):
    made = normal(*shape, seed=seed).to(DEVICE, dtype)
    return made.contiguous(memory_format=FORMATS[layout]) if len(shape) == 4 else made


class Everything:
    def __contains__(self, _):
        return True


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels that were launched; they are trusted without a check, which would launch them, too."""
    monkeypatch.setattr(self_check, "_trusted", Everything())
    names, launch = [], kernels._launch

    def spy(name, *args, **constants):
        names.append(name)
        launch(name, *args, **constants)

    monkeypatch.setattr(kernels, "_launch", spy)
    yield names
    assert not kernels._switch.failed


def with_tiles(tile):
    """Tiles of that many elements, until the next call."""
    kernels.TILE, kernels.WINDOW_TILE = tile, tile // 8 if tile > 256 else tile


@pytest.fixture(autouse=True)
def _usual_settings(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    with_tiles(2048)


@st.composite
def geometries(draw, dim):
    """(shape of x, shape of the weight, geometry); one in two has a window of one place."""

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dim))

    groups, outputs = draw(st.sampled_from([(1, 5), (1, 3), (2, 3), (3, 2), (3, 1), (5, 1)]))
    inputs = draw(st.sampled_from([1, 2, 3, 4]))
    kernel = draw(st.sampled_from([(1,) * dim, None])) or each(1, 3)
    stride, padding, dilation = each(1, 3), each(0, 2), each(1, 2)
    if draw(st.booleans()):
        stride, padding = (1,) * dim, (0,) * dim
    spans = zip(kernel, dilation, padding, strict=True)
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 3)) for k, d, p in spans]
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (draw(st.integers(1, 3)), groups * inputs, *size), (groups * outputs, inputs, *kernel), how


def operator_of(name, filters):
    operator = make_operator(name, filters=filters)
    for p in operator.parameters():
        with torch.no_grad():
            p.copy_(torch.linspace(0.2, 0.9, len(p)))
    return operator.to(DEVICE)


def outcome(on, function, x, weight, operator, upstream, **how):
    """Value and gradients, with the kernels or without."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    with kernels.enabled(on):
        value = function(*leaves, operator, **how)
        radius = [how["radius"]] if isinstance(how.get("radius"), torch.Tensor) else []
        inputs = (*leaves, *operator.parameters(), *radius)
        return value.detach(), *torch.autograd.grad(value, inputs, upstream.to(value.dtype))


def assert_all_close(got, expected, dtype):
    """Gradients are sums: their tolerance goes with the largest of them."""
    for a, b in zip(got, expected, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a.float() / scale, b.float() / scale, **CLOSE[dtype])


# ε = 1 keeps the angles of these random vectors away from the poles, where rounding alone makes gradients differ.
def compare_convolutions(geometry, name, dtype, layouts, tile, seed, radius, learned):
    shape, weight_shape, how = geometry
    if radius:
        how = {**how, "radius": torch.tensor([radius], device=DEVICE, requires_grad=True) if learned else radius}
    x = tensor(*shape, seed=seed, dtype=dtype, layout=layouts[0])
    weight = tensor(*weight_shape, seed=seed + 10, dtype=dtype, layout=layouts[1])
    operator = operator_of(name, weight_shape[0])
    function = CONVS[len(shape) - 2]
    with_tiles(tile)
    size = function(x, weight, operator, **how).shape
    upstream = tensor(*size, seed=seed + 20, layout=layouts[2])
    expected = outcome(False, function, x, weight, operator, upstream, eps=1.0, **how)
    got = outcome(True, function, x, weight, operator, upstream, eps=1.0, **how)
    assert_all_close(got, expected, dtype)


def any_convolution(dim):
    """A test of random convolutions; the number of examples is small because the interpreter is slow."""
    arguments = {"name": st.sampled_from(OPERATORS), "dtype": dtypes, "layouts": st.tuples(formats, formats, formats)}
    arguments |= {"radius": st.sampled_from([0.0, 0.7, 3.0]), "learned": st.booleans()}
    drawn = given(geometry=geometries(dim), tile=tiles, seed=st.integers(0, 9), **arguments)
    return EXPENSIVE(drawn(compare_convolutions))


test_any_convolution_in_1_dimension_agrees_with_the_reference = any_convolution(1)
test_any_convolution_in_2_dimensions_agrees_with_the_reference = any_convolution(2)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_grouped_and_strided_convolution_agrees_with_the_reference(name):
    how = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    compare_convolutions(
        ((2, 6, 5, 7), (4, 3, 3, 2), how), name, torch.float32, ("channels_last",) * 3, 32, 0, 0.0, False
    )


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_pooled_convolution_agrees_with_the_reference(groups, layout, learned):
    how = {"stride": (2, 1), "padding": (1, 0), "groups": groups}
    geometry = ((3, 6, 5, 7), (4, 6 // groups, 3, 2), how)
    compare_convolutions(geometry, "sigmoid", torch.float32, (layout,) * 3, 32, 0, radius=2.0, learned=learned)


def test_a_linear_map_of_four_dimensions_in_channels_last_agrees_with_the_reference():
    x, weight = tensor(2, 3, 4, 5, layout="channels_last"), tensor(6, 5, seed=1)
    both = [
        outcome(on, sphere_linear, x, weight, make_operator("linear"), tensor(2, 3, 4, 6), eps=1.0)
        for on in (True, False)
    ]
    assert_all_close(*both, torch.float32)


@EXPENSIVE
@given(leading=st.lists(st.integers(1, 4), min_size=1, max_size=2), features=st.integers(2, 20),
       filters=st.integers(1, 20), name=st.sampled_from(OPERATORS), dtype=dtypes, tile=tiles)  # fmt: skip
def test_any_linear_map_and_its_gradients_agree_with_the_reference(leading, features, filters, name, dtype, tile):
    x, weight = tensor(*leading, features, dtype=dtype), tensor(filters, features, seed=1, dtype=dtype)
    operator, upstream = operator_of(name, filters), tensor(*leading, filters, seed=2)
    with_tiles(tile)
    got = outcome(True, sphere_linear, x, weight, operator, upstream, eps=1.0)
    assert_all_close(got, outcome(False, sphere_linear, x, weight, operator, upstream, eps=1.0), dtype)


def test_a_layer_takes_seven_launches_beside_its_convolutions(launched):
    x, weight = tensor(2, 4, 5, 5, layout="channels_last"), tensor(6, 4, 3, 3, seed=1)
    outcome(True, sphere_conv2d, x, weight, make_operator("linear"), tensor(2, 6, 5, 5), padding=1)
    assert launched == [
        "normalize_rows", "square_sum", "window_map", "epilogue", "prologue", "correct", "project_rows",
    ]  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", FORMATS)
def test_batch_size_compiles_nothing_anew(layout, groups, monkeypatch):
    seen = {}

    def record(name, grid, *args, **constants):
        names = inspect.signature(getattr(kernels._kernels(), name).fn).parameters
        numbers = {n: a for n, a in zip(names, args, strict=False) if isinstance(a, int) and n != "rows"}
        seen[batch].append((name, numbers, constants))

    monkeypatch.setattr(kernels, "_launch", record)
    weight = tensor(4, 4 // groups, 3, 3, seed=1)
    for batch in (2, 5, 16):
        seen[batch] = []
        x = tensor(batch, 4, 3, 3, layout=layout)
        upstream, how = tensor(batch, 4, 2, 2), {"stride": 2, "padding": 1, "groups": groups}
        outcome(True, sphere_conv2d, x, weight, make_operator("linear"), upstream, **how)
    assert seen[2] == seen[5] == seen[16]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_what_is_frozen_gets_no_kernel(wanted, launched):
    x, weight = tensor(2, 4, 5, 5).requires_grad_(wanted[0]), tensor(6, 4, 3, 3, seed=1).requires_grad_(wanted[1])
    sphere_conv2d(x, weight, make_operator("linear")).sum().backward()
    assert ("correct" in launched, "project_rows" in launched) == wanted
    assert (x.grad is not None, weight.grad is not None) == wanted


def test_shared_k_and_gradients_that_are_expanded_views():
    x, weight = tensor(2, 4, 5, 5, layout="channels_last"), tensor(6, 2, 3, 3, seed=1)
    operator = operator_of("learnable-sigmoid", 1)
    upstream = torch.ones(1, 1, 1, 1, device=DEVICE).expand(2, 6, 3, 3)
    both = [outcome(on, sphere_conv2d, x, weight, operator, upstream, groups=2) for on in (True, False)]
    assert_all_close(*both, torch.float32)


# ---- Single passes


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", OPERATORS)
def test_curve_backward_recovers_the_slopes_from_g_up_to_the_poles(name, dtype):
    # k of 0.02 is a step: t is 1 in fp32 long before the pole.
    g = torch.cat([torch.linspace(-1, 1, 401), torch.tensor([1 - 1e-6, 1 - 1e-4, 1e-4])]).to(DEVICE, dtype)[None]
    for k in [torch.tensor([0.1, 0.5]), torch.tensor(0.02)] if name == "learnable-sigmoid" else [KS[name]]:
        rows = g.expand(2, -1).t().contiguous()  # (*, filters)
        k = k.to(DEVICE) if isinstance(k, torch.Tensor) else k
        grad, norm = tensor(*rows.shape, seed=1, dtype=dtype), tensor(len(rows), 1, seed=2).abs() + 0.5
        d_dot, radial, grad_k, *_ = kernels.curve_backward(grad, rows, norm, name, k, None)
        exact = CURVES[name].slope(rows.double(), k.double() if isinstance(k, torch.Tensor) else k, SIN_FLOOR[dtype])
        d = grad.double() if exact.by_cos is None else grad.double() * exact.by_cos
        # What is left of a sigmoid's 1 - t² at the pole has few digits in fp32.
        single = 1e-4 if "sigmoid" in name else 2e-6
        close = {"rtol": single if dtype is torch.float32 else 1e-2, "atol": single}
        torch.testing.assert_close(d_dot.double(), d / norm, **close)
        sums = (d * exact.cos).sum(1, keepdim=True)
        torch.testing.assert_close(radial.double(), sums / norm**2, rtol=1e-4, atol=1e-4)
        if isinstance(k, torch.Tensor):
            expected = (grad.double() * exact.by_k).sum_to_size(k.shape)
            torch.testing.assert_close(grad_k.double(), expected, rtol=1e-4, atol=1e-3)
        else:
            assert grad_k is None


def test_arcsine_and_tanh_are_exact_but_for_rounding():
    cos = torch.cat([torch.linspace(-1, 1, 20001), torch.logspace(-30, 0, 500)]).to(DEVICE)[:, None]
    exact = cos.double().asin()
    one = torch.ones_like(cos)
    linear, _ = kernels.curve(cos.clone(), one, "linear", None, None)
    # Two ulp, and a third for the product with 2/π; the square root of a GPU is not rounded exactly.
    ulp = (3 if DEVICE == "cpu" else 5) * 2**-23
    torch.testing.assert_close(linear.double(), exact * (2 / math.pi), rtol=ulp, atol=0)
    for k in (0.05, 0.3, 3.0):
        got, _ = kernels.curve(cos.clone(), one, "sigmoid", k, None)
        expected = (exact / (2 * k)).tanh() / math.tanh(math.pi / (4 * k))
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_cosines_beyond_one_are_clamped_and_nan_stays():
    dot, norm = torch.tensor([[5.0, -5.0, math.nan]], device=DEVICE), torch.ones(1, 1, device=DEVICE)
    for name in OPERATORS:
        g, _ = kernels.curve(dot.clone(), norm, name, 0.3 if "sigmoid" in name else None, None)
        torch.testing.assert_close(g.cpu(), torch.tensor([[1.0, -1.0, math.nan]]), equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("with_beta", [True, False])
def test_curve_writes_the_rescaled_output_in_the_same_pass(layout, with_shift, with_beta):
    dot, norm = tensor(2, 6, 3, 3, layout=layout), tensor(2, 2, 3, 3, seed=1).abs() + 1
    beta = tensor(6, seed=2) if with_beta else None
    shift = tensor(6, seed=3) if with_shift else None
    how = Projection((1, 1), (0, 0), (1, 1), 2)
    expected = (dot.clone().unflatten(1, (2, 3)) / norm.unsqueeze(2)).flatten(1, 2).clamp(-1, 1)
    g, y = kernels.curve(dot, norm, "cosine", None, how, beta, shift)
    assert g.data_ptr() == dot.data_ptr()
    torch.testing.assert_close(g, expected)
    if not (with_beta or with_shift):
        assert y is None
        return
    expected = expected * (beta.view(-1, 1, 1) if with_beta else 1) + (shift.view(-1, 1, 1) if with_shift else 0)
    torch.testing.assert_close(y, expected)
    assert y.stride() == g.stride()


@pytest.mark.parametrize("dtype", CLOSE)
def test_filters_longer_than_a_block(dtype):
    with_tiles(16)
    weight, v = tensor(3, 7, 3, 3, layout="channels_last"), tensor(3, 7, 3, 3, seed=1)
    unit, norm = kernels.normalize_filters(weight, 0.5, dtype)
    exact = (weight.double().square().sum((1, 2, 3), keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(unit.double(), weight.double() / exact, **CLOSE[dtype])
    assert unit.dtype is dtype
    w = weight.double() / exact
    expected = (v.double() - w * (w * v).sum((1, 2, 3), keepdim=True)) / exact
    got = kernels.filter_gradient(v, weight, norm)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert got.stride() == weight.stride()


@pytest.mark.parametrize(("layout", "other"), [("channels_last", "contiguous"), ("contiguous", "channels_last")])
def test_correction_of_a_gradient_in_another_layout(layout, other):
    x, grad_x = tensor(2, 4, 3, 5, layout=layout), tensor(2, 4, 3, 5, seed=1, layout=other)
    radial = tensor(2, 2, 2, 3, seed=2, layout=other)
    ones = torch.ones(2, 1, 3, 3, device=DEVICE)
    spread = torch.conv_transpose2d(radial, ones, None, 2, 1, groups=2).repeat_interleave(2, 1)
    expected = grad_x - x * spread
    got = kernels.subtract_radial(grad_x, x, radial, (3, 3), Projection((2, 2), (1, 1), (1, 1), 2))
    torch.testing.assert_close(got, expected)


def test_zeros_have_no_angle_and_a_finite_gradient():
    x, weight = torch.zeros(1, 2, 4, 4, device=DEVICE), tensor(3, 2, 3, 3)
    for name in OPERATORS:
        both = [outcome(on, sphere_conv2d, x, weight, operator_of(name, 3), tensor(1, 3, 2, 2)) for on in (True, False)]
        assert_all_close(*both, torch.float32)
        assert (both[0][0] == 0).all()


# ---- Fallback


def test_saved_for_backward_are_input_weight_output_and_norms_only():
    x, weight = tensor(2, 4, 8, 8).requires_grad_(), tensor(8, 4, 3, 3, seed=1).requires_grad_()
    saved = {}

    def keep(kept):
        saved[kept.data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        out = sphere_conv2d(x, weight, make_operator("linear"), padding=1)
    assert sum(saved.values()) == 4 * (x.numel() + weight.numel() + out.numel() + 2 * 8 * 8 + len(weight))


def test_second_derivatives_and_three_dimensions_take_the_reference(launched):
    x, weight = tensor(1, 2, 3, 3).requires_grad_(), tensor(2, 2, 2, 2, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(sphere_conv2d(x, weight, make_operator("linear")).sum(), x, create_graph=True)
    assert set(launched) == {"normalize_rows", "square_sum", "window_map", "epilogue"}  # of the forward
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    with kernels.enabled(False):
        (first,) = torch.autograd.grad(sphere_conv2d(x, weight, make_operator("linear")).sum(), x, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), weight)[0], rtol=1e-3, atol=1e-4)
    launched.clear()
    sphere_conv3d(tensor(1, 2, 3, 3, 3), tensor(2, 2, 2, 2, 2, seed=1), make_operator("linear"))
    torch.func.vmap(lambda x: sphere_conv2d(x, weight, make_operator("linear")))(tensor(2, 1, 2, 3, 3))
    assert launched == []


def test_kernel_that_fails_in_the_backward_leaves_the_reference_and_one_warning(monkeypatch):
    x, weight, operator = tensor(1, 2, 4, 4), tensor(3, 2, 3, 3, seed=1), make_operator("linear")
    upstream = tensor(1, 3, 2, 2)
    expected = outcome(False, sphere_conv2d, x, weight, operator, upstream)
    monkeypatch.setattr(kernels._kernels(), "correct", None)
    with monkeypatch.context() as patch:
        patch.setattr(kernels._switch, "failed", False)
        with pytest.warns(RuntimeWarning, match="kernel correct failed") as caught:
            got = outcome(True, sphere_conv2d, x, weight, operator, upstream)
        assert kernels._switch.failed
        again = outcome(True, sphere_conv2d, x, weight, operator, upstream)
    assert len(caught) == 1
    assert_all_close(got, expected, torch.float32)
    assert_all_close(again, expected, torch.float32)


if DEVICE == "cuda":

    def test_addresses_beyond_32_bits():
        rows = 2**24 + 5
        dot = torch.zeros(rows, 160, device=DEVICE, dtype=torch.bfloat16)
        norm = torch.full((rows, 1), 2.0, device=DEVICE)
        dot[-3:] = 1.0
        g, _ = kernels.curve(dot, norm, "cosine", None, None)
        assert (g[-3:] == 0.5).all()
        assert g[:-3].count_nonzero() == 0
        norm = kernels.patch_norm(g, (), 0.5, None)
        torch.testing.assert_close(norm[-3:], torch.full((3, 1), math.sqrt(160 / 4 + 0.5), device=DEVICE))
