"""The passes of the CPU, cut into small blocks, against the reference that runs over whole tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphereify.nn.functional import sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear
from sphereify.nn.operators import CosineOperator, LearnableSigmoidOperator, LinearOperator, SigmoidOperator
from sphereify.nn.passes import compiled, cpu
from sphereify.nn.precision import CHANNELS_LAST

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2}
CONVOLUTIONS = {1: sphere_conv1d, 2: sphere_conv2d, 3: sphere_conv3d}


def operators(filters):
    return [CosineOperator(), LinearOperator(), SigmoidOperator(0.3), LearnableSigmoidOperator(filters),
            LearnableSigmoidOperator(1)]  # fmt: skip


@pytest.fixture(autouse=True)
def _blocks_serve():
    with compiled.enabled(False):
        yield


def everything(function, x, weight, operator, **options):
    """Output and gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    operator.to(x.dtype)
    learned = [name for name in ("bias", "beta", "radius") if isinstance(options.get(name), torch.Tensor)]
    own = {name: options[name].detach().requires_grad_() for name in learned}
    y = function(x, weight, operator, eps=0.1, **{**options, **own})
    leaves = [x, weight, *operator.parameters(), *own.values()]
    upstream = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def compare(size, function, x, weight, operator, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK", size)
        got = everything(function, x, weight, operator, **options)
        patch.setattr(cpu, "usable", lambda *_: False)
        expected = everything(function, x, weight, operator, **options)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])


def rescaling(draw, filters, dtype):
    """A bias and β, or one of them, or neither."""
    made = {"bias": torch.linspace(-1, 1, filters), "beta": torch.linspace(0.5, -2, filters)}
    return {name: value.to(dtype) for name, value in made.items() if draw(st.booleans())}


def pools(draw, dtype):
    """No radius, a fixed one or a learned one."""
    radius = draw(st.sampled_from([0.0, 0.0, 0.7, 3.0]))
    return {"radius": torch.tensor([radius], dtype=dtype) if radius and draw(st.booleans()) else radius}


@given(st.data())
def test_convolutions_in_blocks_equal_the_reference(data):
    draw = data.draw
    dim, groups = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 3))
    filters = groups * draw(st.integers(1, 3))
    kernel, size = draw(st.integers(1, 3)), draw(st.integers(4, 7))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    x = torch.randn(draw(st.integers(1, 3)), channels, *[size] * dim, generator=generator).to(dtype)
    weight = torch.randn(filters, channels // groups, *[kernel] * dim, generator=generator).to(dtype)
    if dim > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=CHANNELS_LAST[dim + 2])
    if dim > 1 and draw(st.booleans()):
        weight = weight.contiguous(memory_format=CHANNELS_LAST[dim + 2])
    compare(
        draw(st.sampled_from([1, 16, 100, 10**6])), CONVOLUTIONS[dim], x, weight,
        draw(st.sampled_from(operators(filters))), **rescaling(draw, filters, dtype), **pools(draw, dtype),
        groups=groups, padding=draw(st.integers(0, 2)),
        stride=draw(st.integers(1, 2)), dilation=draw(st.integers(1, 2)) if kernel < 3 else 1,
    )  # fmt: skip


@given(st.sampled_from([(5,), (7, 5), (2, 3, 5), (2, 1, 4, 5)]), st.integers(0, 4), st.sampled_from([1, 8, 10**6]),
       st.sampled_from(list(TOLERANCE)), st.data())  # fmt: skip
def test_linear_maps_in_blocks_equal_the_reference(shape, which, size, dtype, data):
    generator = torch.Generator().manual_seed(len(shape))
    x, weight = torch.randn(shape, generator=generator).to(dtype), torch.randn(4, 5, generator=generator).to(dtype)
    compare(size, sphere_linear, x, weight, operators(4)[which], **rescaling(data.draw, 4, dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_of_another_layout_is_understood(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(6, 4, 3, 3)
    y = sphere_conv2d(x, weight, LinearOperator())
    upstream = torch.randn(y.shape)
    for form in (upstream.clone(), upstream.contiguous(memory_format=torch.channels_last), upstream[..., :1, :1]):
        arranged = form.expand(y.shape)
        (got,) = torch.autograd.grad(y, x, arranged, retain_graph=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "usable", lambda *_: False)
            (expected,) = torch.autograd.grad(y, x, arranged, retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_nothing_that_the_caller_holds_is_written_to():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 6).requires_grad_(), torch.randn(6, 4, 3, 3).requires_grad_()
    upstream = torch.randn(2, 6, 4, 4)
    before = [tensor.detach().clone() for tensor in (x, weight, upstream)]
    y = sphere_conv2d(x, weight, SigmoidOperator())
    shown = y.detach().clone()
    y.backward(upstream)
    for tensor, old in zip((x, weight, upstream, y), (*before, shown), strict=True):
        assert torch.equal(tensor, old)


def test_backward_keeps_input_weight_output_and_norms_of_one_channel():
    x, weight = torch.randn(2, 8, 6, 6).requires_grad_(), torch.randn(16, 8, 3, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        sphere_conv2d(x, weight, SigmoidOperator(), padding=1)
    norms = [torch.Size([2, 1, 6, 6]), torch.Size([16, 1, 1, 1])]
    assert sorted(kept) == sorted([x.shape, weight.shape, torch.Size([2, 16, 6, 6]), *norms])
