"""One protocol, four makers of it, and which of them serves."""

import inspect

import pytest
import torch

from sphereify.nn.functional import sphere_conv2d
from sphereify.nn.operators import LinearOperator
from sphereify.nn.passes import compiled, cpu, reference, triton
from sphereify.nn.passes.protocol import Passes
from tests.nn.oracle import normal

METHODS = {name: method for name, method in vars(Passes).items() if name[0] != "_" and inspect.isfunction(method)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "maker", [reference, cpu, compiled, triton], ids=lambda maker: maker.__name__.rpartition(".")[2]
)
def test_every_maker_has_the_passes_of_the_protocol(maker, name):
    _, *parameters = inspect.signature(METHODS[name]).parameters
    assert list(inspect.signature(getattr(maker, name)).parameters) == parameters


@pytest.fixture
def served(monkeypatch):
    """The makers that served, in order."""
    monkeypatch.setattr("sphereify.nn.passes.self_check.is_trusted", lambda *_: True)
    names = []
    for maker in (reference, cpu, compiled):
        for pass_ in (maker.curve, maker.curve_backward):
            name = maker.__name__.rpartition(".")[2]
            spy = lambda *a, _p=pass_, _n=name: names.append(_n) or _p(*a)  # noqa: E731
            monkeypatch.setattr(maker, pass_.__name__, spy)
    return names


@pytest.mark.skipif(not compiled.serves(), reason="needs a C++ compiler on Linux")
def test_compiled_passes_serve_fp32_on_a_cpu_and_blocks_the_other_dtypes(served):
    weight = normal(3, 2, 3, 3)
    sphere_conv2d(normal(2, 2, 4, 4).float(), weight.float().requires_grad_(), LinearOperator()).sum().backward()
    assert served == ["compiled", "compiled"]
    sphere_conv2d(normal(2, 2, 4, 4).bfloat16(), weight.bfloat16().requires_grad_(), LinearOperator()).sum().backward()
    assert served[2:] == ["cpu", "cpu"]


def test_blocks_serve_a_cpu_and_the_reference_what_is_differentiated_again_or_mapped(served):
    x, weight = normal(2, 2, 4, 4).requires_grad_(), normal(3, 2, 3, 3).requires_grad_()
    value = sphere_conv2d(x, weight, LinearOperator()).sum()
    torch.autograd.grad(value, x, retain_graph=True)
    assert served == ["cpu", "cpu"]
    torch.autograd.grad(value, x, create_graph=True)
    assert served[2:] == ["reference"]
    torch.func.vmap(lambda x: sphere_conv2d(x, weight.detach(), LinearOperator()))(x.detach())
    assert served[3:] == ["reference"]


def test_the_reference_serves_tensors_that_no_block_can_cut(served):
    with torch.no_grad():
        sphere_conv2d(normal(2, 2, 4, 4).transpose(2, 3), normal(3, 2, 3, 3), LinearOperator())
        sphere_conv2d(normal(0, 2, 4, 4), normal(3, 2, 3, 3), LinearOperator())
    assert served == ["reference", "reference"]


@pytest.mark.parametrize("training", [True, False])
def test_four_frames_at_most_lie_between_a_function_and_a_pass(monkeypatch, training):
    stacks = []
    curve = cpu.curve

    def spy(*arguments):
        names = [frame.function for frame in inspect.stack() if "/sphereify/nn/" in frame.filename]
        stacks.append(names[: names.index("sphere_conv2d")])
        return curve(*arguments)

    monkeypatch.setattr(cpu, "curve", spy)
    with torch.set_grad_enabled(training):
        sphere_conv2d(normal(1, 2, 4, 4), normal(3, 2, 3, 3).requires_grad_(), LinearOperator())
    assert len(stacks[0]) <= 4
