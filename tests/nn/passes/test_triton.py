"""When the kernels are used, and that they are right: the latter in processes of their own, see there."""

import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sphereify.nn.functional import sphere_conv2d
from sphereify.nn.geometry import Projection
from sphereify.nn.operators import make_operator
from sphereify.nn.passes import triton as kernels
from tests.nn.oracle import normal

ROOT = Path(__file__).parents[3]
CHANNELS_LAST = functools.partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
PLAIN = Projection((1, 1), (0, 0), (1, 1), 1)
CUBIC = Projection((1,) * 3, (0,) * 3, (1,) * 3, 1)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments, **environment):
    """Output of Python in another process, in which no other kernels are compiled."""
    environment = {**os.environ, "SPHEREIFY_COMPILED_PASSES": "0", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


INTERPRETED = ["1", *["0"] * torch.cuda.is_available()]
"""Values of TRITON_INTERPRET under which the kernels can run here."""


def run_kernels(selection, interpreted, file="kernels_against_reference.py"):
    """The tests of the kernels whose names fit, in a process of their own."""
    here = f"tests/nn/passes/{file}"
    run("-m", "pytest", "-p", "no:cacheprovider", here, "-k", selection, TRITON_INTERPRET=interpreted)


@needs_triton
@pytest.mark.parametrize("interpreted", INTERPRETED)
def test_a_convolution_and_the_curves_agree_with_the_reference(interpreted):
    run_kernels("grouped_and_strided or arcsine", interpreted)


@needs_triton
@pytest.mark.triton
@pytest.mark.parametrize("interpreted", INTERPRETED)
def test_each_kernel_and_one_map_of_each_kind_agree_with_the_reference(interpreted):
    run_kernels("not any_ and not pooled", interpreted)


@needs_triton
@pytest.mark.triton
@pytest.mark.parametrize("interpreted", INTERPRETED)
@pytest.mark.parametrize(
    "maps", ["any_convolution_in_1_dimension", "any_convolution_in_2_dimensions", "any_linear_map", "pooled"]
)
def test_maps_of_any_geometry_agree_with_the_reference(maps, interpreted):
    run_kernels(maps, interpreted)


@pytest.fixture
def on_cpu(monkeypatch):
    """As if Triton were there and interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    monkeypatch.setattr(kernels._switch, "failed", False)
    monkeypatch.setattr(kernels._switch, "on", True)


def usable(x=(1, 2, 4, 4), weight=(3, 2, 3, 3), dtype=torch.float32, projection=PLAIN, change=lambda x: x):
    with torch.no_grad():
        return kernels.usable(change(normal(*x, dtype=dtype)), normal(*weight, dtype=dtype), projection)


@pytest.mark.parametrize(
    ("expected", "how"),
    [
        (True, {}),
        (True, {"dtype": torch.bfloat16}),
        (True, {"change": CHANNELS_LAST}),
        (True, {"x": (5, 2), "weight": (3, 2), "projection": None}),
        (True, {"x": (1, 2, 4), "weight": (3, 2, 3), "projection": Projection((1,), (0,), (1,), 1)}),
        (False, {"dtype": torch.float64}),
        (False, {"x": (0, 2, 4, 4)}),
        (False, {"change": lambda x: x.transpose(2, 3)}),
        (False, {"change": lambda x: x[:, :, ::2]}),
        (False, {"change": lambda x: x.as_subclass(type("Own", (torch.Tensor,), {}))}),
        (False, {"x": (1, 2, 4, 4, 4), "weight": (3, 2, 3, 3, 3), "projection": CUBIC}),
        (True, {"x": (2, 3, 4, 5), "weight": (3, 5), "projection": None}),
        # Adjacent in dimension 1, where a linear map of four dimensions has no channels.
        (False, {"x": (2, 3, 4, 5), "weight": (3, 5), "projection": None, "change": CHANNELS_LAST}),
    ],
)  # fmt: skip
def test_usable_for_dense_tensors_of_up_to_two_dimensions(expected, how, on_cpu):
    assert usable(**how) is expected


def test_tensors_are_too_large_when_places_in_a_tile_do_not_fit_32_bits():
    weight = torch.empty(8, 1, 1, 1, device="meta")
    few, many = (torch.empty(pixels, 1, 1, 1, device="meta") for pixels in (2**29 - 1, 2**29))
    assert kernels._is_small(few, weight, PLAIN)
    assert not kernels._is_small(many, weight, PLAIN)
    assert not kernels._is_small(torch.empty(2, 1, 2**26, 1, device="meta"), weight, PLAIN)


def test_not_usable_on_a_cpu_nor_where_gradients_are_differentiated(on_cpu, monkeypatch):
    assert not kernels.usable(normal(1, 2, 4, 4, dtype=torch.float32), normal(3, 2, 3, 3, dtype=torch.float32), PLAIN)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not usable()


def test_switch_holds_until_the_end_of_a_with_or_from_now_on(on_cpu):
    with kernels.enabled(False):
        assert not usable()
        with kernels.enabled(True):
            assert usable()
        assert not usable()
    assert usable()
    kernels.enabled(False)
    assert not usable()
    kernels.enabled()
    assert usable()


@pytest.mark.parametrize(("value", "on"), [("0", False), ("off", False), ("1", True)])
def test_switch_in_the_environment(value, on, monkeypatch):
    monkeypatch.setenv("SPHEREIFY_KERNELS", value)
    spec = importlib.util.find_spec(kernels.__name__)
    imported_anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported_anew)
    assert imported_anew._switch.on is on


def test_kernels_that_cannot_run_leave_the_reference_and_one_warning(on_cpu, monkeypatch):
    def broken():
        raise OSError("no compiler was found")

    monkeypatch.setattr(kernels, "_kernels", broken)
    x, weight = normal(2, 2, 5, 5, dtype=torch.float32), normal(3, 2, 3, 3, seed=1, dtype=torch.float32)

    def outcome():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = sphere_conv2d(*leaves, make_operator("linear"))
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    text = r"Triton kernel normalize_rows failed.*slower: OSError: no compiler was found"
    with pytest.warns(RuntimeWarning, match=text) as caught:
        got = outcome()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = outcome()
    with kernels.enabled(False):
        expected = outcome()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, got, again, strict=True))
