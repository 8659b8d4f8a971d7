"""The projection shortcuts of known networks, by hand: no more are kept, and no fewer."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from sphereify import plan_conversion
from tests.convert.models import Net

REASON = "1×1 convolution on a residual shortcut"
T = timm.create_model

SHORTCUTS = {
    # A basic block needs no projection where neither stride nor width changes: layer1 has none.
    "resnet18": (
        lambda: T("resnet18"),
        {"layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    # A bottleneck widens by four already in layer1.
    "resnet50": (
        lambda: T("resnet50"),
        {"layer1.0.downsample.0", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "resnet50d": (  # a pooling comes before the projection
        lambda: T("resnet50d"),
        {"layer1.0.downsample.1", "layer2.0.downsample.1", "layer3.0.downsample.1", "layer4.0.downsample.1"},
    ),
    "resnetv2_50": (
        lambda: T("resnetv2_50"),
        {
            "stages.0.blocks.0.downsample.conv", "stages.1.blocks.0.downsample.conv",
            "stages.2.blocks.0.downsample.conv", "stages.3.blocks.0.downsample.conv",
        },
    ),
    "resnetv2_50x1_bit": (  # its convolutions standardize their weights
        lambda: T("resnetv2_50x1_bit"),
        {
            "stages.0.blocks.0.downsample.conv", "stages.1.blocks.0.downsample.conv",
            "stages.2.blocks.0.downsample.conv", "stages.3.blocks.0.downsample.conv",
        },
    ),
    "nfnet_l0": (
        lambda: T("nfnet_l0"),
        {
            "stages.0.0.downsample.conv", "stages.1.0.downsample.conv", "stages.2.0.downsample.conv",
            "stages.3.0.downsample.conv",
        },
    ),
    "regnetx_002": (
        lambda: T("regnetx_002"),
        {"s1.b1.downsample.conv", "s2.b1.downsample.conv", "s3.b1.downsample.conv", "s4.b1.downsample.conv"},
    ),
    "seresnet18": (
        lambda: T("seresnet18"),
        {"layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "resnext26ts": (
        lambda: T("resnext26ts"),
        {
            "stages.0.0.shortcut.conv", "stages.1.0.shortcut.conv", "stages.2.0.shortcut.conv",
            "stages.3.0.shortcut.conv",
        },
    ),
    "resnext50_32x4d": (
        lambda: T("resnext50_32x4d"),
        {"layer1.0.downsample.0", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "wide_resnet50_2": (
        lambda: T("wide_resnet50_2"),
        {"layer1.0.downsample.0", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    # Between its stages Darknet only strides; inside them all shortcuts are identities.
    "darknet53": (lambda: T("darknet53"), set()),
    # The two halves of a cross-stage-partial stage are concatenated.
    "cspresnet50": (lambda: T("cspresnet50"), set()),
    "mobilenetv2_100": (lambda: T("mobilenetv2_100"), set()),
    "mobilenetv3_small_100": (lambda: T("mobilenetv3_small_100"), set()),
    "densenet121": (lambda: T("densenet121"), set()),
    "torchvision resnet18": (
        torchvision.models.resnet18,
        {"layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "torchvision resnext50_32x4d": (
        torchvision.models.resnext50_32x4d,
        {"layer1.0.downsample.0", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "torchvision wide_resnet50_2": (
        torchvision.models.wide_resnet50_2,
        {"layer1.0.downsample.0", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"},
    ),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, set()),
    "torchvision densenet121": (torchvision.models.densenet121, set()),
}  # fmt: skip


UNMARKED = ("resnet18", "mobilenetv3_small_100")


@pytest.mark.parametrize("name", [n if n in UNMARKED else pytest.param(n, marks=pytest.mark.zoo) for n in SHORTCUTS])
def test_exactly_the_projection_shortcuts_are_kept(name):
    build, expected = SHORTCUTS[name]
    with torch.device("meta"):
        model = build()
    skipping, plain = plan_conversion(model, skip_shortcuts=True), plan_conversion(model)
    assert {d.name for d in skipping.kept if d.reason == REASON} == expected
    assert {d.name for d in skipping.decisions if d.role == "shortcut"} == expected
    assert {d.name for d in skipping.kept} - {d.name for d in plain.kept} == expected
    assert all(skipping_decision.reason for skipping_decision in skipping.kept)


class PreActBottleneck(nn.Module):
    """He et al. 2016: the shortcut starts behind the first normalization, and nothing follows the addition."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 1, bias=False)
        self.proj = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 or inputs != outputs else None

    def forward(self, x):
        ready = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(ready))))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + (x if self.proj is None else self.proj(ready))


class PreActResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential(PreActBottleneck(8, 4, 1), PreActBottleneck(16, 4, 1))
        self.stage2 = nn.Sequential(PreActBottleneck(16, 8, 2), PreActBottleneck(32, 8, 1))
        self.bn, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.stage2(self.stage1(self.stem(x)))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def test_in_a_preact_resnet_of_bottlenecks_exactly_the_two_projections_are_kept():
    plan = plan_conversion(PreActResNet(), skip_shortcuts=True)
    assert {d.name for d in plan.kept} == {"stage1.0.proj", "stage2.0.proj"}
    assert len(plan.converted) == 1 + 4 * 3 + 1


class Misnamed(nn.Module):
    """Two 1×1 convolutions: `shortcut` belongs to the main path, `reduce` is the projection."""

    def __init__(self, call):
        super().__init__()
        self.shortcut, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.reduce = nn.Conv2d(3, 6, 1)
        self.call = call

    def forward(self, x):
        return (self.conv(self.shortcut(x).relu()) + self.call(self.reduce, x)).tanh()


@pytest.mark.parametrize("call", ["module", "function"])
def test_a_shortcut_is_known_by_where_it_lies_whether_a_module_or_a_function_is_called(call):
    calls = {"module": lambda layer, x: layer(x), "function": lambda layer, x: F.conv2d(x, layer.weight, layer.bias)}
    plan = plan_conversion(Misnamed(calls[call]), skip_shortcuts=True, example_inputs=torch.randn(2, 3, 8, 8))
    assert [d.name for d in plan.kept] == ["reduce"]
    assert plan.kept[0].reason == REASON


def test_a_projection_with_a_window_of_3x3_is_converted():
    model = PreActResNet()
    model.stage2[0].proj = nn.Conv2d(16, 32, 3, 2, 1, bias=False)
    assert {d.name for d in plan_conversion(model, skip_shortcuts=True).kept} == {"stage1.0.proj"}


def test_an_override_converts_a_shortcut_that_would_be_kept():
    with torch.device("meta"):
        model = T("resnet18")
    plan = plan_conversion(model, skip_shortcuts=True, overrides={"layer3.0.downsample.0": {"operator": "linear"}})
    assert {d.name for d in plan.kept} == {"layer2.0.downsample.0", "layer4.0.downsample.0"}


def wavenet(n, x):
    """Skip outputs of residual blocks, added up beside the residual stream."""
    total = 0
    for dilated, residual, skip in zip(n.dilated, n.residual, n.skip, strict=True):
        h = dilated(x).tanh()
        x, total = x + residual(h), total + skip(h)
    return n.last(total.relu())


def side_outputs(n, x):
    a = n.first(x).relu()
    b = n.second(a).relu()
    return (n.side(a) + n.deep(b) + n.third(b)).tanh()


def gated(n, x):
    y = n.first(x)
    return (y * n.second(n.third(y).relu()).sigmoid() + y * n.side(y).sigmoid()).tanh()


def conv(inputs, outputs, size=1):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def three(inputs, outputs, size=1):
    return nn.ModuleList(conv(inputs, outputs, size) for _ in range(3))


NOT_RESIDUAL = {
    "gates": (
        gated,
        {"first": conv(3, 8, 3), "third": conv(8, 2), "second": conv(2, 8), "side": conv(8, 1)},
    ),
    "a branch pooled over all positions": (
        lambda n, x: (n.first(x) + n.side(x.mean((2, 3), keepdim=True))).tanh(),
        {"first": conv(3, 8, 3), "side": conv(3, 8)},
    ),
    "a branch pooled over neighbourhoods": (
        lambda n, x: (n.first(x) + n.side(F.avg_pool2d(x, 3, 1, 1))).tanh(),
        {"first": conv(3, 8, 3), "side": conv(3, 8)},
    ),
    "skip outputs of residual blocks": (
        wavenet,
        {"dilated": three(3, 3, 3), "residual": three(3, 3), "skip": three(3, 6), "last": conv(6, 4, 3)},
    ),
    "side outputs": (
        side_outputs,
        {
            "first": conv(3, 8, 3), "second": conv(8, 8, 3), "third": conv(8, 4, 3),
            "side": conv(8, 4), "deep": conv(8, 4),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_RESIDUAL)
def test_a_1x1_convolution_beside_a_sum_that_is_not_residual_is_no_shortcut(kind):
    wiring, parts = NOT_RESIDUAL[kind]
    plan = plan_conversion(Net(wiring, **parts), skip_shortcuts=True)
    assert {d.name for d in plan.decisions if d.role == "shortcut"} == set()


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (2, 1), (3, 2)])
def test_a_shortcut_may_be_pooled_as_long_as_its_values_stay_near_their_places(window, stride):
    def residual(n, x):
        side = n.side(F.avg_pool2d(x, window, stride, window // 2))
        return (n.first(x)[..., : side.shape[-2], : side.shape[-1]] + side).tanh()

    model = Net(residual, first=nn.Conv2d(3, 8, 3, stride, 2), side=conv(3, 8))
    plan = plan_conversion(model, skip_shortcuts=True, example_inputs=torch.randn(2, 3, 8, 8))
    assert {d.name for d in plan.kept} == {"side"}


def test_a_summary_counts_those_shortcuts_as_kept_that_the_option_keeps():
    model = PreActResNet()
    assert "2 shortcuts kept" in plan_conversion(model, skip_shortcuts=True).summary()
    excluded = plan_conversion(model, exclude="*.proj").summary()
    assert "shortcut" not in excluded
    assert "2 layers kept" in excluded


class Guarded(nn.Module):
    """A block that no trace can follow, with a 1×1 convolution by the name of a shortcut."""

    def __init__(self, outputs):
        super().__init__()
        self.conv1, self.conv2 = conv(3, 6, 3), conv(6, 6, 3)
        self.skip = nn.Sequential(conv(3, outputs), nn.ReLU())

    def forward(self, x):
        y = self.conv2(self.conv1(torch.stack(list(x))).relu())
        return torch.cat([y, self.skip(x)], 1).sum((2, 3)).tanh()


@pytest.mark.parametrize(("outputs", "role"), [(6, "shortcut"), (4, "hidden")])
def test_a_name_makes_a_shortcut_only_with_the_channels_of_a_main_path(outputs, role):
    decisions = plan_conversion(nn.Sequential(Guarded(outputs), nn.Linear(6 + outputs, 3))).decisions
    assert {d.role for d in decisions if ".skip." in d.name} == {role}
