"""Causal convolutions: recognised by what is done around them, and left without a pool, which would look ahead."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import plan_conversion, sphereify
from sphereify.errors import UsageError
from tests.convert.models import Net, images


class Chomp1d(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class CausalConv1d(nn.Conv1d):
    """Pads in its own forward."""

    def forward(self, x):
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Bare(nn.Module):
    """`before` and `after` around a convolution of 4 to 4 channels, between two that see both sides."""

    def __init__(self, conv, before=lambda x: x, after=lambda y, x: y, kind=nn.Conv1d):
        super().__init__()
        self.first, self.conv, self.last = kind(3, 4, 3, padding=1), conv, kind(4, 2, 3, padding=1)
        self.before, self.after = before, after

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.after(self.conv(self.before(x)), x))


class WaveNet(nn.Module):
    """Gated, dilated and causal, with skips and a residual path."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.first = CausalConv1d(3, 4, 2)
        self.gated = nn.ModuleList(CausalConv1d(4, 8, 2, dilation=2**i) for i in range(depth))
        self.mixing = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(depth))
        self.last = nn.Conv1d(4, 2, 1)

    def forward(self, x):
        x, skips = self.first(x), 0
        for gated, mixing in zip(self.gated, self.mixing, strict=True):
            value, gate = gated(x).chunk(2, 1)
            y = mixing(value.tanh() * gate.sigmoid())
            x, skips = x + y, skips + y
        return self.last(skips.relu())


class Growing(nn.Module):
    """Generates: calls its convolution with one more position each time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x):
        for _ in range(3):
            x = torch.cat([x, self.conv(x)[:, :, -1:]], 2)
        return x


def sequence(length: int = 12, seed: int = 0):
    return torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed))


def video():
    return torch.randn(2, 3, 6, 5, 5, generator=torch.Generator().manual_seed(0))


FRONT, CUT, GROWING = "its input is padded in front only", "the end of its output is cut off", "growing inputs"
CAUSAL = {
    "F.pad": (lambda: Bare(nn.Conv1d(4, 4, 3), lambda x: F.pad(x, (2, 0))), sequence, FRONT),
    "F.pad by keyword": (lambda: Bare(nn.Conv1d(4, 4, 3), lambda x: F.pad(x, pad=[2, 0])), sequence, FRONT),
    "dilated": (lambda: Bare(nn.Conv1d(4, 4, 3, dilation=2), lambda x: F.pad(x, (4, 0))), sequence, FRONT),
    "ConstantPad1d": (lambda: Bare(nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 4, 3))), sequence, FRONT),
    "Chomp1d": (lambda: Bare(nn.Sequential(nn.Conv1d(4, 4, 3, padding=2), Chomp1d(2))), sequence, CUT),
    "cut to the input's length": (
        lambda: Bare(nn.Conv1d(4, 4, 4, padding=3, groups=4), after=lambda y, x: y[..., : x.shape[-1]]), sequence, CUT),
    "narrow": (lambda: Bare(nn.Conv1d(4, 4, 3, padding=2), after=lambda y, x: y.narrow(2, 0, x.shape[2])),
               sequence, CUT),
    "subclass": (lambda: Bare(CausalConv1d(4, 4, 3)), sequence, FRONT),
    "in time": (lambda: Bare(nn.Conv3d(4, 4, 3), lambda x: F.pad(x, (1, 1, 1, 1, 2, 0)), kind=nn.Conv3d), video, FRONT),
    "growing": (lambda: nn.Sequential(Growing(), nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), sequence, GROWING),
}  # fmt: skip
OTHERS = {
    "same": (lambda: Bare(nn.Conv1d(4, 4, 3, padding=1)), sequence),
    "padded on both sides": (lambda: Bare(nn.Conv1d(4, 4, 3), lambda x: F.pad(x, (1, 1))), sequence),
    "padded behind": (lambda: Bare(nn.Conv1d(4, 4, 3), lambda x: F.pad(x, (0, 2))), sequence),
    "padded in front, and by itself on both sides": (
        lambda: Bare(nn.Conv1d(4, 4, 3, padding=1), lambda x: F.pad(x, (2, 0))), sequence),
    "padded in front by less than it reaches": (lambda: Bare(nn.Conv1d(4, 4, 5, padding=1), lambda x: F.pad(x, (1, 0))),
                                                sequence),
    "cut at both ends": (lambda: Bare(nn.Conv1d(4, 4, 3, padding=2), after=lambda y, x: y[:, :, 1:-1]), sequence),
    "narrowed at both ends": (lambda: Bare(nn.Conv1d(4, 4, 3, padding=2),
                                           after=lambda y, x: y.narrow(dim=2, start=1, length=x.shape[2])), sequence),
    "one sample less": (lambda: Bare(nn.Conv1d(4, 4, 4, padding=2), after=lambda y, x: y[:, :, :-1]), sequence),
    "strided": (lambda: Bare(nn.Conv1d(4, 4, 3, padding=1, stride=2), after=lambda y, x: y[:, :, ::2]), sequence),
    "head on several sizes": (
        lambda: Net(
            lambda n, x: [n.head(n.stem(F.avg_pool2d(x, size))) for size in (4, 2, 1)],
            stem=nn.Conv2d(3, 4, 3, padding=1), head=nn.Conv2d(4, 4, 3, padding=1),
        ),
        images,
    ),
}  # fmt: skip


def named(plan, part=".conv"):
    return [d for d in plan.decisions if part in f".{d.name}"]


@pytest.mark.parametrize(("make", "inputs", "sign"), CAUSAL.values(), ids=CAUSAL)
def test_a_causal_convolution_has_no_radius_unless_an_override_gives_it_one(make, inputs, sign):
    model = make()
    plan = plan_conversion(model, radius=2.0, example_inputs=inputs())
    (causal,) = [d for d in plan.converted if d.radius == 0]
    assert causal in named(plan, "conv")
    assert "no radius: causal, " in causal.reason
    assert sign in causal.reason
    assert any(d.radius == 2 for d in plan.converted)
    assert any("1 causal convolution (a pool would look ahead)" in note for note in plan.notes)
    forced = plan_conversion(model, overrides={causal.name: {"radius": 3.0}}, example_inputs=inputs())
    assert {d.name: d.radius for d in forced.converted if d.radius} == {causal.name: 3.0}


@pytest.mark.parametrize(("make", "inputs"), OTHERS.values(), ids=OTHERS)
def test_a_convolution_that_sees_both_sides_has_the_radius(make, inputs):
    plan = plan_conversion(make(), radius=2.0, example_inputs=inputs())
    assert [d.radius for d in plan.converted] == [2.0] * len(plan.converted)


class PerFrame(nn.Module):
    """A 2-d convolution of each frame, and a WaveNet over time."""

    def __init__(self):
        super().__init__()
        self.frames = nn.Conv2d(3, 3, 3, padding=1)
        self.time = WaveNet()

    def forward(self, x):  # (B, T, 3, H, W)
        return self.time(self.frames(x.flatten(0, 1)).square().mean((2, 3)).unflatten(0, x.shape[:2]).mT)


def frames():
    return torch.randn(2, 10, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def sees_the_future(model, x, now=6):
    """True if outputs before `now` change with the inputs from there on; later ones always do."""
    other = x.clone()
    other[:, now:] = x[:, now:].flip(1).square() - 1
    with torch.no_grad():
        moved = (model(x) - model(other)).abs().amax((0, 1))
    assert (moved[now:] > 1e-3).all()
    return bool((moved[:now] > 1e-6).any())


def test_a_causal_network_stays_causal_with_a_radius():
    options = {"radius": 2.0, "head": "keep", "example_inputs": frames()}
    model = sphereify(PerFrame(), **options).eval()
    assert {d.name for d in model.conversion_plan.converted if d.radius} == {"frames"}
    assert {d.name for d in model.conversion_plan.converted if d.kind == "conv1d"} >= {"time.mixing.0", "time.first"}
    assert not sees_the_future(model, frames())
    for name in ("time.gated.1", "time.mixing.0"):
        forced = sphereify(PerFrame(), **options, overrides={name: {"radius": 2.0}}).eval()
        assert sees_the_future(forced, frames())


def test_a_network_of_causal_convolutions_alone_takes_no_radius():
    with pytest.raises(UsageError, match=r"radius=2\.0: has no effect.* causal convolutions must not look ahead"):
        plan_conversion(WaveNet(), radius=2.0, example_inputs=sequence())


def test_without_a_forward_pass_the_class_names_tell():
    class Unknown(Bare):
        def forward(self, x, y):
            return super().forward(x + y.unknown)

    model = Unknown(nn.Sequential(CausalConv1d(4, 4, 3)))
    plan = plan_conversion(model, radius=2.0)
    assert {d.name: d.radius for d in plan.converted} == {"first": 2.0, "conv.0": 0.0}
    assert "causal, it lies in a CausalConv1d" in next(d.reason for d in plan.converted if d.name == "conv.0")


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "tf_mobilenetv3_small_100", "convnext_atto", "test_vit"])
def test_networks_for_images_are_not_causal(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = plan_conversion(model, radius=2.0)
    assert all(d.radius == 2 for d in plan.converted if d.kind.startswith("conv") and not d.head)
