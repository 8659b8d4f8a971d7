"""The check of the Triton kernels before their first use, in Triton's interpreter; `test_self_check.py` runs this file.

Triton decides with its import whether it interprets, so this needs a process of its own.
"""

import inspect
import warnings

import pytest
import torch

from sphereify.nn.functional import sphere_conv2d, sphere_linear
from sphereify.nn.operators import make_operator
from sphereify.nn.passes import self_check
from sphereify.nn.passes import triton as kernels
from tests.nn.oracle import normal

CPU = torch.device("cpu")


class Broken:
    """A kernel of which an output is off by a factor."""

    def __init__(self, kernel, output):
        self.kernel = kernel
        self.place = list(inspect.signature(kernel.fn).parameters).index(output)

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.kernel[grid](*args, **constants)
            args[self.place].mul_(1.1)

        return launch


OUTPUTS = {"normalize_rows": "unit", "square_sum": "out", "window_map": "out", "epilogue": "g", "prologue": "d_dot",
           "correct": "grad_x", "project_rows": "out"}  # fmt: skip
"""Of each kernel, an argument that it writes to."""


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    monkeypatch.setattr(self_check, "_trusted", set())
    monkeypatch.setattr(kernels._switch, "failed", False)


def outcome(x, weight, operator=None, function=sphere_conv2d, **how):
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    value = function(*leaves, operator or make_operator("linear"), **how)
    return value.detach(), *torch.autograd.grad(value.square().sum(), leaves)


def operands(dtype=torch.float32):
    return normal(1, 2, 4, 4).to(dtype), normal(3, 2, 3, 3, seed=1).to(dtype)


@pytest.mark.parametrize("layout", self_check.LAYOUTS)
def test_the_kernels_agree_with_the_reference(layout):
    self_check.check(kernels, self_check.Kind(CPU, torch.float32, torch.float32, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too_with_weights_in_fp32(dtype):
    self_check.check(kernels, self_check.Kind(CPU, dtype, torch.float32, "channels_last"))


def test_a_check_happens_once_for_each_dtype_layout_curve_and_form_and_changes_nothing(monkeypatch):
    checked, check = [], self_check.check
    monkeypatch.setattr(self_check, "check", lambda *asked: checked.append(asked) or check(*asked))
    x, weight = operands()
    state = torch.get_rng_state()
    with kernels.enabled(False):
        expected = outcome(x, weight)
    for _ in range(2):
        got = outcome(x, weight)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    outcome(x.contiguous(memory_format=torch.channels_last), weight)
    outcome(normal(5, 2).float(), normal(3, 2, seed=1).float(), function=sphere_linear)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        sphere_conv2d(x, weight, make_operator("linear"))
    outcome(x, weight, make_operator("cosine"))
    outcome(x, weight[:2, :1].contiguous(), groups=2)
    assert [(kind.dtype, kind.weight_dtype, kind.layout, *use) for maker, kind, use in checked if maker is kernels] == [
        (torch.float32, torch.float32, "contiguous", "linear", "dense"),
        (torch.float32, torch.float32, "channels_last", "linear", "dense"),
        (torch.float32, torch.float32, "linear", "linear", "dense"),
        (torch.bfloat16, torch.float32, "contiguous", "linear", "dense"),
        (torch.float32, torch.float32, "contiguous", "cosine", "dense"),
        (torch.float32, torch.float32, "contiguous", "linear", "depthwise"),
    ]


@pytest.mark.parametrize(
    ("operator", "shape", "groups", "untouched"),
    [
        ("cosine", (4, 4, 3, 3), 1, set()),
        ("linear", (4, 2, 3, 3), 2, set()),
        ("learnable-sigmoid", (4, 1, 3, 3), 4, {"square_sum"}),
        ("cosine", (4, 4, 1, 1), 1, {"window_map"}),
    ],
)
def test_a_check_launches_every_kernel_of_the_step_behind_it_and_few_others(
    operator, shape, groups, untouched, monkeypatch
):
    """Triton compiles a kernel for a second, so what a network does not need is not checked."""
    launched, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda name, *a, **how: launched.append(name) or launch(name, *a, **how))
    x, weight = normal(2, 4, 5, 5).float(), normal(*shape, seed=1).float()
    padding = shape[-1] // 2
    outcome(x, weight, make_operator(operator), groups=groups, padding=padding)
    both = list(launched)
    launched.clear()
    outcome(x, weight, make_operator(operator), groups=groups, padding=padding)
    assert {"epilogue", "prologue", "correct"} <= set(launched)
    during = both[: -len(launched)]
    assert set(launched) <= set(during)
    assert not untouched & set(during)
    assert len(during) < len(self_check.CASES) * len(self_check.PASSES) / 2


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_broken_kernel_is_named_in_one_warning_and_the_reference_serves(name, monkeypatch):
    x, weight = operands()
    with kernels.enabled(False):
        expected = outcome(x, weight)
    module = kernels._kernels()
    monkeypatch.setattr(module, name, Broken(getattr(module, name), OUTPUTS[name]))
    message = rf"Triton kernel [a-z_, ]*{name}.* of the largest value away from the reference, where rounding allows"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        got = outcome(x, weight)
    assert len(caught) == 1
    assert "float32, contiguous, on cpu" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = outcome(x, weight)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, got, again, strict=True))


def test_a_kernel_whose_results_are_no_numbers_is_found(monkeypatch):
    module = kernels._kernels()
    broken = Broken(module.project_rows, OUTPUTS["project_rows"])
    monkeypatch.setattr(module, "project_rows", broken)
    monkeypatch.setattr(torch.Tensor, "mul_", lambda t, _: t.fill_(float("nan")))
    with pytest.raises(kernels.KernelFailure, match="project_rows") as raised:
        self_check.check(kernels, self_check.Kind(CPU, torch.float32, torch.float32, "linear"))
    assert "filter_gradient (cosine) is inf of the largest value away" in str(raised.value.__cause__)


def test_no_check_where_the_kernels_are_off_or_operations_are_recorded(monkeypatch):
    monkeypatch.setattr(self_check, "check", None)
    x, weight = operands()
    with kernels.enabled(False):
        outcome(x, weight)
    torch.func.vmap(lambda x: sphere_conv2d(x, weight, make_operator("linear")))(x[None])
    torch.compile(lambda x: sphere_conv2d(x, weight, make_operator("linear")), backend="eager")(x)


def test_a_check_sees_no_mode_of_its_caller(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = operands()
    counts = []
    for _ in range(2):  # with the check, and without it
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            sphere_conv2d(x, weight, make_operator("linear"))
        counts.append(counter.get_total_flops())
    assert self_check._trusted
    assert counts[0] == counts[1]
