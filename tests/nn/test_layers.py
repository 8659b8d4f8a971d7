import copy
import functools
import inspect
import itertools
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sphereify.choices import OPERATORS
from sphereify.errors import UsageError
from sphereify.nn import LinearOperator, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from tests.grids import grid
from tests.nn import oracle
from tests.nn.oracle import normal

CLASSES = {0: SphereLinear, 1: SphereConv1d, 2: SphereConv2d, 3: SphereConv3d}
PLAIN = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# name: (dimensions, the sizes that the layer takes, its geometry, shape of x)
GEOMETRIES = {
    "linear": (0, (4, 3), {}, (2, 2, 4)),
    "1d": (1, (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 6)),
    "2d": (2, (2, 3, 3), {"padding": 1}, (2, 2, 4, 4)),
    "2d-stride": (2, (2, 3, 3), {"padding": (1, 0), "stride": 2}, (1, 2, 6, 5)),
    "2d-groups-dilation": (2, (4, 4, 2), {"groups": 2, "dilation": (1, 2), "padding": (0, 1)}, (1, 4, 3, 4)),
    "2d-depthwise": (2, (3, 6, 3), {"groups": 3, "stride": 2, "padding": 1}, (2, 3, 4, 4)),
    "2d-pointwise-stride": (2, (3, 4, 1), {"stride": 2}, (2, 3, 3, 3)),
    "2d-padding-beyond-reach": (2, (2, 3, 2), {"padding": 2}, (1, 2, 2, 3)),
    "2d-padding-beyond-reach-stride": (2, (2, 3, 2), {"padding": 3, "stride": 2}, (1, 2, 3, 2)),
    "2d-same-even": (2, (2, 2, (2, 4)), {"padding": "same"}, (1, 2, 3, 4)),
    "2d-reflect": (2, (2, 2, 3), {"padding": 1, "padding_mode": "reflect"}, (1, 2, 3, 3)),
    "3d": (3, (2, 2, 2), {"stride": (1, 2, 1), "padding": 1}, (1, 2, 2, 3, 2)),
}
SOME = ("linear", "1d", "2d-stride", "2d-depthwise", "3d")
TWO = ("linear", "2d-groups-dilation")
# Operators and geometries meet where k broadcasts: in the learnable sigmoid, whose k is another in each filter.
PAIRS = [*((geometry, "learnable-sigmoid") for geometry in GEOMETRIES), *itertools.product(TWO, OPERATORS[:3])]
SOME_PAIRS = [*((geometry, "learnable-sigmoid") for geometry in SOME), *(("2d-stride", name) for name in OPERATORS[:3])]


def build(geometry, operator="cosine", *, dtype=torch.float64, classes=CLASSES, **given):
    """A layer with drawn parameters, the same for every call with the same arguments, and an input for it."""
    dim, sizes, how, shape = GEOMETRIES[geometry]
    angular = {"operator": operator} if classes is CLASSES else {}
    layer = classes[dim](*sizes, **how, **angular, **given, dtype=torch.float64)
    for seed, (name, parameter) in enumerate(layer.named_parameters(), start=1):
        parameter.data = normal(*parameter.shape, seed=seed)
        if name == "operator.p":  # away from the kink of |p|
            parameter.data = parameter.data.abs() + 0.1
    return layer.to(dtype), normal(*shape, dtype=dtype)


def expected_output(layer, x):
    """The oracle's answer for a layer, in float64: β·g(θ) + (bias or γ)."""
    name = layer.operator.name
    k = (layer.operator.p.double().abs() + 0.05).tolist() if name == "learnable-sigmoid" else 0.3
    if isinstance(layer, nn.Linear):
        channels, theta = -1, oracle.linear_angles(x, layer.weight, layer.eps)
    else:
        how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        channels, theta = 1, oracle.conv_angles(x, layer.weight, layer.eps, border=layer.padding_mode, **how)
    g = oracle.g_of_angles(name, theta, k, filters=channels).movedim(channels, -1)
    beta = 1.0 if layer.beta is None else layer.beta.detach().double()
    shifts = [p.detach().double() for p in (layer.bias, layer.gamma) if p is not None]
    return (g * beta + sum(shifts)).movedim(-1, channels)


# ---- Values


@pytest.mark.parametrize(("geometry", "operator"), PAIRS)
def test_output_agrees_with_the_oracle(geometry, operator):
    layer, x = build(geometry, operator, rescale=True)
    torch.testing.assert_close(layer(x).detach(), expected_output(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("dim", "how"),
    [
        (1, {"padding": 2, "stride": 2}),
        (1, {"padding": "same", "kernel_size": 2}),
        (2, {"padding": (1, 2), "groups": 2}),
        (2, {"padding": "same", "kernel_size": (4, 3), "dilation": (1, 2)}),
        (3, {"padding": 1, "kernel_size": 2}),
    ],
)
def test_every_padding_mode_agrees_with_the_oracle(dim, how, padding_mode):
    layer = CLASSES[dim](4, 4, **{"kernel_size": 3, **how}, padding_mode=padding_mode, operator="linear").double()
    x = normal(2, 4, *[5, 4, 3][:dim])
    torch.testing.assert_close(layer(x).detach(), expected_output(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", TWO)
def test_bias_and_rescaling_agree_with_the_oracle_in_a_layer_and_in_a_twin(geometry, bias, rescale):
    layer, x = build(geometry, "learnable-sigmoid", bias=bias, rescale=rescale)
    torch.testing.assert_close(layer(x).detach(), expected_output(layer, x), rtol=0, atol=1e-10)
    plain, x = build(geometry, classes=PLAIN, bias=bias)
    layer = twin(plain, operator="learnable-sigmoid", rescale=rescale)
    torch.testing.assert_close(layer(x).detach(), expected_output(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_twin_of_a_plain_layer_agrees_with_the_oracle(geometry):
    plain, x = build(geometry, classes=PLAIN)
    layer = twin(plain, operator="learnable-sigmoid", rescale=True)
    torch.testing.assert_close(layer(x).detach(), expected_output(layer, x), rtol=0, atol=1e-10)


def test_rescaling_starts_as_the_identity_and_bias_stands_for_gamma():
    for bias in (False, True):
        torch.manual_seed(0)
        layer = SphereConv2d(2, 3, 3, rescale=True, bias=bias)
        torch.manual_seed(0)
        without = SphereConv2d(2, 3, 3, bias=bias)
        x = normal(1, 2, 5, 5, dtype=torch.float32)
        torch.testing.assert_close(layer(x), without(x))
        assert (layer.gamma is None) == bias
        assert layer.rescale
        assert not without.rescale
        assert "rescale=True" in repr(layer)


# ---- Gradients


@pytest.mark.parametrize(("geometry", "operator"), PAIRS)
def test_gradcheck_by_input_and_every_parameter(geometry, operator):
    run, leaves = as_function(geometry, operator, rescale=True)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("given", [{"bias": True}, {"bias": False}, {"bias": False, "rescale": True}], ids=str)
@pytest.mark.parametrize("geometry", TWO)
def test_gradcheck_with_and_without_bias_and_rescaling(geometry, given):
    run, leaves = as_function(geometry, "learnable-sigmoid", **given)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(("geometry", "operator"), SOME_PAIRS)
def test_gradgradcheck_by_input_and_every_parameter(geometry, operator):
    run, leaves = as_function(geometry, operator, rescale=True)
    # The slow mode differentiates by each of a thousand numbers: the fast one by a random direction.
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def as_function(geometry, operator, **given):
    layer, x = build(geometry, operator, **given)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return run, (x.requires_grad_(), *parameters)


# ---- Numbers that are hard: zero patches, poles, and every scale

SETTINGS = {  # dtype of the layer, dtype of autocast
    "fp32": (torch.float32, None),
    "autocast-fp16": (torch.float32, torch.float16),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "half": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
}


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def hard_case(kind, operator, x_scale, w_scale, dtype):
    """A layer of three filters, and an input whose four patches are w₀, -w₀, 0 and noise."""
    if kind == "linear":
        layer = SphereLinear(12, 3, bias=False, operator=operator)
    else:
        groups = {"conv": 1, "depthwise": 3}[kind]
        layer = SphereConv2d(3, 3, 2, stride=2, groups=groups, bias=False, operator=operator)
    layer.weight.data = normal(*layer.weight.shape, seed=1).float()
    w = layer.weight.data[0] if kind != "depthwise" else layer.weight.data[:, 0]
    patches = torch.stack([w, -w, torch.zeros_like(w), normal(*w.shape, seed=2).float()])
    x = patches
    if kind != "linear":  # (4, C, 2, 2) -> (1, C, 4, 4)
        x = patches.view(2, 2, 3, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 3, 4, 4)
    layer.weight.data *= w_scale
    return layer.to(dtype), (x * x_scale).to(dtype).requires_grad_()


def by_patch(out):
    """(patches, filters)"""
    return out.detach().float() if out.dim() == 2 else out.detach().float().flatten(2).squeeze(0).t()


SCALES = [(0.0, 1.0), (1e-20, 1e-20), (1.0, 1.0), (300.0, 1.0), (1.0, 1e-20), (1e15, 1e15)]


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_poles_and_zero_patches_are_finite_and_right_at_every_scale(setting, kind):
    for x_scale, w_scale in SCALES:
        check_hard_case(setting, kind, x_scale, w_scale)


@pytest.mark.exhaustive
@pytest.mark.parametrize("w_scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("x_scale", [0.0, 1e-20, 1.0, 300.0, 1e15])
@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_poles_and_zero_patches_are_finite_and_right_at_any_two_scales(setting, kind, x_scale, w_scale):
    check_hard_case(setting, kind, x_scale, w_scale)


def check_hard_case(setting, kind, x_scale, w_scale):
    dtype, amp = SETTINGS[setting]
    if dtype == torch.float16:  # 1e15 is beyond fp16
        x_scale, w_scale = min(x_scale, 2e4), min(w_scale, 2e4)
    # Near the pole θ is the root of twice the error of the cosine, which is ε / ‖w‖² ≈ 1e-5 or the rounding of the
    # unit filter: 2⁻¹² in fp16, 2⁻⁹ in bf16.
    tolerance = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}[amp or dtype]
    for operator in OPERATORS:
        layer, x = hard_case(kind, operator, x_scale, w_scale, dtype)
        with autocast(amp):
            out = layer(x)
        (out.float() * normal(*out.shape, seed=3).float()).sum().backward()
        assert out.isfinite().all()
        assert (by_patch(out)[2] == 0).all(), "a zero patch has no angle"
        # In fp16 the zero patch beside patches of 1e15 is the hard one: d/norm must not exceed 65504 in the backward.
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        if min(x_scale, w_scale) >= 1:
            torch.testing.assert_close(by_patch(out)[:2, 0], torch.tensor([1.0, -1.0]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("geometry", ["linear", "2d-stride", "2d-depthwise"])
def test_low_precision_agrees_with_the_oracle(geometry, setting):
    dtype, amp = SETTINGS[setting]
    layer, x = build(geometry, "linear", dtype=dtype)
    with autocast(amp):
        out = layer(x)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[amp or dtype]  # a few roundings
    torch.testing.assert_close(out.detach().double(), expected_output(layer, x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", SOME)
def test_dtype_of_the_output_is_that_of_torchs_own_layer(geometry, dtype):
    plain, _ = build(geometry, classes=PLAIN, dtype=dtype)
    for rescale, amp in itertools.product([False, True], [None, torch.float16, torch.bfloat16]):
        layer, x = build(geometry, "learnable-sigmoid", dtype=dtype, rescale=rescale)
        with autocast(amp):
            assert layer(x).dtype == plain(x).dtype, (rescale, amp)


class _NormDtypes(TorchDispatchMode):
    """Collects the dtypes in which maps of one channel are added: those that sum the squares of patches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and args[0].shape[1] == 1:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
def test_patch_norms_are_summed_in_fp32_under_cuda_autocast(amp):
    # Autocast on CUDA, unlike that on the CPU, computes sums in half precision: a norm would overflow in fp16
    # as soon as ‖patch‖² exceeds 65504. Fake tensors show it on a machine without a GPU.
    with FakeTensorMode(), _NormDtypes() as norms, torch.no_grad():
        layer, x = SphereConv2d(3, 4, 3, device="cuda"), torch.empty(2, 3, 8, 8, device="cuda")
        before = torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", amp)  # torch.autocast("cuda") would switch itself off
        torch.set_autocast_enabled("cuda", True)
        try:
            out = layer(x)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
    assert out.dtype == amp
    assert set(norms.seen) == {torch.float32}


# ---- Shapes and memory formats


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
def test_channels_last_stays_channels_last_with_the_same_values(operator, groups):
    layer = SphereConv2d(4, 8, 3, padding=1, groups=groups, operator=operator, rescale=True).double()
    x = normal(2, 4, 6, 6)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    out = layer(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-12)
    plain = x.clone().requires_grad_()
    for leaf in (last, plain):
        (layer(leaf) ** 3).sum().backward()
    torch.testing.assert_close(last.grad, plain.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("geometry", SOME)
def test_unbatched_input_is_a_batch_of_one(geometry):
    layer, x = build(geometry, "sigmoid")
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=0, atol=1e-14)
    plain, _ = build(geometry, classes=PLAIN)
    assert layer(x[0]).shape == plain(x[0]).shape


def test_linear_takes_a_single_vector():
    layer, x = build("linear", "learnable-sigmoid")
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("amp", [None, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_empty_batch_goes_forward_and_backward(geometry, amp):
    layer, x = build(geometry, "learnable-sigmoid", dtype=torch.float32, rescale=True)
    empty = x[:0].clone().requires_grad_()
    with autocast(amp):
        out = layer(empty)
    assert out.shape == (0, *layer(x).shape[1:])
    out.sum().backward()
    assert empty.grad.shape == empty.shape
    for name, parameter in layer.named_parameters():
        assert (parameter.grad == 0).all(), name


# ---- What torch does with modules


@pytest.mark.parametrize(
    ("geometry", "operator"),
    grid(itertools.product(["linear", "2d-depthwise"], OPERATORS), lambda _, operator: operator == "learnable-sigmoid"),
)
def test_compiled_layer_has_the_same_values_and_gradients(geometry, operator):
    layer, x = build(geometry, operator, rescale=True)
    assert_compiles_to_the_same(layer, x, atol=1e-12)


@pytest.mark.parametrize(("geometry", "amp"), [("linear", torch.float16), ("2d", torch.bfloat16)])
def test_compiled_layer_has_the_same_values_and_gradients_under_autocast(geometry, amp):
    layer, x = build(geometry, "linear", dtype=torch.float32, rescale=True)
    assert_compiles_to_the_same(layer, x, atol=1e-6, amp=amp)


def assert_compiles_to_the_same(layer, x, *, atol, amp=None):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def value_and_gradients(module):
        leaf = x.clone().requires_grad_()
        with autocast(amp):
            out = module(leaf)
        return out, *torch.autograd.grad((out.to(x.dtype) ** 3).sum(), [leaf, *layer.parameters()])

    for got, expected in zip(value_and_gradients(compiled), value_and_gradients(layer), strict=True):
        torch.testing.assert_close(got, expected, rtol=atol, atol=atol)


@pytest.mark.parametrize(("geometry", "operator"), SOME_PAIRS)
def test_exported_layer_has_the_same_values(geometry, operator):
    layer, x = build(geometry, operator, rescale=True)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("geometry", SOME)
def test_copies_are_equal_and_share_nothing(geometry, again):
    layer, x = build(geometry, "learnable-sigmoid", rescale=True)
    made = again(layer)
    assert torch.equal(made(x), layer(x))
    assert type(made) is type(layer)
    assert repr(made) == repr(layer)
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
@pytest.mark.parametrize("geometry", TWO)
def test_state_dict_has_the_plain_keys_and_those_of_what_is_new(geometry, operator, bias, rescale):
    layer, _ = build(geometry, operator, bias=bias, rescale=rescale)
    plain, _ = build(geometry, classes=PLAIN, bias=bias)
    new = {"beta": rescale, "gamma": rescale and not bias, "operator.p": operator == "learnable-sigmoid"}
    assert layer.state_dict().keys() == plain.state_dict().keys() | {key for key, there in new.items() if there}
    assert isinstance(layer, type(plain))


# ---- from_conv and from_linear


def twin(plain, **given):
    if isinstance(plain, nn.Linear):
        return SphereLinear.from_linear(plain, **given)
    return CLASSES[plain.weight.dim() - 2].from_conv(plain, **given)


def counting_hook(module, args, out):
    module.calls += 1


@pytest.mark.parametrize("geometry", [*SOME, "2d-same-even", "2d-reflect"])
def test_twin_keeps_parameters_hooks_flags_and_attributes(geometry):
    plain, x = build(geometry, classes=PLAIN, dtype=torch.float32)
    plain.note, plain.calls = "mine", 0
    plain.weight.requires_grad_(False)
    plain.register_forward_hook(counting_hook)
    layer = twin(plain.eval(), operator="learnable-sigmoid", rescale=True)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert (layer.note, layer.training, layer.weight.requires_grad) == ("mine", False, False)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "in_features", "out_features"):
        assert getattr(layer, name, None) == getattr(plain, name, None)
    layer(x)
    assert (layer.calls, plain.calls) == (1, 0)


@pytest.mark.parametrize("geometry", TWO)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_a_twin_adds_has_the_dtype_of_the_weight(geometry, dtype):
    plain, _ = build(geometry, classes=PLAIN, dtype=dtype, bias=False)
    layer = twin(plain, operator="learnable-sigmoid", rescale=True)
    assert {name: p.dtype for name, p in layer.named_parameters()} == dict.fromkeys(
        ["weight", "beta", "gamma", "operator.p"], dtype
    )


@pytest.mark.parametrize("geometry", SOME)
def test_plain_layer_is_not_affected_by_its_twin(geometry):
    plain, x = build(geometry, classes=PLAIN)
    before, keys, attributes = plain(x), list(plain.state_dict()), set(vars(plain))
    layer = twin(plain, operator="learnable-sigmoid", rescale=True)
    layer.register_forward_hook(lambda module, args, out: out * 0)
    layer.register_buffer("new", torch.zeros(1))
    layer.train(not plain.training)
    layer.bias = None
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert torch.equal(plain(x), before)
    assert list(plain.state_dict()) == keys
    assert set(vars(plain)) == attributes
    assert plain.training
    assert type(plain) in PLAIN.values()


def test_layers_can_share_one_operator():
    operator = LinearOperator()
    layers = [SphereConv2d(2, 3, 1, operator=operator), SphereLinear(3, 4, operator=operator)]
    assert all(layer.operator is operator for layer in layers)


def test_callable_operator_serves_a_layer():
    layer, x = build("2d-stride", lambda cos: cos**3)
    cosine, _ = build("2d-stride", "cosine")
    shift = layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), (cosine(x) - shift) ** 3 + shift, rtol=0, atol=1e-12)


def cubed(cos):
    return cos**3


class Cubed:
    def __call__(self, cos):
        return cos**3


@pytest.mark.parametrize("geometry", ["linear", "2d"])
def test_repr_names_the_operator_module_or_function(geometry):
    assert ", operator=cubed, rescale=False" in repr(build(geometry, cubed)[0])
    assert "(operator): LinearOperator()" in repr(build(geometry, "linear")[0])
    assert "operator=functools.partial(" in repr(build(geometry, functools.partial(torch.mul, 1.0))[0])
    assert ", operator=Cubed, rescale=False" in repr(build(geometry, Cubed())[0])


@pytest.mark.parametrize("dim", CLASSES)
def test_signature_is_that_of_torchs_layer_with_the_options_of_an_angular_one(dim):
    parameters = inspect.signature(CLASSES[dim]).parameters
    plain = inspect.signature(PLAIN[dim]).parameters
    own = [
        "operator",
        "rescale",
        *(["radius", "learn_radius"] if "conv" in CLASSES[dim].__name__.lower() else []),
        "magnitude",
        "weighted",
        "eps",
    ]
    assert list(parameters) == [*plain, *own]
    assert all(parameters[name].default == plain[name].default for name in plain)
    assert {parameters[name].kind for name in own} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())


# ---- The output in place


@pytest.mark.parametrize("geometry", ["linear", "2d"])
def test_output_is_copied_where_backward_needs_it_unless_it_is_only_read(geometry):
    layer, x = build(geometry, "linear", bias=False)

    def saves_its_output():
        y = layer(x)
        return y.grad_fn is not None and type(y.grad_fn).__name__ == "_SphereMapBackward"

    assert not saves_its_output()
    layer.output_read_only = True
    assert saves_its_output()
    layer.register_forward_hook(lambda module, args, out: None)  # it may write to what it gets
    assert not saves_its_output()


# ---- Refusals


def test_twin_of_another_layer_or_of_no_module_is_a_type_error():
    with pytest.raises(TypeError, match=r"SphereConv2d: got Conv1d, expected a torch\.nn\.Conv2d"):
        SphereConv2d.from_conv(nn.Conv1d(2, 2, 1))
    with pytest.raises(TypeError, match=r"SphereLinear: got Tensor, expected a torch\.nn\.Linear"):
        SphereLinear.from_linear(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"operator": "sigmiod"}, "operator: got 'sigmiod', expected one of .*Did you mean 'sigmoid'"),
        ({"operator": 7}, "operator: got 7, expected a name or a callable"),
        ({"eps": 0}, "eps: got 0, expected a positive number; the default is 0.0001"),
        ({"eps": -1.0}, "eps: got -1.0, expected a positive number"),
    ],
)
@pytest.mark.parametrize("geometry", TWO)
def test_wrong_argument_is_refused_by_constructor_and_twin(geometry, given, text):
    with pytest.raises(UsageError, match=text):
        build(geometry, **{"operator": "cosine", **given})
    plain, _ = build(geometry, classes=PLAIN)
    with pytest.raises(UsageError, match=text):
        twin(plain, **given)


@pytest.mark.parametrize("geometry", SOME)
def test_wrong_input_is_refused_with_both_shapes_or_dtypes(geometry):
    layer, x = build(geometry)
    with pytest.raises(UsageError, match=r"got x of shape .* and weight of shape"):
        layer(x.narrow(-1 if geometry == "linear" else 1, 0, 1))
    with pytest.raises(UsageError, match=r"x of torch.float32 and weight of torch.float64"):
        layer(x.float())
