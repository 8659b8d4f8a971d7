import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sphereify.choices import OPERATORS
from sphereify.errors import UsageError
from sphereify.nn.functional import sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear
from sphereify.nn.layers import SphereConv2d
from sphereify.nn.operators import LearnableSigmoidOperator, make_operator
from tests.nn import oracle
from tests.nn.oracle import normal

CONVS = {1: sphere_conv1d, 2: sphere_conv2d, 3: sphere_conv3d}
EXACT = {"rtol": 0, "atol": 1e-10}
K = {"linear": 0, "cosine": 0, "sigmoid": 0.3, "learnable-sigmoid": 0.5}


def operators(filters):
    """Each operator in float64 with the k that the oracle needs; the learnable one has another k in every filter."""
    for name in OPERATORS:
        operator, k = make_operator(name, filters=filters).double(), 0.3
        if name == "learnable-sigmoid":
            k = [0.1 + 0.2 * i for i in range(filters)]
            with torch.no_grad():
                operator.p.copy_(torch.tensor(k, dtype=torch.float64) - 0.05)
        yield name, operator, k


@st.composite
def geometries(draw):
    dim = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dim))

    groups, inputs, outputs = (draw(st.integers(1, high)) for high in (3, 2, 2))  # (n, 1, n) is depthwise
    kernel, dilation = each(1, 3 if dim < 3 else 2), each(1, 2)
    padding = draw(st.sampled_from(["same", "valid", None])) or each(0, 3)
    stride = (1,) * dim if padding == "same" else each(1, 3)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    pads = padding if isinstance(padding, tuple) else (0,) * dim
    smallest = [1 if padding == "same" else max(1, r + 1 - 2 * p) for r, p in zip(reach, pads, strict=True)]
    size = [least + draw(st.integers(0, 3 if dim < 3 else 1)) for least in smallest]
    batch = draw(st.sampled_from([(), (0,), (1,), (2,)]))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (*batch, groups * inputs, *size), (groups * outputs, inputs, *kernel), how


EVEN = {"stride": (1, 1), "padding": "same", "dilation": (1, 1), "groups": 2}


@example(geometry=((1, 4, 3, 5), (2, 2, 2, 2), EVEN), with_bias=True, seed=0, eps=1e-4)
@given(geometry=geometries(), with_bias=st.booleans(), seed=st.integers(0, 9), eps=st.sampled_from([1e-4, 0.5]))
def test_convolution_agrees_with_the_per_patch_oracle(geometry, with_bias, seed, eps):
    shape, weight_shape, how = geometry
    dim, filters = len(weight_shape) - 2, weight_shape[0]
    x, weight = normal(*shape, seed=seed), normal(*weight_shape, seed=seed + 100)
    bias = normal(filters, seed=seed + 200) if with_bias else None
    batched = len(shape) == dim + 2
    theta = oracle.conv_angles(x if batched else x.unsqueeze(0), weight, eps, **how)
    for name, operator, k in operators(filters):
        expected = oracle.g_of_angles(name, theta, k)
        if with_bias:
            expected += bias.view(-1, *[1] * dim)
        got = CONVS[dim](x, weight, operator, bias, eps=eps, **how)
        torch.testing.assert_close(got.detach(), expected if batched else expected.squeeze(0), **EXACT)


@given(geometry=geometries(), name=st.sampled_from(OPERATORS))
def test_gradcheck_of_any_geometry(geometry, name):
    shape, weight_shape, how = geometry
    x, weight = normal(*shape).requires_grad_(), normal(*weight_shape, seed=1).requires_grad_()
    operator = make_operator(name, filters=weight_shape[0]).double()

    def conv(x, weight, *parameters):
        return CONVS[weight.dim() - 2](x, weight, operator, **how)

    assert torch.autograd.gradcheck(conv, (x, weight, *operator.parameters()), fast_mode=True)


@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    features=st.integers(1, 6),
    filters=st.integers(1, 4),
    with_bias=st.booleans(),
    eps=st.sampled_from([1e-4, 0.5]),
)
def test_linear_agrees_with_the_per_row_oracle(leading, features, filters, with_bias, eps):
    x, weight = normal(*leading, features), normal(filters, features, seed=1)
    bias = normal(filters, seed=2) if with_bias else None
    theta = oracle.linear_angles(x, weight, eps)
    for name, operator, k in operators(filters):
        expected = oracle.g_of_angles(name, theta, k, filters=-1)
        if with_bias:
            expected += bias
        torch.testing.assert_close(sphere_linear(x, weight, operator, bias, eps).detach(), expected, **EXACT)


def test_numbers_stand_for_all_dimensions_and_lists_of_one_too():
    x, weight, operator = normal(1, 2, 7, 7), normal(3, 2, 2, 2, seed=1), make_operator("linear")
    expected = sphere_conv2d(x, weight, operator, stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    assert torch.equal(sphere_conv2d(x, weight, operator, stride=2, padding=1, dilation=2), expected)
    assert torch.equal(sphere_conv2d(x, weight, operator, stride=[2], padding=[1], dilation=[2]), expected)


# ---- What holds exactly when ε is nothing


def pair_at(theta, scale=1.0, dtype=torch.float64):
    """(x, w) in five dimensions with the angle `theta` between them, ‖x‖ = scale, ‖w‖ = 1."""
    q, _ = torch.linalg.qr(normal(5, 2, seed=3))
    w, across = q.t()
    return (scale * (math.cos(theta) * w + math.sin(theta) * across)).to(dtype), w.to(dtype)


def gradient(x, w, operator, eps):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sphere_linear(x, w.unsqueeze(0), operator, eps=eps).sum(), x)
    return grad


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("theta", [1e-4, 0.01, 1.0, math.pi / 2, 3.0, math.pi - 1e-4])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_is_tangential_and_as_long_as_the_slope_over_the_norm(name, theta, scale):
    x, w = pair_at(theta, scale)
    operator = make_operator(name).double()
    k = operator.k.item() if name == "learnable-sigmoid" else 0.3
    grad = gradient(x, w, operator, eps=1e-30)
    # At θ = 1e-4 rounding of cos θ (1e-16) moves θ by 1e-12: 1e-8 of itself.
    assert grad.norm().item() == pytest.approx(abs(oracle.slope(name, theta, k)) / scale, rel=1e-7)
    assert abs((x / scale) @ grad).item() < 1e-7 * grad.norm().item()


@pytest.mark.parametrize("theta", [1e-4, 0.01, 1.0, 3.1])
def test_linear_operator_has_a_gradient_of_the_same_length_at_every_angle(theta):
    x, w = pair_at(theta, scale=7.0)
    length = gradient(x, w, make_operator("linear"), eps=1e-30).norm().item()
    assert length == pytest.approx(2 / (math.pi * 7.0), rel=1e-7)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_in_fp32_close_to_the_pole_agrees_with_float64(name):
    # θ = 0.01, 1 - cos θ = 5e-5. Rounding of the cosine in fp32 (1e-7) is worth 2e-3 of sin θ, so 1 % is asked for.
    x, w = pair_at(0.01, dtype=torch.float32)
    single = gradient(x, w, make_operator(name), eps=1e-8)
    double = gradient(x.double(), w.double(), make_operator(name).double(), eps=1e-8)
    assert (single.double() - double).norm() < 1e-2 * double.norm()
    assert double.norm().item() == pytest.approx(abs(oracle.slope(name, 0.01, K[name])), rel=1e-3)


@pytest.mark.parametrize(("a", "b"), [(1e-6, 1.0), (3.0, 1e5), (1e8, 1e-6)])
@pytest.mark.parametrize("name", OPERATORS)
def test_scales_of_input_and_filters_do_not_matter(name, a, b):
    x, weight = normal(2, 4, 5, 5), normal(6, 2, 3, 3, seed=1)
    operator = make_operator(name, filters=6).double()
    how = {"padding": 1, "groups": 2, "eps": 1e-30}
    expected = sphere_conv2d(x, weight, operator, **how)
    torch.testing.assert_close(sphere_conv2d(a * x, b * weight, operator, **how), expected, rtol=0, atol=1e-12)


# ---- Operators of one's own


def cube(cos):
    return cos**3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_callable_of_the_cosine_is_an_operator(dtype):
    x, weight = normal(2, 4, 5, 5, dtype=dtype), normal(6, 2, 3, 3, seed=1, dtype=dtype)
    theta = oracle.conv_angles(x, weight, 1e-4, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2)
    got = sphere_conv2d(x, weight, cube, stride=2, padding=1, groups=2)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), theta.cos() ** 3, rtol=0, atol=tolerance)
    assert got.dtype == dtype


def test_gradcheck_of_a_callable_operator():
    x, weight = normal(2, 4, 4, 4).requires_grad_(), normal(4, 2, 3, 3, seed=1).requires_grad_()

    def conv(x, w):
        return sphere_conv2d(x, w, cube, padding=1, groups=2)

    assert torch.autograd.gradcheck(conv, (x, weight))
    assert torch.autograd.gradgradcheck(conv, (x, weight))
    rows, filters = normal(3, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: sphere_linear(x, w, cube), (rows, filters))


# ---- Memory


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_saves_input_weight_output_and_norms_of_patches_and_filters_only(name, groups):
    x = normal(2, 4, 8, 8, dtype=torch.float32).requires_grad_()
    weight = normal(8, 4 // groups, 3, 3, seed=1, dtype=torch.float32).requires_grad_()
    operator = make_operator(name, filters=8)
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = max(saved.get(tensor.data_ptr(), 0), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = sphere_conv2d(x, weight, operator, padding=1, groups=groups)
    norms = 2 * groups * 8 * 8 + 8
    of_k = 2 * 8 if name == "learnable-sigmoid" else 0  # p and k
    assert {x.data_ptr(), weight.data_ptr(), out.data_ptr()} <= saved.keys()
    assert not [value for value in vars(out.grad_fn).values() if isinstance(value, torch.Tensor)], "hidden from hooks"
    assert sum(saved.values()) <= 4 * (x.numel() + weight.numel() + out.numel() + norms + of_k)


# ---- Differentiation of parts, and by torch.func


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_gradient_of_what_is_trained_does_not_depend_on_what_is_frozen(dim, wanted):
    x = normal(2, 4, *[4] * dim)
    weight = normal(6, 4, *[2] * dim, seed=1)
    function = CONVS.get(dim, sphere_linear)
    upstream = normal(*function(x, weight, make_operator("linear")).shape, seed=2)

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(on) for t, on in zip((x, weight), wanted, strict=True)]
        (function(*leaves, make_operator("linear")) * upstream).sum().backward()
        return [leaf.grad for leaf in leaves]

    for got, expected, on in zip(gradients(wanted), gradients((True, True)), wanted, strict=True):
        assert (got is not None) == on
        if on:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_gradients_of_a_batch_of_upstream_gradients_equal_a_loop(groups, name):
    beta = normal(4, seed=2).requires_grad_()
    if groups:
        x, weight = normal(2, 4, 5, 5), normal(4, 4 // groups, 3, 3, seed=1)
        options = {"stride": 2, "padding": 1, "groups": groups}
    else:
        x, weight, options = normal(2, 3, 4), normal(4, 4, seed=1), {}
    leaves = [x.requires_grad_(), weight.requires_grad_(), beta]
    function = sphere_conv2d if groups else sphere_linear
    y = function(x, weight, make_operator(name), beta=beta, **options)
    upstream = normal(3, *y.shape, seed=3)
    got = torch.autograd.grad(y, leaves, upstream, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in upstream]
    for one, expected in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_torch_jit_trace_records_operations_that_can_be_saved(grad, tmp_path):
    layer, x = SphereConv2d(3, 4, 3, operator="linear"), torch.randn(2, 3, 6, 6)
    with torch.set_grad_enabled(grad):
        torch.jit.trace(layer, x).save(tmp_path / "layer.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "layer.pt")(x), layer(x))


class NoGradient(torch.autograd.Function):
    """The identity, with a backward that returns no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_gradient_comes_of_no_gradient():
    x = normal(2, 4).requires_grad_()
    y = sphere_linear(x, normal(3, 4, seed=1), make_operator("linear"), beta=normal(3, seed=2))
    (NoGradient.apply(y).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_results_without_a_gradient_cost_no_zeros_in_the_backward():
    x = normal(2, 4, 6, 6).requires_grad_()
    y = sphere_conv2d(x, normal(7, 4, 3, 3, seed=1), make_operator("linear"), normal(7, seed=2), padding=1)
    filled = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if "zero" in str(function) and isinstance(result, torch.Tensor):
                filled.append(result.shape)
            return result

    with Watch():
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.shape not in filled


@pytest.mark.parametrize("dim", [0, 2])
def test_tensors_are_made_on_the_device_of_the_input_whatever_the_default_device_is(dim):
    x, weight = normal(2, 4, *[4] * dim).requires_grad_(), normal(6, 4, *[2] * dim, seed=1).requires_grad_()
    function = sphere_conv2d if dim else sphere_linear
    operator, beta = make_operator("linear"), normal(6, seed=2)

    def gradients():
        return torch.autograd.grad(function(x, weight, operator, beta=beta).sum(), [x, weight])

    expected = gradients()
    with torch.device("meta"):
        got = gradients()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


VMAPPED = {
    "conv": (sphere_conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"padding": 1, "groups": 2, "stride": 2}),
    "depthwise": (sphere_conv1d, (2, 3, 6), (3, 1, 3), {"padding": 4, "groups": 3}),
    "linear": (sphere_linear, (2, 3, 5), (4, 5), {}),
}


@pytest.mark.parametrize("case", VMAPPED)
@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_over_inputs_and_over_weights_equals_a_loop(name, case):
    function, x_shape, w_shape, how = VMAPPED[case]
    xs, ws = normal(3, *x_shape), normal(3, *w_shape, seed=1)
    operator = make_operator(name, filters=w_shape[0]).double()

    def value(x, w):
        return function(x, w, operator, **how)

    def loss(x, w):
        return (value(x, w) ** 3).sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    for mapped in [(0, None), (None, 0), (0, 0)]:
        rows = [(xs[i] if mapped[0] == 0 else xs[0], ws[i] if mapped[1] == 0 else ws[0]) for i in range(3)]
        given = (xs if mapped[0] == 0 else xs[0], ws if mapped[1] == 0 else ws[0])
        got = torch.func.vmap(value, in_dims=mapped)(*given)
        torch.testing.assert_close(got, torch.stack([value(*row) for row in rows]), rtol=0, atol=1e-12)
        for got, expected in zip(
            torch.func.vmap(gradients, in_dims=mapped)(*given),
            zip(*[gradients(*row) for row in rows], strict=True),
            strict=True,
        ):
            torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-11)


# ---- Refusals


def conv2d(x=(1, 2, 4, 4), w=(3, 2, 3, 3), x_dtype=torch.float32, w_dtype=torch.float32, **how):
    return lambda: sphere_conv2d(normal(*x).to(x_dtype), normal(*w).to(w_dtype), make_operator("cosine"), **how)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            conv2d(x=(1, 5, 4, 4)),
            r"sphere_conv2d: got x of shape \(1, 5, 4, 4\) and weight of shape \(3, 2, 3, 3\) with groups=1, "
            r"expected 3 or 4 dimensions of x",
        ),
        (conv2d(groups=2), r"with groups=2.*weight.shape\[1\] \* groups channels"),
        (conv2d(x=(2, 4)), r"got x of shape \(2, 4\)"),
        (conv2d(x=(1, 1, 2, 4, 4)), r"got x of shape \(1, 1, 2, 4, 4\)"),
        (conv2d(w=(3, 2, 3)), r"weight of shape \(3, 2, 3\)"),
        (
            lambda: sphere_linear(normal(2, 3), normal(4, 5), make_operator("cosine")),
            r"sphere_linear: got x of shape \(2, 3\) and weight of shape \(4, 5\), expected \(\*, in_features\)",
        ),
        (
            lambda: sphere_linear(normal(), normal(4, 5), make_operator("cosine")),
            r"sphere_linear: got x of shape \(\)",
        ),
        (
            conv2d(w_dtype=torch.float64),
            r"x of torch.float32 and weight of torch.float64, expected one dtype\. Try x\.to\(weight\.dtype\)",
        ),
        (
            conv2d(x_dtype=torch.int64, w_dtype=torch.int64),
            "got tensors of torch.int64, expected one of torch.float64, torch.float32",
        ),
        (conv2d(eps=0), "eps: got 0, expected a positive number; the default is 0.0001"),
        (conv2d(eps=-1e-4), "eps: got -0.0001, expected a positive number"),
        (conv2d(eps=math.nan), "eps: got nan, expected a positive number"),
        (
            conv2d(padding="same", stride=2),
            r"padding='same' needs a stride of 1, got \(2, 2\)\. Give the padding as numbers\.",
        ),
        (conv2d(padding="full"), "padding: got 'full', expected numbers, 'same' or 'valid'"),
        (conv2d(bias=torch.zeros(2)), r"bias: got shape \(2,\), expected \(3,\), one a filter"),
        (conv2d(beta=torch.ones(1)), r"beta: got shape \(1,\), expected \(3,\), one a filter"),
    ],
)
def test_wrong_call_is_refused_with_what_arrived_and_what_to_do(call, text):
    with pytest.raises(UsageError, match=text):
        call()


@pytest.mark.parametrize("count", [2, 16])
def test_a_k_for_each_filter_of_another_number_is_refused(count):
    operator = LearnableSigmoidOperator(count)
    with pytest.raises(UsageError, match=f"{count} values of k, expected 1 or 8"):
        sphere_conv2d(normal(1, 4, 5, 5).float(), normal(8, 4, 3, 3).float(), operator)
    with pytest.raises(UsageError, match=f"{count} values of k, expected 1 or 8"):
        sphere_linear(normal(3, 4).float(), normal(8, 4).float(), operator)
