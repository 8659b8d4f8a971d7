"""Layers that start as the zero map, as in adapters, ControlNet and adaLN-zero: converted, they stay it and train."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import calibrate, fold, load, save, sphereify
from sphereify.choices import OPERATORS
from tests.convert.models import CLASSES, Net, conv, images


def zero(layer, rows=slice(None)):
    """The layer with some filters of zeros, and without its bias."""
    with torch.no_grad():
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def branch(body=None, norm=None):
    """A branch that ends in a zero convolution and is added to its input, as in ControlNet."""
    torch.manual_seed(0)
    parts = {"a": conv(3, 8), "z": zero(body or nn.Conv2d(8, 8, 1)), "norm": norm or nn.Identity()}
    return Net(
        lambda n, x: n.fc((n.a(x) + n.norm(n.z(n.a(x).relu()))).tanh().mean((2, 3))), **parts, fc=nn.Linear(8, CLASSES)
    )


class Adapter(nn.Module):
    """A linear map with a low-rank branch, B of zeros; as layers, or as parameters of its own."""

    def __init__(self, functional):
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.functional = functional
        if functional:
            self.down, self.up = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(8, 4))
        else:
            self.down, self.up = nn.Linear(8, 4, bias=False), zero(nn.Linear(4, 8, bias=False))

    def forward(self, x):
        if self.functional:
            return self.base(x) + F.linear(F.linear(x, self.down), self.up)
        return self.base(x) + self.up(self.down(x))


class AdaptiveNorm(nn.Module):
    """adaLN-zero: a zero layer gives scale, shift and gate of a branch."""

    def __init__(self):
        super().__init__()
        self.condition = nn.Linear(8, 8)
        self.modulation = zero(nn.Linear(8, 24))
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.body = nn.Linear(8, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        scale, shift, gate = self.modulation(self.condition(x).relu()).chunk(3, dim=1)
        return self.fc(x + gate * self.body(self.norm(x) * (1 + scale) + shift))


def moved(model, x, steps=6):
    """The parameters that training changes, by name."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % CLASSES).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_the_output_is_zero_and_all_parameters_are_trained(name, radius):
    original = branch()
    model = sphereify(original, operator=name, radius=radius)
    x = torch.randn(4, 8, 5, 5)
    assert torch.equal(model.z(x), original.z(x))
    assert {n for n, _ in model.named_parameters()} == moved(model, images(batch=5))


@pytest.mark.parametrize("eps", [1e-4, 1e-6])
@pytest.mark.parametrize("body", [nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3, groups=2), nn.Linear(8, 6)])
def test_the_first_gradient_of_the_filters_is_the_originals_for_inputs_of_unit_size(body, eps):
    plain = zero(copy.deepcopy(body))
    layer = sphereify(nn.Sequential(nn.Identity(), plain, nn.Tanh()), eps=eps)[1]
    x = torch.randn(4, 8) if isinstance(body, nn.Linear) else torch.randn(4, 8, 3, 3)
    x = x.sign()
    outer = torch.randn(plain(x).shape)
    gradients = [torch.autograd.grad((one(x) * outer).sum(), one.weight)[0] for one in (plain, layer)]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("length", [1e-3, 1e-6])
def test_filters_that_are_nearly_zero_compute_nearly_what_they_did(length):
    model = branch()
    with torch.no_grad():
        model.z.weight.copy_(F.normalize(torch.randn(8, 8), dim=1).view(8, 8, 1, 1) * length)
    x = torch.randn(16, 8, 1, 1).sign()
    ratio = sphereify(model).z(x) / model.z(x)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-2, atol=0)


def test_some_filters_of_zeros_leave_the_others_as_they_were():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), zero(nn.Linear(8, 8), slice(0, 3)), nn.Tanh(), nn.Linear(8, 2))
    layer = sphereify(model)[2]
    lengths = model[2].weight.detach().norm(dim=1)
    torch.testing.assert_close(layer.beta.detach()[3:], lengths[3:] * math.sqrt(8))
    torch.testing.assert_close(layer.beta.detach()[:3], torch.full((3,), math.sqrt(1e-4 * 8)))
    assert torch.equal(layer.weight, model[2].weight)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), lambda n: nn.BatchNorm2d(n, affine=False)]
)
@pytest.mark.parametrize("options", [{}, {"norm": "replace"}, {"rescale": "never"}])
def test_with_a_norm_behind(norm, options):
    model = sphereify(branch(nn.Conv2d(8, 8, 1, bias=False), norm(8)), **options)
    assert {"z.weight", "a.weight", "fc.weight"} <= moved(model, images(batch=5))


@pytest.mark.parametrize("functional", [False, True])
def test_adapters(functional):
    torch.manual_seed(0)
    original = nn.Sequential(Adapter(functional), nn.ReLU(), nn.Linear(8, CLASSES))
    model = sphereify(original, example_inputs=torch.randn(2, 8))
    assert len(model.conversion_plan.converted) == 4
    x = torch.randn(5, 8)
    assert torch.equal(model[0](x), model[0].base(x))
    assert {n for n, _ in model.named_parameters()} == moved(model, x)


def test_adaptive_norms():
    torch.manual_seed(0)
    model = sphereify(AdaptiveNorm())
    x = torch.randn(5, 8)
    assert torch.equal(model.modulation(x), torch.zeros(5, 24))
    assert {n for n, _ in model.named_parameters()} == moved(model, x)


def test_what_is_calibrated_can_still_be_trained():
    torch.manual_seed(0)
    body = nn.Sequential(
        conv(3, 8), nn.ReLU(), zero(nn.Conv2d(8, 8, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(512, CLASSES)
    )
    original = body.eval()
    model = sphereify(original)
    calibrate(model, original, [images(batch=16)])
    assert torch.equal(model[2](torch.randn(2, 8, 5, 5)), torch.zeros(2, 8, 5, 5))
    assert (model[2].beta > 0).all()
    assert {n for n, _ in model.named_parameters()} == moved(model.train(), images(batch=5))


def test_a_norm_behind_keeps_its_scale_where_a_calibration_meets_filters_of_zeros():
    torch.manual_seed(0)
    z = zero(nn.Conv2d(8, 8, 1, bias=False))
    original = nn.Sequential(
        conv(3, 8), nn.ReLU(), z, nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(512, CLASSES)
    )
    model = sphereify(original.eval())
    calibrate(model, original, [images(batch=16)])
    assert (model[3].weight != 0).all()
    assert {"2.weight", "3.weight"} <= moved(model.train(), images(batch=5))


def test_classes_of_zeros_get_directions_and_the_others_keep_theirs():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), zero(nn.Linear(16, 9), slice(0, 4)))
    models = [sphereify(original) for _ in range(2)]
    weight = models[0][2].weight.detach()
    assert torch.equal(weight[4:], original[2].weight[4:])
    assert torch.equal(weight, models[1][2].weight)
    assert (original[2].weight[:4] == 0).all()
    fresh = weight[:4].norm(dim=1)
    assert ((fresh > 0.3) & (fresh < 0.9)).all()  # that of nn.Linear is 1/√3 in the mean
    x = torch.randn(32, 6)
    models[0](x).sum().backward()
    gradient = models[0][2].weight.grad.norm(dim=1)
    assert gradient[:4].max() < 10 * gradient[4:].max()


def test_filters_of_zeros_tell_a_trained_norm_nothing_of_the_patches_that_the_others_saw():
    torch.manual_seed(0)
    wide = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2)).eval()
    with torch.no_grad():
        wide[0].weight[4:] = 0
        wide[1].running_mean.copy_(torch.randn(8))
        wide[1].running_var.copy_(0.5 + torch.rand(8))
        wide[1].running_mean[4:] = 0
        wide[1].running_var[4:] = 0
    narrow = nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)).eval()
    for name in ("weight", "running_mean", "running_var"):
        for i in range(2):
            if hasattr(narrow[i], name):
                getattr(narrow[i], name).data.copy_(getattr(wide[i], name)[:4])
    got, expected = sphereify(wide)[1], sphereify(narrow)[1]
    torch.testing.assert_close(got.running_var[:4], expected.running_var)
    torch.testing.assert_close(got.running_mean[:4], expected.running_mean)
    torch.testing.assert_close(got.running_var[4:], torch.full((4,), 1 / 27))  # of random directions, which are to come


def test_saved_loaded_and_folded_it_is_the_same(tmp_path):
    model = sphereify(branch()).eval()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", factory=branch)
    x = images()
    assert torch.equal(loaded.eval()(x), model(x))
    torch.testing.assert_close(fold(model, x)(x), model(x), rtol=1e-5, atol=1e-6)
    assert {n for n, _ in loaded.named_parameters()} == moved(loaded.train(), images(batch=5))
