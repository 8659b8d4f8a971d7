"""The provenance of outputs, where no trace of the whole model shows it, and all that a forward pass must not spoil."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from sphereify import load, plan_conversion, save, sphereify
from sphereify.errors import UnsupportedModelError, UsageError
from sphereify.nn import AngularHead, SphereLinear
from tests.convert.models import Net, conv


def decisions(model, **options):
    return {decision.name: decision for decision in plan_conversion(model, **options).decisions}


def named(role, found):
    return {name for name, decision in found.items() if decision.role == role}


# ------------------------------------------------------------------------------------------------ the zoo's other half

BOXES = ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"]
RPN = ["rpn.head.cls_logits", "rpn.head.bbox_pred"]
# name: (the layers whose products are the outputs, the layers that are kept for another reason)
NETWORKS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ([*RPN, *BOXES], []),
    "maskrcnn_resnet50_fpn": (
        [*RPN, *BOXES, "roi_heads.mask_predictor.mask_fcn_logits"], ["roi_heads.mask_predictor.conv5_mask"],
    ),
    "keypointrcnn_resnet50_fpn": ([*RPN, *BOXES], ["roi_heads.keypoint_predictor.kps_score_lowres"]),
    "ssdlite320_mobilenet_v3_large": (
        [f"head.{kind}_head.module_list.{level}.1" for kind in ("classification", "regression") for level in range(6)],
        [],
    ),
    "retinanet_resnet50_fpn": (["head.classification_head.cls_logits", "head.regression_head.bbox_reg"], []),
    "fcos_resnet50_fpn": (
        ["head.classification_head.cls_logits", "head.regression_head.bbox_reg", "head.regression_head.bbox_ctrness"],
        [],
    ),
    "raft_small": (["update_block.flow_head.conv2"], []),
}  # fmt: skip


UNMARKED = ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")


@pytest.mark.parametrize("name", [n if n in UNMARKED else pytest.param(n, marks=pytest.mark.zoo) for n in NETWORKS])
def test_the_output_layers_of_detection_and_optical_flow_are_kept_with_a_reason_and_no_other_is(name):
    outputs, others = NETWORKS[name]
    nothing = {"weights": None} if name == "raft_small" else {"weights": None, "weights_backbone": None}
    with torch.device("meta"):
        model = models.get_model(name, **nothing)
    plan = plan_conversion(model)
    found = {decision.name: decision for decision in plan.decisions}
    assert re.search("not traced", plan.notes[0])
    assert named("classifier", found) == set(outputs)
    assert {decision.name for decision in plan.kept} == {*outputs, *others}
    reasons = {"conv2d": "output convolution", "linear": r"more is done to its scores|one of \d+ outputs"}
    assert all(re.search(reasons[found[output].kind], found[output].reason) for output in outputs)
    assert all(decision.called for decision in plan.decisions)


# ------------------------------------------------------------------------------------------------- a user's own network


class Untraceable(nn.Module):
    """A body, and heads that are wired by `wiring(net, h)`; the rows are taken apart, which no trace can follow."""

    def __init__(self, wiring, **heads):
        super().__init__()
        self.wiring = wiring
        self.body = nn.Linear(4, 8)
        for name, head in heads.items():
            setattr(self, name, head)

    def forward(self, x):
        h = self.body(torch.stack(list(x))).relu()
        return self.wiring(self, h)


class OnValues(Untraceable):
    """The way through the body depends on the values: shapes alone do not get to the end."""

    def forward(self, x):
        h = self.body(x).relu()
        return self.wiring(self, h if h.mean() > 100 else 2 * h)


def two_heads(classes=5, numbers=4):
    return {"scores": nn.Linear(8, classes), "boxes": nn.Linear(8, numbers)}


def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


GIVEN = {"inputs given": {"example_inputs": x()}, "inputs assumed": {}}


def into_place(n, h):
    out = h.new_zeros(len(h), 2, 5)
    out[:, 0] = n.scores(h)
    out[:, 1, :4] = n.boxes(h).sigmoid()
    return out


def labels_by_hand(n, h):
    """Reads its results as numbers, which shapes do not have."""
    scores, boxes = n.scores(h), n.boxes(h)
    return [box for score, box in zip(scores.max(1).values.tolist(), boxes, strict=True) if score > 0]


TWO_HEADS = {
    "tuple": lambda n, h: (n.scores(h), n.boxes(h)),
    "dictionaries in a list": lambda n, h: [{"s": s, "b": b} for s, b in zip(n.scores(h), n.boxes(h), strict=True)],
    "behind functions": lambda n, h: (n.scores(h).softmax(-1).clamp(0.1), torch.cat([n.boxes(h), n.boxes(h).exp()], 1)),
    "a detached branch": lambda n, h: {"scores": n.scores(h), "decoded": n.boxes(h).detach() * 2},
    "a branch that serves as indices": lambda n, h: {"boxes": n.boxes(h), "labels": n.scores(h).argmax(1)},
    "a branch that serves as a mask": lambda n, h: {"boxes": n.boxes(h), "found": n.scores(h) > 0},
    "written into a tensor": into_place,
    "read by hand": labels_by_hand,
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("wiring", TWO_HEADS)
def test_each_of_two_heads_of_an_untraceable_model_is_an_output_and_kept(wiring, given):
    model = Untraceable(TWO_HEADS[wiring], **two_heads())
    found = decisions(model, **GIVEN[given])
    assert named("classifier", found) == {"scores", "boxes"}
    assert {name for name, d in found.items() if d.action == "keep"} == {"scores", "boxes"}
    assert all(
        re.search(r"one of \d+ outputs|more is done to its scores", found[name].reason) for name in ("scores", "boxes")
    )
    angular = sphereify(model, **GIVEN[given])
    assert type(angular.body) is SphereLinear
    assert type(angular.scores) is type(angular.boxes) is nn.Linear


def test_the_heads_of_a_model_that_only_values_lead_to_are_outputs_too():
    found = decisions(OnValues(lambda n, h: (n.scores(h), n.boxes(h)), **two_heads()), example_inputs=x())
    assert named("classifier", found) == {"scores", "boxes"}
    assert found["body"].action == "convert"
    assert all("one of 2 outputs" in found[name].reason for name in ("scores", "boxes"))


def test_both_heads_are_swapped_where_an_angular_head_is_asked_for():
    angular = sphereify(Untraceable(TWO_HEADS["tuple"], **two_heads()), head="w-softmax")
    assert type(angular.scores) is type(angular.boxes) is AngularHead


@pytest.mark.parametrize("kind", [Untraceable, OnValues])
def test_the_one_linear_head_of_an_untraceable_classifier_is_swapped(kind):
    model = kind(lambda n, h: n.anything(h).log_softmax(-1), anything=nn.Linear(8, 5))
    found = decisions(model, example_inputs=x())
    assert (found["anything"].role, found["anything"].head) == ("classifier", "w-softmax")
    assert (found["body"].role, found["body"].head) == ("hidden", None)
    angular = sphereify(model, example_inputs=x())
    assert type(angular.anything) is AngularHead
    assert angular(x()).exp().sum(1).tolist() == pytest.approx([1, 1, 1])


NO_CLASSES = {
    "a score for each position": (lambda n, h: n.last(h.unsqueeze(1)), 5, "the output has shape (3, 1, 5)"),
    "a single number": (lambda n, h: n.last(h), 1, "output of a single number"),
}


@pytest.mark.parametrize("kind", NO_CLASSES)
def test_the_one_linear_head_of_an_untraceable_model_is_kept_where_its_outputs_are_no_classes(kind):
    wiring, width, reason = NO_CLASSES[kind]
    decision = decisions(Untraceable(wiring, last=nn.Linear(8, width)), example_inputs=x())["last"]
    assert (decision.role, decision.action) == ("classifier", "keep")
    assert reason in decision.reason


READ_ON = {
    "through a function": lambda n, h: n.last(n.first(h).sigmoid()),
    "beside what it read": lambda n, h: n.last(n.first(h) + h),
    "and around it": lambda n, h: (lambda features: n.last(features) + features[:, :5])(n.first(h)),
    "in a part": lambda n, h: n.last(torch.cat([h[:, 4:], n.first(h)[:, :4]], 1)),
}


@pytest.mark.parametrize("way", READ_ON)
def test_a_layer_whose_product_another_one_reads_is_no_output(way):
    model = Untraceable(READ_ON[way], first=nn.Linear(8, 8), last=nn.Linear(8, 5))
    assert named("classifier", decisions(model)) == {"last"}


def test_a_rounded_feature_with_a_straight_through_gradient_is_no_output():
    model = Untraceable(lambda n, h: n.last(h + (h.round() - h).detach()), last=nn.Linear(8, 5))
    assert named("classifier", decisions(model)) == {"last"}


NORMS = {
    "batch norm": nn.BatchNorm1d(5),
    "layer norm": nn.LayerNorm(5),
    "group norm": nn.GroupNorm(1, 5),
    "batch norm without scale": nn.BatchNorm1d(5, affine=False),
}


@pytest.mark.parametrize("norm", NORMS)
def test_behind_a_normalization_of_the_last_layer_there_is_no_output_layer(norm):
    model = Untraceable(lambda n, h: n.norm(n.last(h)), last=nn.Linear(8, 5), norm=copy.deepcopy(NORMS[norm]))
    found = decisions(model, example_inputs=x())
    assert named("classifier", found) == set()
    assert {d.action for d in found.values()} == {"convert"}
    assert type(sphereify(model, example_inputs=x()).last) is SphereLinear


def test_an_output_convolution_over_several_scales_is_one_output_layer():
    def pyramid(n, image):
        image = torch.stack(list(image))
        return [n.head(n.stem(scale).relu()) for scale in (image, F.interpolate(image, scale_factor=0.5))]

    found = decisions(Net(pyramid, stem=conv(3, 4), head=conv(4, 5)))
    assert named("classifier", found) == {"head"}
    assert "output convolution" in found["head"].reason


class ByMatrix(Untraceable):
    def __init__(self):
        super().__init__(lambda n, h: h @ n.columns)
        self.columns = nn.Parameter(torch.randn(8, 5))


def test_an_output_that_is_a_product_with_a_parameter_is_kept_as_one():
    found = decisions(ByMatrix())
    assert (found["columns"].role, found["columns"].action) == ("classifier", "keep")
    assert "classifier in a functional call" in found["columns"].reason
    assert found["body"].role == "hidden"


# -------------------------------------------------------------------------------------------- what is refused, and how


def classifier():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [lambda m: torch.jit.script(m), lambda m: torch.jit.trace(m, torch.ones(1, 4))])
def test_a_model_that_is_compiled_by_torch_jit_is_refused_whole_and_kept_as_a_part(make):
    compiled = make(classifier())
    with pytest.raises(UnsupportedModelError, match=r"the model is compiled by torch\.jit: convert the Python model"):
        sphereify(compiled)
    found = decisions(nn.Sequential(nn.Linear(4, 4), compiled, nn.Linear(3, 3)))
    assert {name: found[name].action for name in ("0", "1.0", "1.2", "2")} == {
        "0": "convert", "1.0": "keep", "1.2": "keep", "2": "convert",
    }  # fmt: skip


KEEPING = [{"exclude": "2"}, {"exclude": ["re:[2-9]"]}, {"overrides": {"2": "keep"}}]


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize("head", ["w-softmax", "s-softmax"])
def test_a_head_that_is_asked_for_and_kept_at_once_is_refused_by_name(keeping, head):
    with pytest.raises(UsageError, match=f"head='{head}': the classifier 2 is kept by exclude or overrides"):
        plan_conversion(classifier(), head=head, **keeping)
    for other in ("auto", "keep"):
        assert decisions(classifier(), head=other, **keeping)["2"].action == "keep"


def test_one_of_two_heads_may_be_kept_while_the_other_is_swapped():
    model = Untraceable(TWO_HEADS["tuple"], **two_heads())
    angular = sphereify(model, head="w-softmax", exclude="boxes")
    assert (type(angular.scores), type(angular.boxes)) == (AngularHead, nn.Linear)


# ----------------------------------------------------------------------------------------------------- out and in again


def test_a_detector_that_has_run_is_saved_and_loaded_without_a_factory(tmp_path):
    torch.manual_seed(0)
    plain = models.get_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None)
    model, images = sphereify(plain, inplace=True).eval(), [torch.rand(3, 64, 64)]
    with torch.no_grad():
        model(images)
        loaded = load(save(model, tmp_path / "detector"))
        for detector in (model, loaded):
            detector.roi_heads.score_thresh = 0.0  # an untrained detector is sure of nothing
        [found], [again] = model(images), loaded(images)
    assert len(found["scores"]) > 0
    assert all(torch.equal(found[part], again[part]) for part in ("boxes", "labels", "scores"))


def test_a_timm_model_with_stochastic_depth_says_on_saving_that_loading_needs_a_factory(tmp_path):
    def make():
        return timm.create_model("test_resnet", drop_path_rate=0.1)

    model = sphereify(make()).eval()
    with pytest.warns(UserWarning, match=r"ResNet was built with arguments .* factory="):
        save(model, tmp_path / "deep")
    with pytest.raises(UsageError, match="factory="):
        load(tmp_path / "deep")
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "deep", factory=make)(image), model(image))


# -------------------------------------------------------------------------------------------------- looking is no touch


class Remembering(nn.Module):
    """Keeps its last input and reads it in the next pass, which only an observation can see."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.cache = None

    def forward(self, x):
        if self.cache is not None and len(self.cache) == len(x):
            x = (x + self.cache) / 2
        self.cache = x
        return F.linear(x, 2 * self.weight)


@pytest.mark.parametrize("given", GIVEN)
def test_what_a_forward_stores_while_it_is_traced_does_not_reach_the_run(given):
    model = nn.Sequential(nn.Linear(4, 4), Remembering(), nn.Tanh(), nn.Linear(6, 3))
    plan = plan_conversion(model, **GIVEN[given])
    assert plan.notes == []
    assert {d.name: d.called for d in plan.decisions} == {"0": True, "1.computed": True, "3": True}
    assert model[1].cache is None
    angular = sphereify(model, **GIVEN[given])
    assert angular[1].cache is None
    assert angular(x()).isfinite().all()


class Unfinished(nn.Module):
    """Nothing is wrong with its layers, but its forward does not come to an end."""

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.fc(self.first(x).relu())
        raise ValueError("the scores are of no use")


@pytest.mark.parametrize("converted", [False, True])
def test_a_real_pass_that_fails_behind_the_last_layer_is_told(converted):
    plan = plan_conversion(Unfinished())
    model = sphereify(Unfinished()) if converted else Unfinished()
    with pytest.raises(UsageError, match="verify: Unfinished does not run with these inputs: ValueError: the scores"):
        plan.verify(model, x())
