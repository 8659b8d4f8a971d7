"""Output layers by use: tied to other layers, inside parts, beside features, and in containers of all kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import plan_conversion, sphereify
from sphereify.errors import UsageError
from sphereify.nn import AngularHead
from tests.convert.models import Net


def decisions(model, **options):
    return {decision.name: decision for decision in plan_conversion(model, **options).decisions}


def classifiers(model, **options):
    return {name for name, decision in decisions(model, **options).items() if decision.role == "classifier"}


def untraced(x):
    """The same values, in a way that no trace can follow."""
    return x if x.mean() > -9 else 2 * x


WAYS = {"traced": lambda x: x, "untraced": untraced}
TOKENS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def language_model(way, scores):
    net = Net(
        lambda n, x: scores(n, n.layer(WAYS[way](n.table(x)))[:, -1]),
        table=nn.Embedding(20, 8),
        layer=nn.Linear(8, 8),
        head=nn.Linear(8, 20, bias=False),
    )
    net.head.weight = net.table.weight
    return net


@pytest.mark.parametrize("way", WAYS)
def test_an_output_layer_that_is_tied_to_an_embedding_goes_by_its_own_name(way):
    net = language_model(way, lambda n, h: n.head(h))
    assert classifiers(net, example_inputs=TOKENS) == {"head"}
    kept = decisions(net, example_inputs=TOKENS, head="keep")
    assert (kept["head"].action, kept["head"].reason) == ("keep", "classifier: head='keep'")
    assert kept["table"].role != "classifier"
    angular = sphereify(net, example_inputs=TOKENS, head="w-softmax")
    assert type(angular.head) is AngularHead
    assert angular.head.weight is angular.table.weight


@pytest.mark.parametrize("way", WAYS)
def test_a_table_that_also_serves_as_the_output_layer_is_no_classifier_that_could_be_swapped(way):
    net = language_model(way, lambda n, h: F.linear(h, n.table.weight))
    assert classifiers(net, example_inputs=TOKENS) == set()
    with pytest.raises(UsageError, match="no classifier was found"):
        plan_conversion(net, example_inputs=TOKENS, head="w-softmax")


def inner():
    return Net(lambda n, x: n.fc(n.first(untraced(x)).relu()), first=nn.Linear(8, 8), fc=nn.Linear(8, 5))


WRAPPED = {
    "in a sequence": (lambda: nn.Sequential(inner()), "0.fc"),
    "two deep": (lambda: nn.Sequential(nn.Sequential(inner()), nn.Softmax(1)), "0.0.fc"),
    "called by a module": (lambda: Net(lambda n, x: {"logits": n.net(2 * x)}, net=inner()), "net.fc"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_classifier_inside_a_part_that_cannot_be_traced_is_found_in_the_whole(kind):
    make, name = WRAPPED[kind]
    found = decisions(make(), example_inputs=FEATURES[0])
    assert (found[name].role, found[name].head) == ("classifier", "w-softmax")
    assert [d.name for d in found.values() if d.role == "classifier"] == [name]


def residual_states(n, x):
    states = []
    for layer in (n.a, n.b):
        x = x + layer(n.norm(x))
        states.append(x)
    return states


def logits_of(n, states):
    return n.fc(n.norm(states[-1]).mean(1)), states


HIDDEN = {
    "hidden states beside logits": (lambda n, x: logits_of(n, residual_states(n, x)), {"fc"}),
    "a list of features": (lambda n, x: (n.a(x).relu(), n.b(n.a(x).relu()).relu()), {"b"}),
    "the last layer of a residual block": (lambda n, x: residual_states(n, n.first(x))[-1], set()),
    "a sum with features of another width": (lambda n, x: (lambda h: n.fc(h) + h[..., :5])(n.a(x)), {"fc"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_layer_that_others_read_or_add_to_is_no_output_layer(kind, way):
    wiring, expected = HIDDEN[kind]
    parts = {"first": nn.Linear(8, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}
    net = Net(lambda n, x: wiring(n, WAYS[way](x)), **parts, fc=nn.Linear(8, 5))
    assert classifiers(net, example_inputs=FEATURES) == expected


def own_rms(n, x):
    h = n.fc(x)
    return n.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def own_layer_norm(n, x):
    h = n.fc(x)
    return (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6) * n.scale + 1


@pytest.mark.parametrize("norm", [own_rms, own_layer_norm, lambda n, x: F.normalize(n.fc(x), dim=-1) * n.scale])
def test_a_normalization_that_is_written_by_hand_reads_features(norm):
    net = Net(lambda n, x: norm(n, untraced(x)), fc=nn.Linear(8, 5))
    net.scale = nn.Parameter(torch.ones(5))
    assert classifiers(net, example_inputs=FEATURES[0]) == set()


CONTAINERS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y,),
    "dict": lambda y: {"logits": y},
    "nested": lambda y: [{"scores": y}],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_scores_of_three_dimensions_are_kept_in_whatever_they_are_returned(container, way):
    net = Net(
        lambda n, x: CONTAINERS[container](n.fc(n.first(WAYS[way](x)))), first=nn.Linear(8, 8), fc=nn.Linear(8, 5)
    )
    decision = decisions(net, example_inputs=FEATURES)["fc"]
    assert (decision.role, decision.action) == ("classifier", "keep")
    assert decision.reason.startswith("the output has shape (2, 4, 5), not one score a class and image")
    assert decisions(net, example_inputs=FEATURES, head="w-softmax")["fc"].head == "w-softmax"
    assert decisions(net, example_inputs=FEATURES[0])["fc"].head == "w-softmax"


def test_the_name_of_a_last_layer_is_not_enough_where_its_width_is_that_of_a_hidden_state():
    parts = {"table": nn.Embedding(20, 8), "fc1": nn.Linear(8, 16)}
    block = Net(lambda n, x: n.fc2(n.fc1(untraced(n.table(x["ids"])))), **parts, fc2=nn.Linear(16, 8))
    assert classifiers(block) == set()  # tensors have no such key: nothing runs
    assert classifiers(Net(block.wiring, **parts, fc2=nn.Linear(16, 3))) == {"fc2"}


class Integral(nn.Module):
    """A distribution over distances to its mean, by a convolution that is never trained."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 1, 1, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.conv(x.flatten(2).unflatten(1, (4, 4)).softmax(2).transpose(1, 2)).flatten(1)


class AnchorFree(nn.Module):
    """A detector whose box centres are kept from one run to the next as long as sizes do not change."""

    def __init__(self):
        super().__init__()
        self.body, self.scores = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.boxes, self.integral = nn.Conv2d(8, 16, 1), Integral()
        self.masks, self.kernels = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.size, self.centres = None, torch.empty(0)

    def forward(self, x):
        h = self.body(torch.stack(list(x))).relu()  # which no trace can follow
        if self.size != h.shape:
            self.size, self.centres = h.shape, torch.arange(h[0, 0].numel(), device=h.device) + 0.5
        boxes = self.centres - self.integral(self.boxes(h)).unflatten(1, (4, -1))
        masks = torch.einsum("bkhw,bkn->bnhw", self.masks(h), self.kernels(h).flatten(2))
        return boxes, self.scores(h).sigmoid(), masks


@pytest.mark.parametrize("given", [True, False])
def test_output_convolutions_of_an_anchor_free_detector_are_kept_before_and_after_a_run(given):
    model, x = AnchorFree(), torch.randn(1, 3, 8, 8)
    options = {"example_inputs": x} if given else {}
    plan = plan_conversion(model, **options)
    assert {d.name for d in plan.converted} == {"body"}
    assert all("output convolution" in d.reason for d in plan.kept)
    model(x)
    assert plan_conversion(model, **options).decisions == plan.decisions


# ------------------------------------------------------------------------------------- what is done to scores behind


EACH_SCORE = {
    "masked": lambda z: z.masked_fill(torch.arange(z.shape[1]) == 1, float("-inf")),
    "where": lambda z: torch.where(torch.arange(z.shape[1]) == 1, torch.full_like(z, -1e9), z),
    "clamp": lambda z: z.clamp(-10, 10),
    "minus": lambda z: z - 1,
    "from one": lambda z: 1 - z,
    "negated": lambda z: -z,
    "exp": torch.exp,
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "log of softmax": lambda z: z.softmax(1).log(),
    "centred": lambda z: z - z.mean(1, keepdim=True),
    "double": lambda z: z.double(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", EACH_SCORE)
def test_what_changes_each_score_by_itself_leaves_an_output_layer_one(tail, way):
    net = Net(
        lambda n, x: EACH_SCORE[tail](n.fc(n.body(WAYS[way](x)).relu())), body=nn.Linear(8, 6), fc=nn.Linear(6, 3)
    )
    inputs = FEATURES[:, 0]
    assert classifiers(net, example_inputs=inputs) == {"fc"}
    assert decisions(net, example_inputs=inputs, head="keep")["fc"].action == "keep"
    assert decisions(net, example_inputs=inputs)["fc"].head == "w-softmax"


@pytest.mark.parametrize("way", WAYS)
def test_a_denoiser_that_subtracts_the_noise_keeps_its_output_layer(way):
    net = Net(lambda n, x: x - n.fc(n.body(WAYS[way](x)).relu()), body=nn.Linear(8, 6), fc=nn.Linear(6, 8))
    kept = decisions(net, example_inputs=FEATURES[:, 0])["fc"]
    assert (kept.role, kept.action) == ("classifier", "keep")


@pytest.mark.parametrize("way", WAYS)
def test_scores_that_are_returned_in_two_forms_are_one_output(way):
    def returned(n, x):
        scores = n.fc(n.body(WAYS[way](x)).relu())
        return {"logits": scores, "probabilities": scores.softmax(1)}

    net = Net(returned, body=nn.Linear(8, 6), fc=nn.Linear(6, 3))
    assert decisions(net, example_inputs=FEATURES[:, 0])["fc"].head == "w-softmax"


class Towers(nn.Module):
    """One layer for images and one for texts, of which a pass may call either."""

    def __init__(self):
        super().__init__()
        self.image, self.deeper = nn.Linear(8, 6), nn.Linear(6, 4)
        self.table, self.text = nn.Embedding(20, 6), nn.Linear(6, 4)

    def forward(self, image=None, text=None):
        a = self.deeper(self.image(image).relu()) if image is not None else None
        b = self.text(self.table(text).mean(1)) if text is not None else None
        return a, b


@pytest.mark.parametrize("given", ["image", "text", "both"])
def test_a_layer_that_the_inputs_do_not_reach_is_an_output_layer_all_the_same(given):
    inputs = {"image": FEATURES[:, 0], "text": TOKENS}
    chosen = inputs if given == "both" else {given: inputs[given]}
    assert classifiers(Towers(), example_inputs=chosen) == {"deeper", "text"}


def test_the_message_that_all_layers_are_kept_speaks_of_patterns_where_one_keeps_some():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(UsageError, match=r"nothing to convert: all 2 layers .*excluded.*\)\. Widen the patterns\.$"):
        plan_conversion(net, head="keep", exclude="0")
    with pytest.raises(
        UsageError, match=r"nothing to convert: all 1 layer would be kept \(1 × output convo.*only\)\.$"
    ):
        plan_conversion(nn.Sequential(nn.Conv2d(3, 6, 3)))


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_whose_weight_another_call_reads_as_well_is_kept(way):
    def autoencoder(n, x):
        return F.linear(n.encode(n.body(WAYS[way](x)).relu()).relu(), n.encode.weight.t())

    net = Net(autoencoder, body=nn.Linear(8, 6), encode=nn.Linear(6, 4))
    kept = decisions(net, example_inputs=FEATURES[:, 0])["encode"]
    assert (kept.action, kept.reason) == ("keep", "it is called, and its weight is used by the model as well")
    assert sphereify(net, example_inputs=FEATURES[:, 0])(FEATURES[:, 0]).shape == (2, 6)


@pytest.mark.parametrize("way", WAYS)
def test_a_table_whose_weight_scores_tokens_in_a_functional_call_is_said_to_be_used_so(way):
    net = language_model(way, lambda n, h: F.linear(h, n.table.weight))
    kept = decisions(net, example_inputs=TOKENS)["table"]
    assert (kept.action, kept.reason) == ("keep", "it is called, and its weight is used by the model as well")
