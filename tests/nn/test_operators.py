import math

import pytest
import torch

from sphereify.choices import OPERATORS
from sphereify.errors import UsageError
from sphereify.nn import LearnableSigmoidOperator, SigmoidOperator
from sphereify.nn.operators import make_operator
from tests.nn import oracle

K = {"sigmoid": 0.3, "learnable-sigmoid": 0.5}
GOLDEN_SIGMOID = {0.1: 0.9894135055652862, 0.3: 0.7102446431267226, 0.7: 0.44228789743379554}  # θ = π/3
ANGLES = (0.01, 0.4, 1.0, math.pi / 2, 2.2, 3.0, math.pi - 0.01)


def double(operator, **given):
    return make_operator(operator, **given).double()


def cosines(*theta, requires_grad=False):
    return torch.tensor(theta, dtype=torch.float64).cos().requires_grad_(requires_grad)


@pytest.mark.parametrize(("k", "golden"), GOLDEN_SIGMOID.items())
@pytest.mark.parametrize("name", ["sigmoid", "learnable-sigmoid"])
def test_sigmoid_at_sixty_degrees_has_the_golden_value(name, k, golden):
    # p is stored in fp32 when the operator is built, so that k is off by up to 3e-8.
    tolerance = 1e-14 if name == "sigmoid" else 1e-7
    assert double(name, k=k)(cosines(math.pi / 3)).item() == pytest.approx(golden, abs=tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_value_is_1_at_0_and_0_at_right_angles_and_minus_1_at_pi(name):
    got = double(name)(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(got.detach(), torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", OPERATORS)
def test_value_falls_strictly_with_the_angle(name):
    values = double(name)(torch.linspace(0, math.pi, 500, dtype=torch.float64).cos())
    assert (values.diff() < 0).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_value_and_slope_agree_with_the_table(name):
    operator, k = double(name), K.get(name, 0)
    theta = torch.tensor(ANGLES, dtype=torch.float64, requires_grad=True)
    values = operator(theta.cos())
    (slopes,) = torch.autograd.grad(values.sum(), theta)
    # fp32 storage of p moves the learnable k by 1e-8, and rounding of cos θ moves θ near a pole by 1e-14.
    close = {"rtol": 1e-6 if name == "learnable-sigmoid" else 1e-9, "atol": 1e-11}
    torch.testing.assert_close(values.tolist(), [oracle.g(name, t, k) for t in ANGLES], **close)
    torch.testing.assert_close(slopes.tolist(), [oracle.slope(name, t, k) for t in ANGLES], **close)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("theta", ANGLES)
def test_slope_of_the_table_is_the_finite_difference_of_the_definition(name, theta):
    h = 1e-5
    difference = (oracle.g(name, theta + h) - oracle.g(name, theta - h)) / (2 * h)
    assert difference == pytest.approx(oracle.slope(name, theta), abs=1e-8)


@pytest.mark.parametrize("k", [0.1, 0.5, 2.0])
def test_slope_by_k_is_the_finite_difference_and_vanishes_at_the_three_fixed_points(k):
    operator = double("learnable-sigmoid", k=k)
    k, h = operator.k.item(), 1e-6
    for theta in (0.0, math.pi / 2, math.pi, 0.3, 1.2, 2.8):
        (got,) = torch.autograd.grad(operator(cosines(theta)).sum(), operator.p)
        expected = (oracle.g("sigmoid", theta, k + h) - oracle.g("sigmoid", theta, k - h)) / (2 * h)
        assert got.item() == pytest.approx(expected, abs=1e-8)
        if theta in (0.0, math.pi / 2, math.pi):
            assert abs(got.item()) < 1e-9


def test_learnable_k_stays_positive_whatever_p_becomes():
    operator = LearnableSigmoidOperator(3)
    with torch.no_grad():
        operator.p.copy_(torch.tensor([-2.0, 0.0, 1.0]))
    torch.testing.assert_close(operator.k, torch.tensor([2.05, 0.05, 1.05]))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck_by_cosine_and_by_k(name):
    operator = double(name, filters=3)
    cos = cosines(*torch.linspace(0.2, 2.9, 12).tolist()).view(2, 3, 2).requires_grad_()
    names, parameters = zip(*operator.named_parameters(), strict=True) if name == "learnable-sigmoid" else ((), ())

    def apply(cos, *parameters):
        return torch.func.functional_call(operator, dict(zip(names, parameters, strict=True)), (cos,))

    assert torch.autograd.gradcheck(apply, (cos, *parameters))
    assert torch.autograd.gradgradcheck(apply, (cos, *parameters))


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_of_value_and_gradient_equals_a_loop(name):
    operator = double(name)
    cos = oracle.normal(3, 4).tanh()
    values = torch.func.vmap(operator)(cos)
    slopes = torch.func.vmap(torch.func.grad(lambda row: operator(row).sum()))(cos)
    torch.testing.assert_close(values, operator(cos), rtol=0, atol=1e-14)
    leaf = cos.clone().requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(operator(leaf).sum(), leaf)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_poles_and_rounding_beyond_them_are_finite_in_value_and_gradient(name, dtype):
    cos = torch.tensor([1.0, 1.01, -1.0, -1.01], dtype=dtype, requires_grad=True)
    operator = make_operator(name).to(dtype)
    values = operator(cos)
    values.sum().backward()
    assert values.dtype == dtype
    torch.testing.assert_close(values.tolist(), [1.0, 1.0, -1.0, -1.0], rtol=0, atol=1e-2)
    assert all(t.grad.isfinite().all() for t in [cos, *operator.parameters()])


@pytest.mark.parametrize("k", [1e-4, 0.017, 0.14])
def test_small_k_does_not_overflow(k):
    cos = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0], requires_grad=True)
    values = SigmoidOperator(k)(cos)
    values.sum().backward()
    torch.testing.assert_close(values.tolist(), [oracle.g("sigmoid", math.acos(c), k) for c in cos.tolist()])
    assert cos.grad.isfinite().all()


def test_operator_leaves_its_input_alone():
    cos = cosines(0.3, 1.0)
    before = cos.clone()
    for name in OPERATORS:
        double(name)(cos)
    assert torch.equal(cos, before)


def test_one_k_per_filter_belongs_to_dimension_one():
    operator = double("learnable-sigmoid", filters=2)
    with torch.no_grad():
        operator.p.copy_(torch.tensor([0.1, 0.9]))
    theta = oracle.normal(2, 2, 3).sigmoid() * math.pi
    torch.testing.assert_close(operator(theta.cos()).detach(), oracle.g_of_angles("sigmoid", theta, [0.15, 0.95]))


@pytest.mark.parametrize("word", ["learnable_sigmoid", "Learnable-Sigmoid", " LEARNABLE_sigmoid "])
def test_name_is_read_without_regard_to_case_and_hyphens(word):
    assert isinstance(make_operator(word, filters=4), LearnableSigmoidOperator)


def test_operator_object_is_returned_as_it_is():
    operator = SigmoidOperator(0.2)
    assert make_operator(operator) is operator


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: make_operator("cosin"),
            r"operator: got 'cosin', expected one of linear, cosine, sigmoid, learnable-sigmoid\. "
            r"Did you mean 'cosine'\?",
        ),
        (lambda: make_operator(3), "operator: got 3, expected a name or a callable"),
        (lambda: make_operator("cosine", k=0.3), "k: got 0.3 for the cosine operator, which has none"),
        (lambda: make_operator("linear", k=0.3), "k: got 0.3 for the linear operator, which has none"),
        (lambda: make_operator("sigmoid", k=0), "k: got 0, expected a positive finite number"),
        (lambda: make_operator("sigmoid", k=-0.1), "k: got -0.1, expected a positive finite number"),
        (lambda: SigmoidOperator(math.nan), "k: got nan, expected a positive finite number"),
        (lambda: SigmoidOperator(math.inf), "k: got inf, expected a positive finite number"),
        (lambda: SigmoidOperator("0.3"), "k: got '0.3', expected a positive finite number"),
        (lambda: LearnableSigmoidOperator(4, k=-1), "k: got -1, expected a positive finite number"),
        (lambda: LearnableSigmoidOperator(4, k=0.05), r"k starts at 0\.05, expected a value above 0\.05"),
        (lambda: LearnableSigmoidOperator(0), "got filters=0, expected at least 1"),
    ],
)
def test_wrong_operator_or_k_is_refused_with_what_to_do(call, text):
    with pytest.raises(UsageError, match=text):
        call()
