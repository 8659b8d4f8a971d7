"""The compiled passes: what they compute, where they serve, and how they are compiled."""

import itertools
import math
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sphereify.nn import arcsine
from sphereify.nn.functional import sphere_conv2d, sphere_linear
from sphereify.nn.operators import CURVES, LearnableSigmoidOperator, LinearOperator, SigmoidOperator
from sphereify.nn.passes import compiled, cpu, library, self_check
from sphereify.nn.precision import CHANNELS_LAST
from tests.grids import grid
from tests.nn.oracle import normal
from tests.nn.passes.test_cpu import CONVOLUTIONS, everything, operators, pools, rescaling

TOLERANCE = 2e-5
pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs a C++ compiler on Linux")


@pytest.fixture
def called(monkeypatch):
    """The functions of the library that were called, in order."""
    return record_calls(monkeypatch)


def record_calls(patch):
    names, call = [], compiled._call
    patch.setattr(compiled, "_call", lambda name, *arguments: names.append(name) or call(name, *arguments))
    patch.setattr(compiled._switch, "on", True)
    return names


def compare(function, x, weight, operator, **options):
    """The passes in fp32 against the reference in float64."""
    double = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        names = record_calls(patch)
        got = everything(function, x.float(), weight.float(), operator, **options)
        assert {"curve", "curve_backward", "filter_gradient"} <= set(names)
    expected = everything(function, x, weight, operator, **double)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE, atol=TOLERANCE)


@given(st.data())
def test_convolutions_equal_the_reference_in_float64(data):
    draw = data.draw
    dim, groups = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = groups * draw(st.sampled_from([1, 2, 5])), groups * draw(st.sampled_from([1, 3, 8]))
    kernel, size = draw(st.integers(1, 3)), draw(st.integers(5, 9))
    x = normal(draw(st.integers(1, 3)), channels, *range(size, size + dim), seed=kernel)
    weight = normal(filters, channels // groups, *[kernel] * dim, seed=size)
    if dim > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=CHANNELS_LAST[dim + 2])
    if dim > 1 and draw(st.booleans()):
        weight = weight.contiguous(memory_format=CHANNELS_LAST[dim + 2])
    compare(
        CONVOLUTIONS[dim], x, weight, draw(st.sampled_from(operators(filters))),
        **rescaling(draw, filters, torch.float32), **pools(draw, torch.float32), groups=groups,
        padding=draw(st.integers(0, 2)), stride=draw(st.integers(1, 3)), dilation=draw(st.integers(1, 2)),
    )  # fmt: skip


@given(st.sampled_from([(5,), (7, 5), (2, 1, 4, 5)]), st.integers(0, 4), st.data())
def test_linear_maps_equal_the_reference_in_float64(shape, which, data):
    x, weight = normal(*shape), normal(4, 5, seed=1)
    compare(sphere_linear, x, weight, operators(4)[which], **rescaling(data.draw, 4, torch.float32))


@pytest.mark.parametrize(
    ("groups", "layout"),
    grid(
        itertools.product((1, 2, 24), (torch.contiguous_format, torch.channels_last)),
        lambda groups, layout: (groups, layout) in ((1, torch.channels_last), (24, torch.contiguous_format)),
    ),
)
def test_large_tensors_shared_by_several_threads_equal_the_reference_in_float64(layout, groups):
    x = normal(2, 24, 45, 33).contiguous(memory_format=layout)
    rescaled = {"bias": torch.linspace(-1, 1, 48), "beta": torch.linspace(0.5, -2, 48)}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        compare(sphere_conv2d, x, normal(48, 24 // groups, 3, 3, seed=1), operators(48)[3], groups=groups, padding=1,
                **rescaled)  # fmt: skip
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("k", [0.003, 0.05, 0.3, 2.0])
def test_the_curves_of_the_sigmoid_hold_at_the_poles_for_every_k(k):
    weight = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0], [3.0, 4.001]])
    x = torch.tensor([[6.0, 8.0], [0.6, 0.8], [0.0, 0.0], [1.0, -1.0]])
    compare(sphere_linear, x.double(), weight.double(), SigmoidOperator(k))


def test_infinities_and_no_numbers_stay_what_they_are():
    x = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [1.0, 2.0]])
    g = sphere_linear(x, torch.eye(2), LinearOperator())
    assert g.isnan().any(1).tolist() == [True, True, False]


def test_nothing_that_the_caller_holds_is_written_to():
    x, weight = normal(2, 4, 6, 6).float().requires_grad_(), normal(6, 4, 3, 3, seed=1).float().requires_grad_()
    upstream = normal(2, 6, 4, 4, seed=2).float()
    before = [tensor.detach().clone() for tensor in (x, weight, upstream)]
    y = sphere_conv2d(x, weight, SigmoidOperator())
    shown = y.detach().clone()
    y.backward(upstream)
    for tensor, old in zip((x, weight, upstream, y), (*before, shown), strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("activation", [F.relu, F.hardswish])
@pytest.mark.parametrize(
    ("layout", "groups"), [("rows", 1), ("channels_last", 6), ("channels_last", 2), ("contiguous", 2)]
)
def test_an_activation_behind_a_folded_layer_is_torchs(activation, layout, groups):
    dot = 4 * normal(3, 6, *[5] * 2 * (layout != "rows")).float()
    norm = 0.5 + normal(3, groups, *[5] * 2 * (layout != "rows"), seed=1).float().abs()
    projection = None if layout == "rows" else compiled.Projection((1, 1), (0, 0), (1, 1), groups)
    if layout == "channels_last":
        dot, norm = (t.contiguous(memory_format=torch.channels_last) for t in (dot, norm))
    scale, shift = torch.linspace(-1, 2, 6), torch.linspace(-1, 1, 6)
    plain, activated = (
        compiled.folded(dot.clone(), norm, "cosine", None, projection, scale, shift, name)
        for name in (None, activation.__name__)
    )
    torch.testing.assert_close(activated, activation(plain))


# ---- Where they serve


def step(x, weight):
    return torch.autograd.grad(sphere_conv2d(x, weight, LinearOperator()).square().sum(), [x, weight])


def operands(dtype=torch.float32):
    return normal(2, 2, 4, 4).to(dtype).requires_grad_(), normal(3, 2, 3, 3, seed=1).to(dtype).requires_grad_()


class Counter(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.calls += 1
        return function(*arguments, **(options or {}))


def test_modes_that_count_or_record_operations_see_all_of_them(called):
    x, weight = operands()
    with FlopCounterMode(display=False) as flops:
        step(x, weight)
    with Counter() as counter, torch.no_grad():
        sphere_conv2d(x, weight, LinearOperator())
    assert not called
    assert flops.get_total_flops() > 0
    assert counter.calls > 3
    with torch.device("meta"):
        step(x, weight)
    assert "curve_backward" in called


def test_other_dtypes_and_layouts_are_served_by_the_other_passes(called):
    for dtype in (torch.float64, torch.bfloat16):
        step(*operands(dtype))
    x, weight = operands()
    step(x.transpose(2, 3), weight)
    with torch.no_grad():
        sphere_conv2d(x, weight.transpose(2, 3), LinearOperator())
    assert not called


@pytest.mark.parametrize("change", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)])
def test_tensors_that_are_not_what_lies_in_memory_are_served_by_others(change, called):
    x, weight = (tensor.detach() for tensor in operands())
    bias = normal(3, seed=2).float()

    def results():
        outputs = [
            sphere_conv2d(change(x), weight, LinearOperator()),
            sphere_conv2d(x, change(weight), LinearOperator()),
            sphere_conv2d(x, weight, LinearOperator(), change(bias)),
        ]
        for each in (x, weight):
            each.requires_grad_()
        y = sphere_conv2d(x, weight, LinearOperator())
        gradients = torch.autograd.grad(y, [x, weight], change(y.detach()))
        for each in (x, weight):
            each.requires_grad_(False)
        return [*outputs, *gradients]

    got = results()
    assert "curve" in called
    with compiled.enabled(False):
        for one, other in zip(got, results(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["bias", "beta", "k"])
def test_constants_on_another_device_are_refused(name, called):
    x, weight = (tensor.detach() for tensor in operands())
    operator = LearnableSigmoidOperator(3)
    options = {name: torch.ones(3, device="meta")} if name != "k" else {}
    with pytest.raises(RuntimeError, match="same device"):
        sphere_conv2d(x, weight, operator.to("meta") if name == "k" else operator, **options)


def test_a_weight_on_another_device_is_left_to_torch(called):
    x, weight = (tensor.detach() for tensor in operands())
    with suppress(RuntimeError):  # torch 2.14 answers with zeros
        sphere_conv2d(x, weight.to("meta"), LinearOperator())
    assert not called


def test_an_epsilon_in_a_tensor_is_the_number(called):
    x, weight = (tensor.detach() for tensor in operands())
    got, expected = (sphere_conv2d(x, weight, LinearOperator(), eps=eps) for eps in (torch.tensor(0.5), 0.5))
    assert "curve" in called
    assert torch.equal(got, expected)


def test_switched_off_they_serve_nothing(called):
    with compiled.enabled(False):
        step(*operands())
        assert "switched off" in compiled.state()
    assert not called


def outcome_without(monkeypatch, match):
    """A step in blocks, after one warning, and once more without."""
    monkeypatch.setattr(compiled._switch, "failed", False)
    monkeypatch.setattr(self_check, "_trusted", set())
    x, weight = operands()
    with compiled.enabled(False):
        expected = step(x, weight)
    with pytest.warns(RuntimeWarning, match=match) as caught:
        first = step(x, weight)
    assert len(caught) == 1
    second = step(x, weight)  # a warning would be an error here
    for got in (first, second):
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
    assert "given up" in compiled.state()


def test_a_loop_that_is_wrong_is_found_before_its_first_use(monkeypatch):
    call = compiled._call

    def wrong(name, *arguments):
        call(name, *arguments)
        if name == "box_sum":
            arguments[-1].mul_(1.001)

    monkeypatch.setattr(compiled, "_call", wrong)
    outcome_without(monkeypatch, r"\(patch_norm\).*away from the reference.*SPHEREIFY_COMPILED_PASSES")


# ---- How they are compiled


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder without a library, for a process that has not loaded one."""
    monkeypatch.setenv("SPHEREIFY_CACHE", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield tmp_path / "cache"
    library.load.cache_clear()


def test_a_compiler_that_fails_is_quoted_in_one_warning(monkeypatch, fresh):
    monkeypatch.setattr(library, "compiler", lambda: (sys.executable,))
    outcome_without(monkeypatch, r"\(compilation\).*python.* ended with [12]: ")
    assert not list(fresh.iterdir())


@pytest.mark.exhaustive
def test_the_library_is_compiled_once_and_kept(monkeypatch, fresh):
    library.load()
    (kept,) = fresh.iterdir()
    monkeypatch.setattr(library, "_compile", None)
    library.load.cache_clear()
    assert set(library.load()) == set(library.FUNCTIONS)
    assert list(fresh.iterdir()) == [kept]


@pytest.mark.parametrize("name", [library.SOURCE, *library.HEADERS])
def test_a_file_of_the_source_that_has_changed_makes_another_library(name, monkeypatch, tmp_path):
    before = library._file_name(library._source(), ())
    for each in (library.SOURCE, *library.HEADERS):
        (tmp_path / each).write_text(library._text(each))
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert library._file_name(library._source(), ()) == before
    (tmp_path / name).write_text("// changed\n")
    assert library._file_name(library._source(), ()) != before


def test_every_header_that_is_included_is_known():
    included = {
        name
        for file in (library.SOURCE, *library.HEADERS)
        for name in re.findall(r'^#include "(.*)"', library._text(file), re.MULTILINE)
    }
    assert included == set(library.HEADERS)


@pytest.mark.exhaustive
def test_where_no_cache_can_be_kept_each_process_compiles(monkeypatch, tmp_path, fresh):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPHEREIFY_CACHE", str(tmp_path / "file" / "cache"))
    assert set(library.load()) == set(library.FUNCTIONS)


@pytest.mark.exhaustive
def test_a_library_that_is_not_whole_is_compiled_again(monkeypatch, fresh):
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O0"))
    library.load()
    (kept,) = fresh.iterdir()
    whole = kept.read_bytes()
    for part in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], whole[:-32]):
        kept.unlink()  # it is loaded, and a loaded file must not be cut
        kept.write_bytes(part)
        assert not library._is_whole(kept)
    kept.write_bytes(whole[: len(whole) // 2])
    library.load.cache_clear()
    assert set(library.load()) == set(library.FUNCTIONS)
    assert library._is_whole(kept)


@pytest.mark.parametrize("value", grid(["env g++", "g++ -g0", " g++ ", ""], lambda value: value in ("env g++", "")))
def test_the_compiler_may_have_arguments(monkeypatch, fresh, value):
    monkeypatch.setenv("CXX", value)
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O0"))
    monkeypatch.setattr(library, "compiler", library.compiler.__wrapped__)
    assert set(library.load()) == set(library.FUNCTIONS)
    assert len(list(fresh.iterdir())) == 1


def test_a_compiler_that_is_named_and_missing_is_none(monkeypatch):
    for value in ("no-such-compiler", "no-such-ccache g++"):
        monkeypatch.setenv("CXX", value)
        assert library.compiler.__wrapped__() is None


@pytest.mark.processes
def test_the_source_is_given_in_utf8_whatever_the_locale_is(fresh):
    code = "from sphereify.nn.passes import library; library.FLAGS += ('-O0',); print(len(library.load()))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{len(library.FUNCTIONS)}\n", done.stderr


def test_the_folder_is_no_part_of_the_working_folder(monkeypatch):
    monkeypatch.setenv("SPHEREIFY_CACHE", "here")
    assert library._folder().is_absolute()
    monkeypatch.delenv("SPHEREIFY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without a home
    with pytest.raises(FileNotFoundError, match="no folder for caches"):
        library._folder()


@pytest.mark.processes
def test_processes_that_start_at_once_share_one_library(tmp_path):
    code = "from sphereify.nn.passes import library; print(len(library.load()))"
    environment = os.environ | {"SPHEREIFY_CACHE": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
               for _ in range(3)]  # fmt: skip
    assert [process.communicate()[0] for process in started] == [f"{len(library.FUNCTIONS)}\n"] * 3
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_compiler_the_blocks_serve_and_nothing_is_said(monkeypatch, called):
    monkeypatch.setattr(library, "compiler", lambda: None)
    step(*operands())
    assert not called
    assert "C++ compiler" in compiled.state()


# ---- Polynomials


def test_arcsine_and_sine_err_by_rounding():
    cos = torch.cat([torch.linspace(-1, 1, 200001), torch.logspace(-20, 0, 1000), -torch.logspace(-20, 0, 1000)])
    exact = cos.double().asin()
    assert (arcsine.arcsin_in_right_angles(cos).double() * (torch.pi / 2) - exact).abs().max() < 1.1e-7
    assert (arcsine.sine_of_right_angles(cos).double() - (cos.double() * torch.pi / 2).sin()).abs().max() < 2e-7
    ends = torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(arcsine.arcsin_in_right_angles(ends), ends)


@pytest.mark.parametrize("name", ["linear", "sigmoid"])
def test_compiled_curves_err_by_rounding(name):
    """Over numbers in [-1, 1], densest at the poles and at 0."""
    source = torch.Generator().manual_seed(0)
    small = torch.logspace(-20, -1, 50_000)
    cos = torch.cat([torch.rand(100_000, generator=source), small, 1 - small, torch.tensor([0.0, 1.0])])
    cos = torch.cat([cos, -cos]).view(-1, 4)
    g, _ = compiled.curve(cos.clone(), torch.ones(len(cos), 1), name, 0.3, None, None, None)
    exact = CURVES[name].value(cos.double(), 0.3)
    assert (g.double() - exact).abs().max() < {"linear": 0.6e-7, "sigmoid": 2.7e-7}[name]
    if name == "linear":  # small cosines keep their digits
        assert ((g.double() - exact) / exact)[exact != 0].abs().max() < 6e-7
    folded = compiled.folded(cos.clone(), torch.ones(len(cos), 1), "linear", None, None, None, None)
    assert (folded.double() - cos.double().asin()).abs().max() < 1.7e-7


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


def test_a_pass_in_blocks_serves_what_the_library_does_not(called):
    """Windows of three dimensions."""
    x, weight = normal(1, 2, 4, 4, 4).float(), normal(3, 2, 2, 2, 2, seed=1).float()
    got = cpu.patch_norm(x, (2, 2, 2), 1e-4, projection := compiled.Projection((1,) * 3, (0,) * 3, (1,) * 3, 1))
    assert torch.equal(compiled.patch_norm(x, weight.shape[2:], 1e-4, projection), got)
    assert not called
