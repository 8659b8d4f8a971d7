"""Hooks: those that a forward needs are a part of the network, those of a spectator are left alone."""

import copy
import functools
import itertools
import weakref

import pytest
import torch
from torch import nn

from sphereify import calibrate, fold, load, plan_conversion, save, sphereify
from sphereify.nn import AngularHead
from tests.convert.models import CLASSES, conv, images
from tests.grids import grid

SEEN = {}
"""What the hooks of `Global` and `Outside` collect."""


def collect(name):
    def hook(module, args, output):
        SEEN[name] = output

    return hook


class Network(nn.Module):
    """Two convolutions whose features a hook collects, and a classifier of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = conv(3, 8), conv(8, 8)
        self.laterals = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        self.fc = nn.Linear(6, CLASSES)
        self.prepare()

    def prepare(self):
        raise NotImplementedError

    def features(self):
        raise NotImplementedError

    def forward(self, x):
        self.b(self.a(x).relu())
        pooled = [feature.mean((2, 3)) for feature in self.features()]
        return self.fc(sum(lateral(one) for lateral, one in zip(self.laterals, pooled, strict=False)).relu())


class Method(Network):
    """Collects with a method of its own, and keeps what it collected."""

    def prepare(self):
        self.kept = {}
        for layer in (self.a, self.b):
            layer.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.kept["a" if module is self.a else "b"] = [output]

    def features(self):
        return [self.kept["a"][0], self.kept["b"][0]]


class Closure(Network):
    """Collects with a function that knows the list. Without hooks it would run and leave out the laterals."""

    def prepare(self):
        collected = []
        self.collected = collected
        for layer in (self.a, self.b):
            layer.register_forward_hook(lambda module, args, output: collected.append(output))

    def features(self):
        return [self.collected.pop(0) for _ in range(len(self.collected))]

    def forward(self, x):
        self.b(self.a(x).relu())
        outputs = [lateral(f.mean((2, 3))) for lateral, f in zip(self.laterals, self.features(), strict=False)]
        return self.fc(sum(outputs).relu()) if outputs else x


class Global(Network):
    """Collects into a dictionary of the module, which the network holds as well."""

    def prepare(self):
        self.seen = SEEN
        self.a.register_forward_hook(collect("a"))
        self.b.register_forward_hook(collect("b"))

    def features(self):
        return [self.seen["a"], self.seen["b"]]


class Outside(Global):
    """The same, and the forward reads the dictionary of the module."""

    def prepare(self):
        super().prepare()
        del self.seen

    def features(self):
        return [SEEN.pop("a"), SEEN.pop("b")]


class Tap:
    """An object that is a hook."""

    def __init__(self):
        self.output = None

    def __call__(self, module, args, output):
        self.output = output


class Taps(Network):
    def prepare(self):
        self.taps = [Tap(), Tap()]
        for layer, tap in zip((self.a, self.b), self.taps, strict=True):
            layer.register_forward_hook(tap)

    def features(self):
        return [tap.output for tap in self.taps]


class Pooling(Network):
    """A hook in front of the classifier changes what it is given; nothing refers to the network."""

    def prepare(self):
        self.fc = nn.Linear(8, CLASSES)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0].mean((2, 3)),))
        self.laterals = nn.ModuleList()

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).relu()[..., :5])  # fits the classifier once it is pooled


class ByName(Method):
    """Collects with functions that know the place by an argument by keyword."""

    def prepare(self):
        self.kept = {}
        for name in ("a", "b"):

            def keep(module, args, output, *, kept=self.kept, name=name):
                kept[name] = [output]

            getattr(self, name).register_forward_hook(keep)


class Partly(Method):
    """Collects with a closure whose first argument is given beforehand."""

    def prepare(self):
        kept = self.kept = {}

        def keep(name, module, args, output):
            kept[name] = [output]

        for name in ("a", "b"):
            getattr(self, name).register_forward_hook(functools.partial(keep, name))


class Weakly(Method):
    """Collects with functions that hold the network by a weak reference, to make no circle."""

    def prepare(self):
        self.kept = {}
        network = weakref.ref(self)
        for layer in (self.a, self.b):
            layer.register_forward_hook(lambda module, args, output: network().keep(module, args, output))


KINDS = [ByName, Partly, Weakly, Method, Closure, Global, Outside, Taps, Pooling]


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


@pytest.mark.parametrize(
    ("kind", "after_a_run"),
    grid(itertools.product(KINDS, (False, True)), lambda kind, after_a_run: after_a_run or kind in (Method, Outside)),
)
def test_a_network_whose_forward_needs_its_hooks_is_converted(kind, after_a_run):
    model = kind()
    if after_a_run:
        model(images()).sum().backward()
        SEEN.clear()
    fresh = plan_conversion(kind(), example_inputs=images())
    plan = plan_conversion(model, example_inputs=images())
    assert plan.decisions == fresh.decisions
    assert plan.decisions == plan_conversion(model).decisions
    assert all(d.action == "convert" and d.called for d in plan.decisions)
    assert not SEEN
    angular = sphereify(model)
    assert isinstance(angular.fc, AngularHead)
    angular(images()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in angular.parameters())
    assert all(d.called for d in plan.verify(angular, images()).decisions)
    assert all(d.called for d in plan.verify(model, images()).decisions)


@pytest.mark.parametrize("kind", [Method, Closure, Global, Taps, ByName, Partly, Weakly])
def test_a_converted_copy_collects_features_of_its_own(kind):
    model = kind()
    angular = sphereify(model)
    x = images()
    expected = sphereify(kind(), inplace=True)(x)
    SEEN.clear()
    torch.testing.assert_close(angular(x), expected)
    assert not SEEN
    before = model(x)
    angular(10 + x)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", [Method, Taps, Pooling])
def test_the_rest_of_the_way(kind, tmp_path):
    model = kind().eval()
    angular = sphereify(model)
    calibrate(angular, model, [images(batch=8)])
    x = images()
    save(angular, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a", factory=kind).eval()(x), angular.eval()(x))
    torch.testing.assert_close(fold(angular, x)(x), angular(x), rtol=1e-5, atol=1e-6)


def test_a_spectator_is_not_run_and_not_rebound():
    model = Method()
    log = []
    model.fc.register_forward_hook(lambda module, args, output: log.append(module))
    plan_conversion(model)
    angular = sphereify(model)
    assert not log
    angular(images())
    assert log == [angular.fc]


@pytest.mark.parametrize("hold", [lambda t: [t], lambda t: {"a": (t,)}, lambda t: Holder(t), lambda t: t])
def test_a_model_that_keeps_what_it_computed_is_converted_and_verified(hold):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = plan_conversion(model)
    kept = hold(model[0](torch.randn(2, 6)))
    model[0].kept = kept
    assert all(d.called for d in plan.verify(model, torch.randn(2, 6)).decisions)
    angular = sphereify(model)
    assert angular[0].kept is not kept
    assert model[0].kept is kept
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)


class Holder:
    """An object that keeps a tensor, and itself."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.itself = self


def test_what_cannot_be_copied_cannot_be_verified_and_that_is_said():
    from sphereify.errors import UnsupportedModelError

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = plan_conversion(model)
    model.handle = open(__file__)  # noqa: SIM115
    with pytest.raises(UnsupportedModelError, match="verify: runs a copy of Sequential, which cannot be copied"):
        plan.verify(model, torch.randn(2, 6))
    model.handle.close()
