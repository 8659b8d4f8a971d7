import copy
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify.choices import OPERATORS
from sphereify.errors import UsageError
from sphereify.nn import AngularHead
from tests.grids import grid
from tests.nn import oracle
from tests.nn.loss_oracle import build
from tests.nn.oracle import normal

PLAIN_KINDS = ("w-softmax", "s-softmax")  # those with a margin have their tests in test_losses
EPS = 1e-12  # inside the head's roots; the definitions have none, which is the same to 1e-10
HALF_EPS = 1e-5  # the same for features in half precision


def expected_logits(head, x, eps=EPS):
    """‖x‖·g(θ_j) or s·g(θ_j), plus the bias, by the oracle."""
    name = head.operator.name
    k = (head.operator.p.abs() + 0.05).tolist() if name == "learnable-sigmoid" else 0.3
    g = oracle.g_of_angles(name, oracle.linear_angles(x, head.weight, eps), k, filters=-1)
    length = x.detach().double().square().sum(-1, keepdim=True).sqrt()
    logits = g * (head.scale if head.kind == "s-softmax" else length)
    return logits if head.bias is None else logits + head.bias.detach().double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_logits_agree_with_the_oracle_in_training_and_evaluation(kind, operator, bias, leading):
    head = build(kind, operator, bias=bias, scale=12.5)
    x = 5 * normal(*leading, 6)
    for mode in (True, False):
        got = head.train(mode)(x).detach()
        torch.testing.assert_close(got, expected_logits(head, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_gradcheck_by_features_and_every_parameter(kind, operator, bias):
    head = build(kind, operator, bias=bias)
    names, parameters = zip(*head.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (x,))

    leaves = (normal(3, 6).requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(("classes", "scale"), [(10, 1.0), (10, 30.0), (3, 5.0)])
def test_s_softmax_on_a_simplex_has_the_minimum_of_the_theory(classes, scale):
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    head = AngularHead(classes, classes, kind="s-softmax", scale=scale, dtype=torch.float64)
    head.weight.data = 3 * simplex
    loss = F.cross_entropy(head(7 * simplex), torch.arange(classes)).item()
    golden = math.log(1 + (classes - 1) * math.exp(-scale * classes / (classes - 1)))
    # The head's ε takes 1e-12 off each cosine.
    assert loss == pytest.approx(golden, rel=1e-9)
    if (classes, scale) == (10, 1.0):
        assert loss == pytest.approx(1.3769349204501935, rel=1e-10)


def test_s_softmax_does_not_depend_on_the_length_of_the_feature_and_w_softmax_is_proportional_to_it():
    x = normal(3, 6)
    s, w = build("s-softmax", "linear"), build("w-softmax", "linear")
    torch.testing.assert_close(s(100 * x), s(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(w(100 * x), 100 * w(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_zero_and_parallel_features_are_finite_in_value_and_gradient(kind, operator, dtype):
    head = build(kind, operator, dtype=dtype, bias=True)
    w = head.weight[0].detach()
    x = torch.stack([torch.zeros_like(w), w, -w]).requires_grad_()
    logits = head(x)
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2])).backward()
    assert logits.dtype == dtype
    torch.testing.assert_close(logits[0], head.bias, msg="a zero feature has no angle")
    assert logits.isfinite().all()
    # In fp16 the gradient of s-softmax, s/√ε at a zero feature, has to stay below 65504.
    assert all(t.grad.isfinite().all() for t in [x, *head.parameters()])


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_zero_features_of_an_fp16_network_have_a_finite_gradient_under_autocast(kind):
    # The feature comes in fp16 from the layer before, and its gradient goes back in fp16.
    head, x = AngularHead(6, 4, kind=kind), torch.zeros(2, 6, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        F.cross_entropy(head(x), torch.tensor([0, 1])).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("features", ["fp32", "of autocast"])
@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_logits_under_autocast_are_taken_in_fp32(kind, amp, features):
    head, x = build(kind, "linear", dtype=torch.float32, bias=True), normal(3, 6, dtype=torch.float32)
    x, eps = (x.to(amp), HALF_EPS) if features == "of autocast" else (x, EPS)
    with torch.autocast("cpu", amp):
        logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected_logits(head, x, eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("amp", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_features_of_every_scale_are_finite(kind, operator, amp):
    head = build(kind, operator, dtype=torch.float32)
    for scale in (1e-20, 1e-6, 1e6, 1e15):
        x = (scale * normal(3, 6)).float().requires_grad_()
        with torch.autocast("cpu", amp) if amp else nullcontext():
            logits = head(x)
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        assert logits.isfinite().all()
        assert all(t.grad.isfinite().all() for t in [x, *head.parameters()])
        if scale > 1e-3:  # ε = 1e-12 shows at lengths near 1e-6
            torch.testing.assert_close(logits.double(), expected_logits(head, x), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_head_of_a_linear_layer_shares_its_parameters_and_state(kind, bias):
    linear = nn.Linear(6, 4, bias=bias).eval()
    linear.note = "mine"
    calls = []
    linear.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    head = AngularHead.from_linear(linear, kind=kind, operator="sigmoid", scale=9)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert (head.note, head.training, head.kind, head.scale) == ("mine", False, kind, 9.0)
    assert (head.in_features, head.num_classes, head.out_features) == (6, 4, 4)
    assert head.state_dict().keys() == linear.state_dict().keys()
    x = normal(2, 6, dtype=torch.float32)
    torch.testing.assert_close(head(x).double(), expected_logits(head, x), rtol=1e-5, atol=1e-5)
    assert calls == [AngularHead]
    head.weight = nn.Parameter(torch.zeros(4, 6))
    assert linear.weight.abs().sum() > 0


@pytest.mark.parametrize("operator", grid(OPERATORS, lambda operator: operator == "learnable-sigmoid"))
def test_copies_export_and_compilation_give_the_same_logits(operator):
    head, x = build("w-softmax", operator, bias=True), normal(3, 6)
    torch._dynamo.reset()
    others = {
        "deepcopy": copy.deepcopy(head),
        "pickle": pickle.loads(pickle.dumps(head)),
        "compile": torch.compile(head, fullgraph=True, backend="aot_eager"),
        "export": torch.export.export(head, (x,)).module(),
    }
    for way, other in others.items():
        torch.testing.assert_close(other(x), head(x), rtol=0, atol=1e-13, msg=way)


def test_state_dict_has_one_k_per_class():
    state = AngularHead(6, 4, operator="learnable-sigmoid").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"weight": (4, 6), "operator.p": (4,)}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"kind": "w-sofmax"},
            "head: got 'w-sofmax', expected one of w-softmax, ga-softmax, a-softmax, s-softmax.*mean 'w-softmax'",
        ),
        ({"kind": "auto"}, "head: got 'auto', expected one of w-softmax, ga-softmax, a-softmax, s-softmax"),
        ({"operator": "lineal"}, "operator: got 'lineal'.*Did you mean 'linear'"),
        ({"scale": 0}, "scale: got 0, expected a positive number; the default is 30"),
        ({"scale": -2.0}, "scale: got -2.0, expected a positive number"),
    ],
)
def test_wrong_argument_is_refused_by_constructor_and_from_linear(given, text):
    with pytest.raises(UsageError, match=text):
        AngularHead(6, 4, **given)
    with pytest.raises(UsageError, match=text):
        AngularHead.from_linear(nn.Linear(6, 4), **given)


def cubed(cos):
    return cos**3


def test_repr_names_the_operator_function_and_not_twice_a_module():
    assert "kind=w-softmax, operator=cubed, bias=False" in repr(AngularHead(6, 4, operator=cubed))
    assert repr(AngularHead(6, 4, operator="linear")).count("perator=") == 0


@pytest.mark.parametrize(("other", "got"), [(nn.Conv2d(1, 1, 1), "Conv2d"), (5, "int"), (None, "NoneType")])
def test_a_head_of_what_is_no_linear_layer_is_a_type_error(other, got):
    with pytest.raises(TypeError, match=rf"AngularHead: got {got}, expected a torch\.nn\.Linear"):
        AngularHead.from_linear(other)
