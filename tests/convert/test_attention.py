"""nn.MultiheadAttention with angular projections, held against the formula, and other layers of torch that are kept."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from sphereify import ConversionPlan, apply_plan, load, plan_conversion, save, sphereify
from sphereify.nn.functional import sphere_linear
from sphereify.nn.functional_calls import CALLS, AngularCall
from sphereify.nn.layers import AngularLayer
from sphereify.nn.operators import make_operator
from tests.nn.oracle import normal

E, HEADS, BATCH, LENGTH, SOURCE = 8, 2, 2, 3, 5
OPERATOR = {"operator": "sigmoid", "k": 0.3}
SIGMOID = make_operator("sigmoid", k=0.3)


class Attending(nn.Module):
    """Attention in a network that has something else to convert."""

    def __init__(self, kdim: int = E, vdim: int = E, batch_first: bool = True, **given: Any):
        super().__init__()
        self.embed, self.fc = nn.Linear(E, E), nn.Linear(E, 3)
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, kdim=kdim, vdim=vdim, **given)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        return self.fc(self.attention(self.embed(query), key, value, **given)[0])


def inputs(kdim: int = E, vdim: int = E, batch_first: bool = True) -> list[Tensor]:
    """Queries, keys and values of a cross-attention."""
    shapes = [(BATCH, LENGTH, E), (BATCH, SOURCE, kdim), (BATCH, SOURCE, vdim)]
    found = [normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    return found if batch_first else [x.transpose(0, 1) for x in found]


def convert(example: list[Tensor], training: bool = False, **given: Any) -> tuple[nn.Module, nn.Module]:
    """The attention of a converted network, with a β and a γ that differ by channel, and the plain one."""
    torch.manual_seed(0)
    model = Attending(**given).train(training)
    with torch.no_grad():
        for name, parameter in model.attention.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(normal(len(parameter), seed=8))
    angular = sphereify(model, attention="convert", example_inputs=tuple(example), **OPERATOR)
    calls = [module for module in angular.modules() if isinstance(module, AngularCall)]
    with torch.no_grad():
        for i, parameter in enumerate(p for call in calls for p in call.parameters(recurse=False)):
            parameter.copy_(1 + 0.3 * normal(*parameter.shape, seed=20 + i))
    return angular.attention, model.attention


def angular_map(x: Tensor, weight: Tensor, bias: Tensor | None, call: AngularCall, rows: slice) -> Tensor:
    g = sphere_linear(x, weight, SIGMOID) * call.beta[rows]
    for shift in (bias, None if call.gamma is None else call.gamma[rows]):
        g = g if shift is None else g + shift
    return g


def formula(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v between angular projections, for the batch first; `mask` is added to the scores."""
    calls = getattr(module, CALLS)
    projected = []
    for i, x in enumerate((query, key, value)):
        rows = slice(i * E, (i + 1) * E)
        bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
        if module.in_proj_weight is not None:
            projected.append(angular_map(x, module.in_proj_weight[rows], bias, calls["in_proj_weight"], rows))
        else:
            name = f"{'qkv'[i]}_proj_weight"
            projected.append(angular_map(x, getattr(module, name), bias, calls[name], slice(None)))
    q, k, v = projected
    if module.bias_k is not None:
        k, v = (torch.cat([x, b.expand(len(x), 1, E)], 1) for x, b in ((k, module.bias_k), (v, module.bias_v)))
        mask = None if mask is None else F.pad(mask, (0, 1))
    if module.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(len(x), 1, E)], 1) for x in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))
    q, k, v = (x.unflatten(-1, (HEADS, E // HEADS)).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    out = module.out_proj
    return angular_map(attended, out.weight, out.bias, calls["out_proj/weight"], slice(None))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 4, "vdim": 6}, {"kdim": 4}], ids=["E", "kdim and vdim", "kdim"])
def test_cross_attention_is_the_formula_with_angular_projections(sizes, bias, batch_first, grad):
    example = inputs(**sizes, batch_first=batch_first)
    angular, plain = convert(example, **sizes, batch_first=batch_first, bias=bias)
    with torch.set_grad_enabled(grad):
        result, other = angular(*example)[0], plain(*example)[0]
    assert not torch.allclose(result, other, rtol=1e-2, atol=1e-2)
    result = result if batch_first else result.transpose(0, 1)
    torch.testing.assert_close(result, formula(angular, *inputs(**sizes)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_is_the_formula_in_every_mode(training, mode):
    x = inputs()[0]
    angular, _ = convert([x, x, x], training)
    expected = formula(angular, x, x, x)
    with mode():
        for options in ({}, {"need_weights": False}):
            torch.testing.assert_close(angular(x, x, x, **options)[0].clone(), expected, rtol=1e-4, atol=1e-5)


MASKS = ["attn_mask of bool", "attn_mask of float", "key_padding_mask"]
EXTRAS: list[dict[str, bool]] = [{}, {"add_bias_kv": True}, {"add_zero_attn": True}]


# torch's own is_causal hides an added key from the first queries, so it is tried without one.
@pytest.mark.parametrize(
    ("mask", "extra"), [*((mask, extra) for mask in MASKS for extra in EXTRAS), ("is_causal", {})], ids=str
)
def test_masks_and_added_keys_act_as_in_the_formula(mask, extra):
    example = inputs()
    angular, _ = convert(example, **extra)
    hidden = torch.zeros(LENGTH, SOURCE, dtype=torch.bool)
    hidden[0, 2:] = hidden[1, 0] = True
    scores = torch.zeros(LENGTH, SOURCE).masked_fill(hidden, -torch.inf)
    given: dict[str, Any] = {"attn_mask": hidden}
    if mask == "attn_mask of float":
        scores = normal(LENGTH, SOURCE, seed=30, dtype=torch.float32)
        given = {"attn_mask": scores}
    elif mask == "key_padding_mask":
        padded = torch.tensor([[False] * 5, [False, False, False, True, True]])
        scores = torch.zeros(BATCH, 1, 1, SOURCE).masked_fill(padded[:, None, None], -torch.inf)
        given = {"key_padding_mask": padded}
    elif mask == "is_causal":
        scores = torch.zeros(LENGTH, SOURCE).masked_fill(torch.ones(LENGTH, SOURCE).triu(1).bool(), -torch.inf)
        given = {"attn_mask": torch.ones(LENGTH, SOURCE).triu(1).bool(), "is_causal": True}
    expected = formula(angular, *example, scores)
    for need_weights in (True, False):
        if need_weights and mask == "is_causal":
            continue  # torch itself then takes the mask alone
        result = angular(*example, **given, need_weights=need_weights)[0]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_the_attention_weights_come_out_as_in_the_formula(average):
    query, key, value = inputs()
    angular, _ = convert([query, key, value])
    weights = angular(query, key, value, average_attn_weights=average)[1]
    call = getattr(angular, CALLS)["in_proj_weight"]
    q, k = (
        angular_map(x, angular.in_proj_weight[rows], angular.in_proj_bias[rows], call, rows).unflatten(-1, (HEADS, -1))
        for x, rows in ((query, slice(E)), (key, slice(E, 2 * E)))
    )
    expected = (torch.einsum("blhd,bshd->bhls", q, k) / (E // HEADS) ** 0.5).softmax(-1)
    torch.testing.assert_close(weights, expected.mean(1) if average else expected, rtol=1e-4, atol=1e-5)
    assert angular(query, key, value, need_weights=False)[1] is None


def test_unbatched_input_gives_what_a_batch_of_one_gives():
    example = inputs()
    angular, _ = convert(example)
    result = angular(*(x[0] for x in example))[0]
    torch.testing.assert_close(result, angular(*example)[0][0])


def test_dropout_of_attention_acts_in_training_only():
    example = inputs()
    angular, _ = convert(example, training=True, dropout=0.5)
    first, second = (angular(*example)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(angular(*example)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(angular.eval()(*example)[0], formula(angular, *example), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_of_the_projections():
    example = inputs()
    angular, _ = convert(example, add_bias_kv=True)
    angular(*example)[0].square().sum().backward()
    gradients = {name: p.grad for name, p in angular.named_parameters()}
    # A bias of the keys moves all scores of a query alike, but not that of the added key.
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values()), gradients


def test_a_converted_attention_is_still_one_and_keeps_its_names():
    angular, plain = convert(inputs())
    assert isinstance(angular, nn.MultiheadAttention)
    assert "MultiheadAttention" in type(angular).__name__
    before, after = plain.state_dict(), angular.state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_attends_the_same(through):
    example = inputs()
    angular, _ = convert(example)
    torch.testing.assert_close(through(angular)(*example)[0], angular(*example)[0], rtol=0, atol=0)


def make_attending() -> nn.Module:
    torch.manual_seed(0)
    return Attending()


@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
def test_a_converted_attention_is_saved_and_a_plan_tells_all_of_it(operator, tmp_path):
    example = tuple(inputs())
    angular = sphereify(make_attending(), attention="convert", operator=operator, example_inputs=example).eval()
    loaded = load(save(angular, tmp_path / "model"), factory=make_attending)
    torch.testing.assert_close(loaded(*example), angular(*example), rtol=0, atol=0)
    plan = ConversionPlan.from_json(angular.conversion_plan.to_json())
    torch.testing.assert_close(apply_plan(make_attending(), plan).eval()(*example), angular(*example), rtol=0, atol=0)


def test_converting_an_attention_twice_changes_nothing():
    example = tuple(inputs())
    once = sphereify(make_attending(), attention="convert", example_inputs=example).eval()
    twice = sphereify(once, attention="convert", example_inputs=example).eval()
    assert list(twice.state_dict()) == list(once.state_dict())
    torch.testing.assert_close(twice(*example), once(*example), rtol=0, atol=0)


@pytest.mark.exhaustive
def test_a_converted_attention_compiles_without_graph_breaks():
    example = inputs()
    angular, _ = convert(example)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(angular), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*example)[0], angular(*example)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only", ["in_proj", "out_proj"])
def test_one_projection_can_be_converted_without_the_other(only):
    torch.manual_seed(0)
    model, example = Attending().eval(), inputs()
    angular = sphereify(model, attention="convert", include=f"*{only}*", head="keep", example_inputs=tuple(example))
    assert [d.name.split(".")[-1] for d in angular.conversion_plan.converted] == [
        {"in_proj": "in_proj_weight", "out_proj": "out_proj"}[only]
    ]
    result = angular.attention(*example)[0]
    assert not torch.allclose(result, model.attention(*example)[0], rtol=1e-2, atol=1e-3)
    scaled = [10 * x for x in example]
    # Angular projections of longer inputs are the same, but for ε; linear ones are not.
    same = torch.allclose(angular.attention(*scaled)[0], result, rtol=1e-2, atol=1e-2)
    assert same == (only == "in_proj")


# ------------------------------------------------------------------------------------------------------ kept by default


@pytest.mark.parametrize("options", [{}, {"attention": "keep"}])
def test_attention_is_kept_by_default_with_the_way_to_convert_it(options):
    model, example = Attending().eval(), inputs()
    angular = sphereify(model, example_inputs=tuple(example), **options)
    kept = {d.name: d.reason for d in angular.conversion_plan.kept}
    assert "not one score a class and image" in kept.pop("fc")
    assert set(kept) == {"attention.in_proj_weight", "attention.out_proj"}
    assert all("nn.MultiheadAttention" in r and "attention='convert'" in r for r in kept.values())
    assert type(angular.attention) is nn.MultiheadAttention
    torch.testing.assert_close(angular.attention(*example)[0], model.attention(*example)[0], rtol=0, atol=0)


def test_with_kdim_and_vdim_each_projection_is_a_site():
    plan = plan_conversion(Attending(kdim=4, vdim=6), example_inputs=tuple(inputs(4, 6)), attention="convert")
    found = {d.name: d.shape for d in plan.converted if d.name.startswith("attention.")}
    assert found == {
        "attention.q_proj_weight": (E, E), "attention.k_proj_weight": (E, 4), "attention.v_proj_weight": (E, 6),
        "attention.out_proj": (E, E),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- torch's layers


def encoder(layers: int = 2, **given: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True, **given)
    return nn.Sequential(nn.Linear(4, E), nn.TransformerEncoder(layer, layers), nn.Linear(E, 3))


@pytest.mark.filterwarnings("ignore:.*nested_tensor.*:UserWarning")
@pytest.mark.parametrize("given", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("attention", ["keep", "convert"])
@pytest.mark.parametrize("part", ["layer", "encoder"])
def test_without_gradients_an_encoder_computes_what_it_computes_with_them(part, attention, given):
    x = normal(BATCH, LENGTH, 4, dtype=torch.float32)
    model = encoder(**given)
    if part == "layer":
        model[1] = model[1].layers[0]
    angular = sphereify(model, attention=attention, example_inputs=x, **OPERATOR).eval()
    slow = angular(x)
    with torch.no_grad():
        torch.testing.assert_close(angular(x), slow, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(angular(x).clone(), slow.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("attention", ["keep", "convert"])
def test_padded_positions_of_an_encoder_are_masked_with_and_without_gradients(attention):
    x = normal(BATCH, LENGTH, E, dtype=torch.float32)
    padded = torch.tensor([[False, False, False], [False, False, True]])
    model = encoder()
    angular = sphereify(model, attention=attention, example_inputs=x[..., :4], **OPERATOR).eval()[1]
    slow = angular(x, src_key_padding_mask=padded)
    with torch.no_grad():
        fast = angular(x, src_key_padding_mask=padded)
    torch.testing.assert_close(fast[~padded], slow[~padded], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["keep", "convert"])
def test_every_layer_of_an_encoder_depends_on_its_own_beta_without_gradients(attention):
    x = normal(BATCH, LENGTH, 4, dtype=torch.float32)
    angular = sphereify(encoder(), attention=attention, example_inputs=x, rescale="always").eval()
    betas = {name: p for name, p in angular.named_parameters() if name.endswith("beta")}
    assert len(betas) == 1 + 2 * (4 if attention == "convert" else 2) + 0
    with torch.no_grad():
        before = angular(x)
        for name, beta in betas.items():
            kept = beta.clone()
            beta.mul_(-1.5)
            assert not torch.allclose(angular(x), before, atol=1e-4), name
            beta.copy_(kept)


def test_a_plain_encoder_that_is_kept_whole_stays_on_its_fast_path():
    x = normal(BATCH, LENGTH, 4, dtype=torch.float32)
    angular = sphereify(encoder(), exclude="1.*", example_inputs=x)
    assert all(layer.activation_relu_or_gelu == 1 for layer in angular[1].layers)


@pytest.mark.parametrize("attention", ["keep", "convert"])
def test_torchvisions_vision_transformer(attention):
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=5).eval()
    x = normal(2, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        nn.init.normal_(model.heads.head.weight)
    angular = sphereify(model, attention=attention, example_inputs=x, **OPERATOR).eval()
    projections = [d for d in angular.conversion_plan.decisions if "self_attention" in d.name]
    assert len(projections) == 4
    assert {d.action for d in projections} == {attention}
    slow = angular(x)
    assert not torch.allclose(slow, model(x), rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(angular(x), slow, rtol=1e-5, atol=1e-5)
    angular.train()(x).square().sum().backward()
    assert [n for n, p in angular.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [d.name for d in angular.conversion_plan.verify(angular, x).decisions if not d.called] == []


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Linear(4, 4), kind(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.rnn(self.embed(x))[0][:, -1])


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.form, self.fc = nn.Linear(4, 4), nn.Bilinear(4, 4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.form(self.embed(x), x))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.fc = nn.Linear(4, 4), nn.LSTMCell(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.cell(self.embed(x))[0])


WORDS = torch.tensor([[1, 2, 0], [3, 4, 4]])
KEPT = {
    "LSTM": (lambda: Recurrent(nn.LSTM), (2, 3, 4), "rnn", "recurrent layer"),
    "GRU": (lambda: Recurrent(nn.GRU), (2, 3, 4), "rnn", "recurrent layer"),
    "LSTMCell": (Cell, (2, 4), "cell", "recurrent layer"),
    "Bilinear": (Bilinear, (2, 4), "form", "bilinear form"),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), None, "0", "looked up",
    ),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), None, "0",
        "looked up",
    ),
    **{
        f"ConvTranspose{d}d": (
            lambda d=d: nn.Sequential(
                (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](4, 4, 3),
                (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1](4, 6, 3), nn.ReLU(),
            ), (2, 4, *[5] * d), "1", "transposed convolution",
        )
        for d in (1, 2, 3)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_layer_without_an_angular_twin_is_kept_with_its_reason_and_the_network_learns(name):
    make, shape, layer, reason = KEPT[name]
    torch.manual_seed(0)
    model, x = make(), WORDS if shape is None else normal(*shape, dtype=torch.float32)
    angular = sphereify(model, example_inputs=x)
    [decision] = [d for d in angular.conversion_plan.decisions if d.name == layer]
    assert decision.action == "keep"
    assert re.search(reason, decision.reason)
    assert decision.called
    assert type(angular.get_submodule(layer)) is type(model.get_submodule(layer))
    assert any(isinstance(module, AngularLayer) for module in angular.modules())
    angular(x).square().sum().backward()
    assert [n for n, p in angular.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    loud = sphereify(model, example_inputs=x, include=["*"], attention="convert")
    assert type(loud.get_submodule(layer)) is type(model.get_submodule(layer))
