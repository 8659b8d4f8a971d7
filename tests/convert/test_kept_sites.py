"""Each product with a parameter is in the plan: what cannot or should not become an angle is kept by a true reason."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d

from sphereify import ConversionPlan, apply_plan, calibrate, fold, load, plan_conversion, save, sphereify
from sphereify.convert.graph import read_graph
from sphereify.errors import UnsupportedModelError, UsageError
from sphereify.nn import AngularHead, SphereConv2d, SphereLinear
from tests.convert.models import CLASSES, Net, conv, images


def decisions(model, x=None, **options):
    return {d.name: d for d in plan_conversion(model, example_inputs=x, **options).decisions}


def actions(model, x=None, **options):
    return {name: d.action for name, d in decisions(model, x, **options).items()}


def rows(width=16, number=6):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------- few inputs


@pytest.mark.parametrize(
    "layer", [nn.Linear(1, 6), nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 1, groups=6), nn.Conv1d(1, 6, 1)]
)
@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_of_a_single_number_only_the_sign_would_be_left(layer, radius):
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, CLASSES))
    decision = decisions(model, radius=radius)["0"]
    assert decision.action == "keep"
    assert decision.reason.startswith("fan-in 1: the angle to a single number is its sign")


def test_functional_calls_and_classifiers_of_a_single_number_are_kept_too():
    model = Net(lambda n, x: n.fc(F.linear(x, n.weight).relu()), fc=nn.Linear(6, CLASSES))
    model.weight = nn.Parameter(torch.randn(6, 1))
    assert actions(model, rows(1)) == {"weight": "keep", "fc": "convert"}
    last = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, CLASSES))
    assert actions(last) == {"0": "convert", "2": "convert", "4": "keep"}


@pytest.mark.parametrize(
    ("layer", "lost"),
    [
        (nn.Linear(2, 6), "one of its two numbers"),
        (nn.Conv1d(6, 6, 3, groups=6), "one of its three numbers"),
        (nn.Conv2d(3, 6, 1), "one of its three numbers"),
        (nn.Conv2d(6, 6, 3, groups=6), ""),
        (nn.Linear(4, 6), ""),
    ],
)
def test_of_two_or_three_numbers_the_plan_says_what_is_lost(layer, lost):
    decision = decisions(nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 6), nn.ReLU()))["0"]
    assert decision.action == "convert"
    assert lost in decision.reason
    assert ("fan-in" in decision.reason) == bool(lost)


# ----------------------------------------------------------------------------------------------- attention of one's own


class Attention(nn.Module):
    """Hands the weights of its layers to torch's attention, as CLIP's pooling does, separately or in one matrix."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.kind = kind
        if kind == "one":
            self.qkv = nn.Linear(8, 24)
            del self.q, self.k, self.v

    def forward(self, x):
        options = {}
        weight = bias = None
        if self.kind == "one":
            weight, bias = self.qkv.weight, self.qkv.bias
        else:
            parts = (self.q, self.k, self.v)
            bias = torch.cat([part.bias for part in parts])
            if self.kind == "separate":
                weight = torch.empty(0)
                names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
                options = {name: part.weight for name, part in zip(names, parts, strict=True)}
                options["use_separate_proj_weight"] = True
            else:
                weight = torch.cat([part.weight for part in parts])
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, weight, bias, None, None, False, 0.0, self.out.weight, self.out.bias, **options
        )[0]


def with_attention(kind):
    parts = {"stem": nn.Linear(8, 8), "attention": Attention(kind), "fc": nn.Linear(8, CLASSES)}
    return Net(lambda n, x: n.fc(n.attention(n.stem(x).relu()).mean(0)), **parts)


def sequences():
    return torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("x", [None, sequences()])
@pytest.mark.parametrize("kind", ["separate", "one"])
def test_projections_that_torchs_attention_gets_are_kept_as_those_of_its_module(kind, x):
    found = decisions(with_attention(kind), x)
    projections = [d for name, d in found.items() if name.startswith("attention")]
    assert len(projections) == (4 if kind == "separate" else 2)
    for decision in projections:
        assert decision.called
        assert decision.reason == (
            "projection of attention (by F.multi_head_attention_forward): attention='convert' makes it angular"
        )


@pytest.mark.parametrize("kind", ["separate", "one"])
def test_they_are_converted_where_that_is_asked_for(kind):
    model = with_attention(kind)
    angular = sphereify(model, attention="convert", example_inputs=sequences(), rescale="never")
    inner = model.attention
    matrix = inner.qkv.weight if kind == "one" else torch.cat([inner.q.weight, inner.k.weight, inner.v.weight])
    bias = inner.qkv.bias if kind == "one" else torch.cat([inner.q.bias, inner.k.bias, inner.v.bias])

    def answer(x, weight, bias):
        norms = (x.square().sum(-1, keepdim=True) + 1e-4).sqrt(), (weight.square().sum(1) + 1e-4).sqrt()
        return x @ weight.T / norms[0] / norms[1] + bias

    x = sequences()
    q, k, v = answer(x, matrix, bias).unflatten(-1, (3, 2, 4)).permute(2, 1, 3, 0, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
    expected = answer(mixed, inner.out.weight, inner.out.bias)
    torch.testing.assert_close(angular.attention(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.attention(x), expected, rtol=1e-2)
    angular(x).sum().backward()
    assert all(p.grad is not None for p in angular.parameters())
    assert all(d.called for d in angular.conversion_plan.verify(angular, x).decisions)


def test_a_weight_that_goes_into_another_one_is_not_said_to_be_unused():
    found = decisions(with_attention("joined"), sequences())
    assert {name: d.reason for name, d in found.items() if name[-1] in "qkv"} == dict.fromkeys(
        ["attention.q", "attention.k", "attention.v"],
        "its own forward is not called: its weight is an operand of cat",
    )
    unused = Net(lambda n, x: n.fc(x) * n.spare.weight.shape[0], fc=nn.Linear(8, CLASSES), spare=nn.Linear(8, 8))
    assert decisions(unused)["spare"].reason == "never called by the model's forward"


# --------------------------------------------------------------------------------------------------- optional arguments


class Towers(nn.Module):
    """Takes images, texts or both."""

    def __init__(self, look=lambda image: None):
        super().__init__()
        self.look = look
        self.stem, self.conv = conv(3, 4), conv(4, 8)
        self.table, self.text = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.spare = nn.Linear(8, 8)

    def forward(self, image=None, text=None):
        self.look(image)
        seen = None if image is None else self.conv(self.stem(image).relu()).mean((2, 3))
        read = None if text is None else self.text(self.table(text).mean(1)).tanh()
        return seen, read


@pytest.mark.parametrize("x", [None, images(), (images(), torch.ones(2, 4, dtype=torch.long))])
def test_what_other_arguments_would_call_is_not_said_to_be_never_called(x):
    found = decisions(Towers(), x)
    assert found["text"].action == "convert"
    assert found["table"].reason == "table that is looked up, not multiplied"
    assert found["spare"].reason == "never called by the model's forward"


def by_shape(image):
    if image is not None and image.shape[0] > 10:
        raise ValueError


def by_shape_always(image):
    if image.shape[0] > 10:
        raise ValueError


@pytest.mark.parametrize("look", [by_shape, by_shape_always])
def test_where_no_trace_follows_other_arguments_they_are_named(look):
    decision = decisions(Towers(look), images())["text"]
    assert decision.action == "keep"
    assert decision.reason == "not called without text: give them as example_inputs if they call it"
    for both in (None, (images(), torch.ones(2, 4, dtype=torch.long))):  # by their names, both are assumed
        found = decisions(Towers(look), both)
        assert found["text"].action == "convert"
        assert found["spare"].reason == "never called by the model's forward"


@pytest.mark.parametrize("look", [lambda image: None, by_shape])
def test_what_only_an_optional_argument_calls_is_an_output_layer_where_the_run_says_so(look):
    class Both(Towers):
        def forward(self, image=None, text=None):
            self.look(image)  # by shapes, only a run gets past it
            return image, None if text is None else self.text(self.table(text).mean(1))

    found = decisions(Both(look), (images(), torch.ones(2, 4, dtype=torch.long)))
    assert found["text"].role == "classifier"


# -------------------------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """A router, two stacks of matrices, one for each expert, and a classifier."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 16)), nn.Parameter(torch.randn(4, 16, 32))
        self.fc = nn.Linear(16, CLASSES)
        self.product = product

    def forward(self, x):
        share, expert = self.router(x).softmax(-1).max(-1, keepdim=True)
        h = self.product(x, self.up, expert[:, 0]).relu()
        return self.fc(self.product(h, self.down, expert[:, 0]).to(x.dtype) * share)


def grouped(x, stack, expert):
    ends = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    ends = ends.to(x.device) if isinstance(x.device, torch.device) else ends
    return torch._grouped_mm(x.bfloat16(), stack.bfloat16().transpose(1, 2), offs=ends)


PRODUCTS = {
    "grouped": grouped,
    "gathered": lambda x, stack, expert: torch.bmm(stack[expert], x.unsqueeze(2)).squeeze(2),
    "selected": lambda x, stack, expert: torch.einsum("bi,boi->bo", x, stack.index_select(0, expert)),
    "half": lambda x, stack, expert: torch.matmul(stack.bfloat16()[expert], x.bfloat16().unsqueeze(2)).squeeze(2),
    "one": lambda x, stack, expert: F.linear(x, stack[expert[0]]),
    "all": lambda x, stack, expert: torch.einsum("bi,eoi->beo", x, stack).mean(1),
    "batched": lambda x, stack, expert: torch.bmm(x.expand(4, -1, -1), stack.transpose(1, 2)).mean(0),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_stacks_of_experts_are_kept_by_name(product):
    model = Experts(PRODUCTS[product])
    found = decisions(model, rows(number=8))
    assert {name: d.action for name, d in found.items()} == {
        "router": "convert", "up": "keep", "down": "keep", "fc": "convert",
    }  # fmt: skip
    assert found["up"].shape in ((4, 32, 16), (4, 16, 32), (8, 32, 16), (32, 16))
    expected = "product with a parameter" if product in ("all", "batched") else "product with one of several matrices"
    assert found["up"].reason.startswith(expected)
    angular = sphereify(model, example_inputs=rows(number=8))
    assert all(d.called for d in angular.conversion_plan.verify(angular, rows(number=8)).decisions)


class Traced(Experts):
    """Takes two arguments, so that it is traced and not run."""

    def forward(self, x, y):
        return super().forward(x) + y


def test_grouped_products_are_in_a_trace_too():
    model = Traced(grouped)
    assert read_graph(model).not_run
    found = actions(model)
    assert (found["up"], found["down"]) == ("keep", "keep")


def test_features_that_are_looked_up_in_a_table_are_no_experts():
    model = Net(lambda n, x: n.fc(torch.bmm(n.table[x], n.table[x].mT).mean(1)), fc=nn.Linear(4, CLASSES))
    model.table = nn.Parameter(torch.randn(50, 8))
    assert list(actions(model, torch.ones(2, 4, dtype=torch.long))) == ["fc"]


def test_an_operation_of_a_library_that_takes_a_matrix_of_parameters_is_kept():
    model = Net(
        lambda n, x: n.fc(n.deform(x, n.offset(x)).mean((2, 3))),
        offset=conv(3, 18), deform=DeformConv2d(3, 8, 3, padding=1), fc=nn.Linear(8, CLASSES),
    )  # fmt: skip
    assert actions(model, images()) == {"offset": "convert", "deform.weight": "keep", "fc": "convert"}


# -------------------------------------------------------------------------------------- compiled parts, complex weights


def part():
    torch.manual_seed(1)
    return nn.Sequential(conv(8, 8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def traced(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.ones(1, 8, 8, 8), check_trace=False)


def with_compiled(make=scripted):
    torch.manual_seed(0)
    layers = [conv(3, 8), make(part()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("x", [None, images()])
@pytest.mark.parametrize("make", [scripted, traced])
def test_the_layers_of_a_compiled_part_are_kept_and_the_others_converted(make, x):
    found = decisions(with_compiled(make), x)
    assert {name: d.action for name, d in found.items()} == {
        "0": "convert", "1.0": "keep", "1.2": "keep", "4": "convert",
    }  # fmt: skip
    assert [d.kind for d in found.values()] == ["conv2d", "conv2d", "conv2d", "linear"] or x is None or make is traced
    assert found["1.0"].shape == (8, 8, 3, 3)
    assert found["1.0"].reason.startswith("compiled by torch.jit, as a part of 1: convert the Python module")


def test_a_compiled_part_that_shows_no_layers_is_kept_as_one():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = with_compiled(lambda module: torch.jit.freeze(torch.jit.script(module.eval())))
    assert actions(frozen) == {"0": "convert", "1": "keep", "4": "convert"}
    assert sphereify(frozen)(images()).isfinite().all()


def test_a_converted_network_with_a_compiled_part_goes_all_the_way(tmp_path):
    model = with_compiled()
    plan = plan_conversion(model)
    angular = apply_plan(model, ConversionPlan.from_json(plan.to_json()))
    assert isinstance(angular[0], SphereConv2d)
    assert isinstance(angular[4], AngularHead)
    x = images()
    angular(x).sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in angular.parameters())
    assert all(p.grad is None for p in model.parameters())
    calibrate(angular, model, [images(batch=16)])
    save(angular, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", factory=with_compiled).eval()(x), angular.eval()(x))
    torch.testing.assert_close(fold(angular, x)(x), angular(x), rtol=1e-5, atol=1e-6)
    plan.verify(angular, x)


class Spectral(nn.Module):
    """Complex weights as a layer and as parameters, on the spectrum of an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.spectral = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.complex64)
        self.modes = nn.Parameter(torch.randn(4, 4, 8, 8, dtype=torch.cfloat))
        self.mix = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))
        self.conv, self.fc = conv(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        spectrum = torch.einsum("bixy,ioxy->boxy", self.spectral(torch.fft.fft2(x)), self.modes)
        mixed = F.linear(spectrum.movedim(1, -1), self.mix).movedim(-1, 1)
        return self.fc(self.conv(torch.fft.ifft2(mixed).abs()).mean((2, 3)))


@pytest.mark.parametrize("x", [None, images()])
def test_complex_weights_are_kept(x):
    found = decisions(Spectral(), x)
    kept = {name: d.reason for name, d in found.items() if d.action == "keep"}
    assert set(kept) == {"spectral", "modes", "mix"}
    assert kept["spectral"] == kept["mix"] == "its weight is complex: the angle is that of real vectors"


def test_a_network_with_complex_weights_goes_all_the_way(tmp_path):
    model = Spectral().eval()
    angular = sphereify(model, example_inputs=images())
    calibrate(angular, model, [images(batch=8)])
    x = images()
    save(angular, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", factory=Spectral).eval()(x), angular.eval()(x))
    torch.testing.assert_close(fold(angular, x)(x), angular(x), rtol=1e-5, atol=1e-6)


def test_beside_a_complex_layer_a_quantized_one_is_still_refused():
    from tests.convert.test_plan import _quantized

    with pytest.raises(UnsupportedModelError, match="is quantized"):
        plan_conversion(nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat), _quantized()))
    mixed = nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat), nn.Linear(4, 4), nn.Tanh())
    assert isinstance(sphereify(mixed)[1], SphereLinear)
    with pytest.raises(UsageError, match=r"nothing to convert: all 1 layer .*its weight is complex"):
        sphereify(nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat)))
