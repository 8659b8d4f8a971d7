"""The passes that Inductor compiles: what they compute, compiled and as they are written, and when they serve."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sphereify.nn import arcsine
from sphereify.nn.functional import sphere_conv2d, sphere_linear
from sphereify.nn.operators import CURVES, CosineOperator, LinearOperator
from sphereify.nn.passes import compiled, cpu
from tests.nn.oracle import normal
from tests.nn.passes.test_cpu import CONVOLUTIONS, TOLERANCE, everything, operators, pools, rescaling

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def served(monkeypatch):
    """The passes that were compiled, by the names of their functions; they run as they are written."""
    return as_written(monkeypatch)


def as_written(patch):
    """Let the passes serve tensors of every size, uncompiled."""
    names = []

    def compile_nothing(function, **options):
        assert options == {"dynamic": True, "fullgraph": True}
        names.append(function.__name__.rstrip("0123456789").strip("_"))
        return function

    patch.setattr(torch, "compile", compile_nothing)
    patch.setattr(compiled, "_compiled", compiled._compiled.__wrapped__)
    patch.setattr(compiled, "SMALLEST", 0)
    patch.setattr(compiled, "_has_compiler", lambda: True)
    patch.setattr(compiled._switch, "on", True)
    patch.setattr(compiled._switch, "failed", False)
    return names


def compare(function, x, weight, operator, **options):
    with pytest.MonkeyPatch.context() as patch:
        names = as_written(patch)
        got = everything(function, x, weight, operator, **options)
        assert names == ([] if isinstance(operator, CosineOperator) else ["curve", "curve_backward"])
        patch.setattr(compiled._switch, "on", False)
        patch.setattr(cpu, "usable", lambda *_: False)
        expected = everything(function, x, weight, operator, **options)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])


@given(st.data())
def test_convolutions_equal_the_reference(data):
    draw = data.draw
    dim, groups = draw(st.sampled_from([1, 2, 2])), draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, size, dtype = draw(st.integers(1, 3)), draw(st.integers(4, 7)), draw(st.sampled_from(list(TOLERANCE)))
    x = normal(draw(st.integers(1, 3)), channels, *[size] * dim, seed=kernel).to(dtype)
    weight = normal(filters, channels // groups, *[kernel] * dim, seed=size).to(dtype)
    if dim > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    operator = draw(st.sampled_from(operators(filters)))
    options = {**rescaling(draw, filters, dtype), **pools(draw, dtype)}
    compare(CONVOLUTIONS[dim], x, weight, operator, **options, groups=groups, padding=1, stride=draw(st.integers(1, 2)))


@given(st.sampled_from([(5,), (7, 5), (2, 1, 4, 5)]), st.integers(0, 4), st.sampled_from(list(TOLERANCE)), st.data())
def test_linear_maps_equal_the_reference(shape, which, dtype, data):
    x, weight = normal(*shape).to(dtype), normal(4, 5, seed=1).to(dtype)
    compare(sphere_linear, x, weight, operators(4)[which], **rescaling(data.draw, 4, dtype))


# ---- When they serve


def step(x, weight, operator=LinearOperator):
    return torch.autograd.grad(sphere_conv2d(x, weight, operator()).square().sum(), [x, weight])


def test_training_on_large_tensors_alone_is_served(served, monkeypatch):
    x, weight = normal(2, 2, 4, 4).requires_grad_(), normal(3, 2, 3, 3, seed=1).requires_grad_()
    with torch.no_grad():
        sphere_conv2d(x, weight, LinearOperator())
    with FlopCounterMode(display=False) as counter:
        step(x, weight)
    assert not served
    assert counter.get_total_flops() > 0
    step(x, weight)
    assert served == ["curve", "curve_backward"]
    with compiled.enabled(False):
        step(x, weight)
    monkeypatch.setattr(compiled, "SMALLEST", 2 * 3 * 2 * 2 + 1)
    step(x, weight)
    step(x, weight, CosineOperator)
    assert len(served) == 2


class Counter(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.calls += 1
        return function(*arguments, **(options or {}))


def test_modes_see_the_operations_of_the_passes(served):
    x, weight = normal(2, 2, 4, 4).requires_grad_(), normal(3, 2, 3, 3, seed=1).requires_grad_()
    with Counter() as counter:
        step(x, weight)
    assert counter.calls > 0
    assert "curve" not in served  # the backward is one operation to a mode of this kind
    served.clear()
    with torch.device("cpu"):
        step(x, weight)
    assert served == ["curve", "curve_backward"]


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile", None])
def test_nothing_is_compiled_where_the_user_forbids_it(served, stance):
    x, weight = normal(2, 2, 4, 4).requires_grad_(), normal(3, 2, 3, 3, seed=1).requires_grad_()
    disabled = torch._dynamo.config.patch(disable=True)  # as TORCH_COMPILE_DISABLE=1
    with disabled if stance is None else torch.compiler.set_stance(stance):
        step(x, weight)
    assert not served


@pytest.mark.parametrize("early", [False, True])
def test_a_pass_that_cannot_be_compiled_warns_once_and_the_blocks_serve(served, early, monkeypatch):
    x, weight = normal(2, 2, 4, 4).requires_grad_(), normal(3, 2, 3, 3, seed=1).requires_grad_()
    with compiled.enabled(False):
        expected = step(x, weight)

    def fail(function, **options):
        def run(*arguments):
            raise RuntimeError("no compiler\nand more")

        return run() if early else run

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.warns(RuntimeWarning, match=r"pass curve .*RuntimeError: no compiler\).*SPHEREIFY_COMPILED_PASSES"):
        first = step(x, weight)
    second = step(x, weight)  # a warning would be an error here
    for got in (first, second):
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
    assert "could not be compiled" in compiled.state()


@pytest.mark.processes
def test_a_folder_for_compiled_code_that_cannot_be_made_stops_no_training(tmp_path):
    """torch makes the folder when it imports its compiler, so this needs a process of its own."""
    file = tmp_path / "file"
    file.touch()
    code = """if True:
        import torch
        from sphereify.nn.functional import sphere_linear
        from sphereify.nn.operators import LinearOperator
        from sphereify.nn.passes import compiled

        compiled.SMALLEST, compiled._has_compiler = 0, lambda: True
        weight = torch.ones(2, 3).requires_grad_()
        sphere_linear(torch.eye(3), weight, LinearOperator()).sum().backward()
        print(compiled.state())
    """
    environment = os.environ | {"SPHEREIFY_COMPILED_PASSES": "1", "TORCHINDUCTOR_CACHE_DIR": str(file / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "given up, since a curve could not be compiled\n"
    assert "Not a directory" in done.stderr


# ---- Compiled


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("which", "layout"), [(1, "channels_last"), (2, "contiguous"), (3, "channels_last"), (4, "contiguous")]
)
def test_compiled_passes_equal_the_reference_in_float64_for_any_size(which, layout, monkeypatch):
    monkeypatch.setattr(compiled, "SMALLEST", 0)
    calls = []
    run = compiled._run
    monkeypatch.setattr(compiled, "_run", lambda *a, **k: calls.append(a[0]) or run(*a, **k))
    for size, groups, rescaled in ((9, 1, True), (12, 1, False), (7, 1, True), (8, 2, True)):
        x = normal(3, 6, size, size, seed=size).contiguous(memory_format=LAYOUTS[layout])
        weight = normal(6, 6 // groups, 3, 3, seed=1)
        own = {"bias": torch.linspace(-1, 1, 6), "beta": torch.linspace(0.5, -2, 6)} if rescaled else {}
        how = {"groups": groups, "padding": 1, "stride": 2, "radius": 2.0}
        double = {name: value.double() for name, value in own.items()}
        expected = everything(sphere_conv2d, x, weight, operators(6)[which], **double, **how)
        calls.clear()
        with compiled.enabled():
            got = everything(sphere_conv2d, x.float(), weight.float(), operators(6)[which], **own, **how)
        assert len(calls) == 2
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)
    assert not compiled._switch.failed


@pytest.mark.exhaustive
def test_one_compilation_serves_all_sizes(monkeypatch):
    monkeypatch.setattr(compiled, "SMALLEST", 0)
    graphs = torch._dynamo.utils.counters["stats"]
    compiled._compiled.cache_clear()
    counts = []
    for rows, width in ((10, 6), (12, 6), (33, 20), (500, 64), (2000, 192)):
        x, weight = torch.randn(rows, width).requires_grad_(), torch.randn(width + 1, width).requires_grad_()
        with compiled.enabled():
            sphere_linear(x, weight, LinearOperator()).sum().backward()
        counts.append(graphs["unique_graphs"])
    assert counts[0] == counts[1] == counts[2]
    assert counts[-1] - counts[0] <= 1  # another way to sum many rows


# ---- Polynomials


def test_arcsine_and_sine_err_by_rounding():
    cos = torch.cat([torch.linspace(-1, 1, 200001), torch.logspace(-20, 0, 1000), -torch.logspace(-20, 0, 1000)])
    exact = cos.double().asin()
    assert (arcsine.arcsin_in_right_angles(cos).double() * (torch.pi / 2) - exact).abs().max() < 1.1e-7
    assert (arcsine.sine_of_right_angles(cos).double() - (cos.double() * torch.pi / 2).sin()).abs().max() < 2e-7
    ends = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(arcsine.arcsin_in_right_angles(ends), ends)


@pytest.mark.parametrize("name", ["linear", "sigmoid"])
def test_polynomials_take_the_place_of_functions_where_fp32_is_compiled_for_a_cpu(name):
    operations = []

    def record(module, inputs):
        operations.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def value_and_slope(cos):
        return CURVES[name].value(cos, 0.3), CURVES[name].slope(cos, 0.3, 1e-3)

    for dtype, functions in ((torch.float32, set()), (torch.float64, {"asin", "sin", "cos"})):
        operations.clear()
        torch.compile(value_and_slope, backend=record, fullgraph=True)(torch.linspace(-1, 1, 5, dtype=dtype))
        assert {"asin", "sin", "cos"} & set(operations) == functions
