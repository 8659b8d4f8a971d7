"""Products with a parameter (`x @ weight`), checkpoints around functional calls, and where β starts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sphereify import ConversionPlan, apply_plan, load, plan_conversion, save, sphereify
from sphereify.convert.graph import read_graph
from sphereify.errors import UnsupportedModelError
from tests.convert.answers import linear_answer, shake, the_call
from tests.convert.models import Net, conv
from tests.nn.oracle import normal, slope

# ---------------------------------------------------------------------------------------------- products and witnesses


class Product(nn.Module):
    """Multiplies its input with a parameter of the given name."""

    def __init__(self, multiply, *shape, name="weight"):
        super().__init__()
        self.multiply, self.name = multiply, name
        self.register_parameter(name, nn.Parameter(normal(*shape, dtype=torch.float32)))

    def forward(self, x):
        return self.multiply(x, getattr(self, self.name))


def around(part, width=6):
    """A network with this part in its middle. It takes 7 numbers, of which 4 are used: nobody would assume that, so
    that without inputs it can only be traced."""
    torch.manual_seed(0)
    return Net(
        lambda n, x: n.last(n.part(n.first(x[..., 3:]).tanh()).tanh()).tanh(),
        first=nn.Linear(4, 4),
        part=part,
        last=nn.Linear(width, 3),
    )


WITNESSES = {"run": {"example_inputs": normal(5, 7, seed=1, dtype=torch.float32)}, "trace": {}}


def seen_by(witness, model, **options):
    """The plan, made from what that witness says."""
    assert bool(read_graph(model, **WITNESSES[witness]).not_run) == (witness == "trace")
    return plan_conversion(model, **WITNESSES[witness], **options)


def decided(plan):
    return {decision.name: decision for decision in plan.decisions}


# The filters are the columns of the parameter, as it stands there, or the rows.
COLUMNS = {
    "x @ w": lambda x, w: x @ w,
    "torch.matmul": lambda x, w: torch.matmul(x, w),
    "torch.mm": lambda x, w: torch.mm(x, w),
    "of a sequence": lambda x, w: (x.unsqueeze(1) @ w).squeeze(1),
}
ROWS = {
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "torch.matmul, transpose": lambda x, w: torch.matmul(x, w.transpose(-1, -2)),
    "torch.mm, permute": lambda x, w: torch.mm(x, w.permute(1, 0)),
}
BY_METHOD = {"x.matmul": lambda x, w: x.matmul(w), "x.mm": lambda x, w: x.mm(w)}
FORMS = [
    *[(witness, name, f, (4, 6)) for witness in WITNESSES for name, f in COLUMNS.items()],
    *[(witness, name, f, (6, 4)) for witness in WITNESSES for name, f in ROWS.items()],
    *[(witness, name, f, (4, 4)) for witness in WITNESSES for name, f in {**COLUMNS, **ROWS}.items()],
    *[("run", name, f, (4, 6)) for name, f in BY_METHOD.items()],
    *[("run", "x @ w.t() by method", lambda x, w: x.matmul(w.t()), (6, 4))],
]


@pytest.mark.parametrize(
    ("witness", "form", "multiply", "shape"), FORMS, ids=lambda part: part if isinstance(part, str) else None
)
def test_a_product_with_a_learned_matrix_is_the_operator_of_its_angles_rescaled(witness, form, multiply, shape):
    model = around(Product(multiply, *shape), width=4 if shape == (4, 4) else 6)
    plan = seen_by(witness, model, operator="sigmoid")
    decision = decided(plan)["part.weight"]
    assert (decision.kind, decision.action, decision.called) == ("linear", "convert", True)
    angular = apply_plan(model, plan).part
    filters = model.part.weight.detach()
    filters = filters if form in ROWS or ".t()" in form else filters.t()
    assert decision.shape == tuple(filters.shape)
    call, x = the_call(angular), normal(5, 4, seed=2, dtype=torch.float32)
    steepness = -slope("sigmoid", math.pi / 2)
    torch.testing.assert_close(call.beta.detach(), filters.norm(dim=1) * 2 / steepness)
    shake(call)
    expected = linear_answer(x, filters, call.beta, call.gamma)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("witness", WITNESSES)
@pytest.mark.parametrize("form", ["x @ w", "x @ w.t()"])
def test_the_gradient_of_a_product_reaches_weight_beta_and_gamma(form, witness):
    multiply, shape = (COLUMNS["x @ w"], (4, 6)) if form == "x @ w" else (ROWS["x @ w.t()"], (6, 4))
    model = around(Product(multiply, *shape))
    angular = apply_plan(model, seen_by(witness, model)).part
    angular(normal(5, 4, seed=2, dtype=torch.float32)).square().sum().backward()
    gradients = {n.rpartition(".")[2]: p.grad for n, p in angular.named_parameters()}
    assert set(gradients) == {"weight", "beta", "gamma"}
    assert all(gradient is not None and gradient.abs().sum() > 1e-3 for gradient in gradients.values()), gradients


def test_a_row_alone_is_multiplied_as_in_a_batch():
    model = around(Product(lambda x, w: torch.stack([row @ w for row in x.unbind()]), 4, 6))
    angular = sphereify(model, operator="sigmoid", rescale="never", **WITNESSES["run"]).part
    x = normal(5, 4, seed=2, dtype=torch.float32)
    expected = linear_answer(x, model.part.weight.detach().t(), None)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["x @ w", "x @ w.t()"])
def test_a_product_comes_back_from_disk_and_from_json_bit_for_bit(form, tmp_path):
    def make():
        return around(Product(*((COLUMNS["x @ w"], 4, 6) if form == "x @ w" else (ROWS["x @ w.t()"], 6, 4))))

    x = WITNESSES["run"]["example_inputs"]
    angular = sphereify(make(), operator="learnable-sigmoid", example_inputs=x).eval()
    assert torch.equal(load(save(angular, tmp_path), factory=make)(x), angular(x))
    again = ConversionPlan.from_json(angular.conversion_plan.to_json())
    assert torch.equal(apply_plan(make(), again).eval()(x), angular(x))


OTHER_PRODUCTS = {
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (6, 4)),
    "bmm": (lambda x, w: torch.bmm(x.unsqueeze(0), w).squeeze(0), (1, 4, 6)),
    "x @ w for several w": (lambda x, w: (x.unsqueeze(0) @ w).squeeze(0), (1, 4, 6)),
    "W @ x": (lambda x, w: (w @ x.t()).t(), (6, 4)),
    "torch.mm(W, x)": (lambda x, w: torch.mm(w, x.t()).t(), (6, 4)),
    "baddbmm": (lambda x, w: torch.baddbmm(x.new_zeros(1, 1, 6), x.unsqueeze(0), w).squeeze(0), (1, 4, 6)),
}


@pytest.mark.parametrize("witness", WITNESSES)
@pytest.mark.parametrize("product", OTHER_PRODUCTS)
def test_another_product_with_a_parameter_is_told_and_left_alone(product, witness):
    multiply, shape = OTHER_PRODUCTS[product]
    model = around(Product(multiply, *shape))
    plan = seen_by(witness, model)
    decision = decided(plan)["part.weight"]
    assert (decision.kind, decision.action) == ("product", "keep")
    assert "no linear map of rows (einsum, bmm, W @ x); F.linear would be one" in decision.reason
    assert {d.name for d in plan.converted} == {"first", "last"}
    angular, x = apply_plan(model, plan), normal(5, 4, seed=2, dtype=torch.float32)
    assert type(angular.part) is Product
    assert torch.equal(angular.part(x), model.part(x))


@pytest.mark.parametrize("witness", WITNESSES)
@pytest.mark.parametrize("name", ["rel_pos_h", "rel_k", "relative_bias", "position_table", "emb_pos"])
@pytest.mark.parametrize("form", ["q @ table.t()", "einsum"])
def test_a_table_of_positions_is_kept_as_one(form, name, witness):
    multiply = {"q @ table.t()": ROWS["x @ w.t()"], "einsum": OTHER_PRODUCTS["einsum"][0]}[form]
    model = around(Product(multiply, 6, 4, name=name))
    decision = decided(seen_by(witness, model))[f"part.{name}"]
    assert decision.action == "keep"
    assert "table of positions" in decision.reason


ACTIVATIONS = {
    "attention": lambda x, w: (x @ x.transpose(-2, -1)).softmax(-1) @ x,
    "torch.matmul and bmm": lambda x, w: torch.bmm(torch.matmul(x, x.t()).unsqueeze(0), x.unsqueeze(0)).squeeze(0),
    "einsum": lambda x, w: torch.einsum("bi,ci,cj->bj", x, x, x),
    "a constant": lambda x, w: x @ torch.ones(4, 4),
}


@pytest.mark.parametrize("witness", WITNESSES)
@pytest.mark.parametrize("product", ACTIVATIONS)
def test_a_product_of_activations_alone_is_no_site(product, witness):
    model = around(Product(ACTIVATIONS[product], 1, name="unused"), width=4)
    plan = seen_by(witness, model)
    assert list(decided(plan)) == ["first", "last"]
    assert type(apply_plan(model, plan).part) is Product


def test_products_of_activations_stay_inner_products_beside_an_angular_one():
    def attend(x, w):
        q = x @ w
        return (q @ q.transpose(-2, -1)).softmax(-1) @ q

    model, x = around(Product(attend, 4, 6)), normal(5, 4, seed=2, dtype=torch.float32)
    angular = sphereify(model, operator="sigmoid", rescale="never", **WITNESSES["run"]).part
    q = linear_answer(x, model.part.weight.detach().t(), None)
    torch.testing.assert_close(angular(x).double(), (q @ q.t()).softmax(-1) @ q, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- checkpoints


class Checkpointed(nn.Module):
    """Its own functional call lies in a checkpoint, `reentrant` or not; None is no checkpoint."""

    def __init__(self, call, reentrant):
        super().__init__()
        self.call, self.reentrant = call, reentrant
        self.weight = nn.Parameter(normal(4, 4, dtype=torch.float32))

    def inner(self, x):
        return CALLS[self.call](x, self.weight).tanh()

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


CALLS = {"F.linear": F.linear, "x @ w": lambda x, w: x @ w}


def checkpointed(call, reentrant, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(call, reentrant), nn.Tanh())
    return sphereify(model, example_inputs=torch.ones(2, 4), operator="sigmoid", **options)


def gradients_of(model, run):
    model.zero_grad()
    run(normal(3, 4, seed=3, dtype=torch.float32).requires_grad_()).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_a_checkpoint_inside_the_forward_that_makes_an_angular_call_is_refused_in_training(call, reentrant):
    model, x = checkpointed(call, reentrant), normal(3, 4, seed=3, dtype=torch.float32)
    assert {d.name for d in model.conversion_plan.converted} == {"0", "1.weight"}
    with pytest.raises(UnsupportedModelError, match=r"Checkpointed makes its angular call inside torch\.utils\.checkp"):
        model.train()(x)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), checkpointed(call, None).eval()(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_a_checkpoint_around_the_module_that_makes_an_angular_call_gives_the_same_gradients(call, reentrant):
    model = checkpointed(call, None).train()
    plain = gradients_of(model, model)
    ways = {
        "the module": lambda x: model[2](checkpoint(model[1], model[0](x), use_reentrant=reentrant)),
        "the model": lambda x: checkpoint(model, x, use_reentrant=reentrant),
    }
    for way in ways.values():
        again = gradients_of(model, way)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(gradient.abs().sum() > 1e-3 for gradient in plain.values())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_call_that_is_kept_may_lie_in_a_checkpoint(reentrant):
    model = checkpointed("F.linear", reentrant, exclude="1.weight").train()
    plain = checkpointed("F.linear", None, exclude="1.weight").train()
    expected = gradients_of(plain, plain)
    found = gradients_of(model, model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------- where beta starts


def cube(cos):
    return cos**3


def steep(cos):
    return 2 * cos - cos**3


# dg/dcos at a right angle is −dg/dθ there, as the sine is 1.
SLOPES = {
    "cosine": ({"operator": "cosine"}, 1),
    "linear": ({"operator": "linear"}, -slope("linear", math.pi / 2)),
    "sigmoid": ({"operator": "sigmoid"}, -slope("sigmoid", math.pi / 2, 0.3)),
    "sigmoid with k": ({"operator": "sigmoid", "k": 0.1}, -slope("sigmoid", math.pi / 2, 0.1)),
    "learnable": ({"operator": "learnable-sigmoid"}, -slope("sigmoid", math.pi / 2, 0.5)),
    "learnable, one k": ({"operator": "learnable-sigmoid", "k": 0.2, "share_k": "network"},
                         -slope("sigmoid", math.pi / 2, 0.2)),
    "by an override": ({"overrides": {"*": {"operator": "linear"}}}, -slope("linear", math.pi / 2)),
    "an object without slope": ({"operator": cube}, 1),
    "an object with slope 2": ({"operator": steep}, 2),
}  # fmt: skip
LAYERS = {
    "linear": (lambda: nn.Linear(9, 6), 9),
    "conv1d": (lambda: nn.Conv1d(3, 6, 5), 15),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), 12),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, bias=False), 16),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("operator", SLOPES)
def test_beta_starts_at_the_length_of_the_filter_times_the_root_of_fan_in_over_the_slope(operator, layer):
    torch.manual_seed(0)
    options, steepness = SLOPES[operator]
    make, fan_in = LAYERS[layer]
    model = nn.Sequential(make(), nn.Tanh())
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(1, 7).view(-1, *[1] * (model[0].weight.dim() - 1)))
    angular = sphereify(model, rescale="always", **options)[0]
    lengths = torch.tensor([math.sqrt(float((w.double() ** 2).sum())) for w in model[0].weight.detach()])
    torch.testing.assert_close(angular.beta.detach(), lengths * math.sqrt(fan_in) / steepness, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", SLOPES)
def test_beta_in_place_of_a_batch_norm_starts_at_its_scale_times_the_root_of_fan_in_over_the_slope(operator, bias):
    options, steepness = SLOPES[operator]
    model = nn.Sequential(conv(4, 6, groups=2, bias=bias), nn.BatchNorm2d(6), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2, 0, 0.5, 3, 10]))
        model[1].bias.copy_(torch.arange(6))
    angular = sphereify(model, norm="replace", **options)
    assert type(angular[1]) is nn.Identity
    expected = torch.tensor([1.0, -2, 0, 0.5, 3, 10]) * math.sqrt(18) / steepness
    torch.testing.assert_close(angular[0].beta.detach(), expected, rtol=1e-5, atol=1e-6)
    shift = angular[0].bias if bias else angular[0].gamma
    assert shift.tolist() == list(range(6))
