"""When the passes are compared with the reference, and that the comparison finds what is wrong."""

import math
import warnings

import pytest
import torch

from sphereify.nn.geometry import Projection
from sphereify.nn.passes import compiled, cpu, reference, self_check, with_passes
from sphereify.nn.passes import triton as kernels
from sphereify.nn.passes.protocol import AngularMap
from sphereify.nn.passes.self_check import Kind
from tests.nn.oracle import normal
from tests.nn.passes.test_choice import METHODS
from tests.nn.passes.test_triton import needs_triton, run_kernels

CPU = torch.device("cpu")


def test_each_pass_of_the_protocol_is_compared():
    assert set(self_check.PASSES) == set(METHODS)


@pytest.mark.triton
@needs_triton
def test_a_broken_kernel_is_found_before_its_first_use():
    run_kernels("broken and (epilogue or correct)", "1", file="kernels_self_check.py")


@needs_triton
@pytest.mark.triton
def test_each_kernel_is_checked_once_and_what_the_caller_has_switched_on_stays_out():
    run_kernels("not epilogue and not correct", "1", file="kernels_self_check.py")


@pytest.mark.parametrize("layout", self_check.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("maker", [reference, cpu, *[compiled] * compiled.serves()], ids=lambda maker: maker.__name__)
def test_the_passes_of_a_cpu_agree_with_room_to_spare(maker, dtype, layout):
    found = list(self_check.deviations(maker, Kind(CPU, dtype, dtype, layout)))
    assert {deviation.name for deviation in found} == set(self_check.PASSES)
    assert all(deviation.deviation <= deviation.allowed / 3 for deviation in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", self_check.PASSES)
def test_a_result_that_is_off_by_three_units_in_the_last_place_disagrees(name, dtype, monkeypatch):
    """In fp32 by as many units as the longest sum has terms."""
    right = getattr(cpu, name)

    def wrong(*args):
        got = right(*args)
        each = got if isinstance(got, tuple) else (got,)
        off = tuple(
            None
            if t is None
            else t * (1 + 4 * self_check.allowed(t.dtype, max(c.longest_sum for c in self_check.CASES)))
            for t in each
        )
        return off if isinstance(got, tuple) else off[0]

    monkeypatch.setattr(cpu, name, wrong)
    found = list(self_check.deviations(cpu, Kind(CPU, dtype, dtype, "contiguous")))
    assert {deviation.name for deviation in found if not deviation.agrees} == {name}


@pytest.mark.parametrize("spoil", [lambda t: t * math.nan, lambda t: t[:1], lambda t: None])
def test_what_is_no_number_or_has_another_shape_disagrees(spoil, monkeypatch):
    right = cpu.patch_norm
    monkeypatch.setattr(cpu, "patch_norm", lambda *args: spoil(right(*args)))
    found = list(self_check.deviations(cpu, Kind(CPU, torch.float32, torch.float32, "linear")))
    assert {(d.name, d.deviation) for d in found if not d.agrees} == {("patch_norm", math.inf)}


def test_operands_are_the_same_in_each_call_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = (
        self_check.make_operands(self_check.CASES[0], Kind(CPU, torch.float32, torch.float32, "contiguous"))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_serves_while_a_graph_is_captured_before_the_check(monkeypatch):
    class OnGpu:
        is_cuda, device, dtype = True, torch.device("cuda"), torch.float32

        def dim(self):
            return 2

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(self_check, "check", None)
    monkeypatch.setattr(self_check, "_trusted", set())
    assert not self_check.is_trusted(kernels, OnGpu(), OnGpu(), None, "cosine")
    assert not self_check._trusted
    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    monkeypatch.setattr(self_check, "is_trusted", lambda *_: False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            with_passes(lambda passes, *_: passes, normal(1, 2), normal(1, 2), AngularMap(None, "cosine", 1e-4)) is cpu
        )


def test_where_no_thread_can_be_started_the_check_is_left_to_a_later_call(monkeypatch):
    monkeypatch.setattr(self_check, "_trusted", set())
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

        patch.setattr(self_check.ThreadPoolExecutor, "submit", refuse)
        assert not self_check.is_trusted(cpu, x, weight, None, "cosine")
    assert self_check.is_trusted(cpu, x, weight, None, "cosine")


@pytest.mark.parametrize("form", ["dense", "grouped", "depthwise", "pointwise"])
@pytest.mark.parametrize("curve", ["cosine", "linear", "sigmoid", "learnable-sigmoid"])
def test_what_a_layer_needs_is_compared_its_form_its_curve_and_the_rescaling_of_both(curve, form):
    kind, use = Kind(CPU, torch.float32, torch.float32, "contiguous"), self_check.Use(curve, form)
    found = list(self_check.deviations(reference, kind, use))
    of_form = [deviation for deviation in found if deviation.case.form == form]
    of_curve = [deviation for deviation in found if deviation.case.curve == curve]
    assert {deviation.name for deviation in of_form} == set(self_check.PASSES)
    assert {"curve", "curve_backward"} <= {deviation.name for deviation in of_curve}
    for some in (of_form, of_curve):
        assert any(deviation.case.beta and deviation.case.shift for deviation in some)
    assert all(deviation in of_form or deviation.name in self_check.OF_THE_CURVE for deviation in found)


def test_a_use_is_that_of_the_layer():
    def form(groups, *weight):
        return self_check.Use.of(torch.empty(weight), Projection((1, 1), (0, 0), (1, 1), groups), "cosine").form

    assert self_check.Use.of(torch.empty(4, 3), None, "linear") == ("linear", "dense")
    assert form(1, 4, 3, 3, 3) == "dense"
    assert form(2, 4, 2, 3, 1) == "grouped"
    assert form(4, 4, 1, 3, 3) == "depthwise"
    assert form(2, 4, 2, 1, 1) == form(4, 4, 1, 1, 1) == "pointwise"
