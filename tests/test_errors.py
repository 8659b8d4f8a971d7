"""An error about an option knows the option, what arrived, what was expected and what to try."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sphereify import AngularLoss, HypersphericalEnergy, Settings, plan_conversion
from sphereify.calibration.options import CalibrationOptions
from sphereify.cli.spelling import Spelling
from sphereify.convert.options import ConversionOptions
from sphereify.errors import (
    NoEffectError,
    UsageError,
    choose,
    exclusive,
    invalid,
    no_effect,
    option,
    refused,
)
from sphereify.nn import AngularHead
from sphereify.nn.functional import sphere_linear

WORDINGS = {
    "invalid": (
        invalid("batch_size", 0, "a number of at least 1", "Usual: 64"),
        ("batch_size", 0, "a number of at least 1", "Usual: 64"),
        "batch_size: got 0, expected a number of at least 1. Usual: 64.",
        "--batch-size: got 0, expected a number of at least 1. Usual: 64.",
    ),
    "invalid, with the default": (
        invalid("eps", 0, "a positive number", default=1e-4),
        ("eps", 0, "a positive number", ""),
        "eps: got 0, expected a positive number; the default is 0.0001",
        "--eps: got 0, expected a positive number; the default is 0.0001",
    ),
    "invalid, inside an option": (
        invalid("overrides", 3, "true or false", place=f"{option('overrides')}['fc']: weighted"),
        ("overrides", 3, "true or false", ""),
        "overrides['fc']: weighted: got 3, expected true or false",
        "--overrides['fc']: weighted: got 3, expected true or false",
    ),
    "choose": (
        choose("share_k", "filte", ["filter", "layer"]),
        ("share_k", "filte", "one of filter, layer", "Did you mean 'filter'?"),
        "share_k: got 'filte', expected one of filter, layer. Did you mean 'filter'?",
        "--share-k: got 'filte', expected one of filter, layer. Did you mean 'filter'?",
    ),
    "choose, nothing near": (
        choose("share_k", "zz", ["filter", "layer"]),
        ("share_k", "zz", "one of filter, layer", ""),
        "share_k: got 'zz', expected one of filter, layer.",
        "--share-k: got 'zz', expected one of filter, layer.",
    ),
    "choose, no option": (
        choose(None, "oprator", ["operator"], place="option"),
        (None, "oprator", "one of operator", "Did you mean 'operator'?"),
        "option: got 'oprator', expected one of operator. Did you mean 'operator'?",
        "option: got 'oprator', expected one of operator. Did you mean 'operator'?",
    ),
    "no effect": (
        no_effect("hold_out_seed", f"without {option('hold_out_classes')}"),
        ("hold_out_seed", None, "", ""),
        "hold_out_seed: has no effect without hold_out_classes",
        "--hold-out-seed: has no effect without --hold-out-classes",
    ),
    "no effect, for a reason": (
        no_effect("radius", since="nothing pools", value=2.0),
        ("radius", 2.0, "", ""),
        "radius=2.0: has no effect, since nothing pools",
        "--radius 2.0: has no effect, since nothing pools",
    ),
    "exclusive": (
        exclusive("verification", "corruptions"),
        ("verification", None, "one at a time", ""),
        "verification and corruptions: got both, expected one at a time",
        "--verification and --corruptions: got both, expected one at a time",
    ),
    "refused": (
        refused("teacher", f"it has not been trained; bring its weights with {option('weights')}", value="original"),
        ("teacher", "original", "", ""),
        "teacher='original': it has not been trained; bring its weights with weights",
        "--teacher original: it has not been trained; bring its weights with --weights",
    ),
}


@pytest.mark.parametrize(("error", "known", "python", "terminal"), WORDINGS.values(), ids=WORDINGS)
def test_an_error_knows_its_option_and_each_interface_prints_it_its_own_way(error, known, python, terminal):
    assert (error.option, error.value, error.expected, error.remedy) == known
    assert str(error) == python
    assert error.spelled(Spelling()) == terminal


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", [wording[0] for wording in WORDINGS.values()], ids=WORDINGS)
def test_what_an_error_knows_survives_pickling_and_copying(error, again):
    twin = again(error)
    assert type(twin) is type(error)
    assert vars(twin) == vars(error)
    assert str(twin) == str(error)
    assert twin.spelled(Spelling()) == error.spelled(Spelling())


def test_a_value_that_cannot_be_pickled_is_kept_as_its_repr():
    error = invalid("radius", lambda: 1, "a number")
    twin = pickle.loads(pickle.dumps(error))
    assert (twin.option, twin.value, str(twin)) == ("radius", repr(error.value), str(error))


def test_an_error_about_something_else_names_no_option():
    error = UsageError("resnet18 was not converted")
    assert (error.option, error.value, error.expected, error.remedy) == (None, None, "", "")


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


RAISED = {
    "a number of settings": (lambda: Settings(epochs=0), "epochs", 0),
    "a word of a conversion": (lambda: ConversionOptions(rescale="sometimes"), "rescale", "sometimes"),
    "an operator": (lambda: ConversionOptions(operator="cosin"), "operator", "cosin"),
    "k": (lambda: ConversionOptions(operator="sigmoid", k=-1.0), "k", -1.0),
    "a setting of a layer": (lambda: ConversionOptions(overrides={"fc": {"radius": -1}}), "overrides", -1),
    "a number of a head": (lambda: AngularHead(4, 3, kind="cosface", scale=0), "scale", 0),
    "a number of an energy": (lambda: HypersphericalEnergy(s=-1), "s", -1),
    "a word of an energy": (lambda: HypersphericalEnergy(distance="cosine"), "distance", "cosine"),
    "a number of a loss": (lambda: AngularLoss(small(), label_smoothing=2), "label_smoothing", 2),
    "an argument of a function": (
        lambda: sphere_linear(torch.ones(1, 2), torch.ones(1, 2), "cosine", eps=0),
        "eps",
        0,
    ),
    "no effect without another": (lambda: CalibrationOptions(images=5), "images", None),
    "no effect on a model": (lambda: plan_conversion(small(), radius=2.0), "radius", 2.0),
    "a pattern": (lambda: plan_conversion(small(), exclude="conv*"), "exclude", None),
    "two that do not go together": (lambda: Settings(morph=0.5, compile=True), "morph", None),
}


@pytest.mark.parametrize(("call", "name", "value"), RAISED.values(), ids=RAISED)
def test_the_errors_of_the_package_know_their_option(call, name, value):
    with pytest.raises(UsageError) as caught:
        call()
    assert (caught.value.option, caught.value.value) == (name, value)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "call",
    [
        lambda: CalibrationOptions(images=5),
        lambda: ConversionOptions(head="w-softmax", margin=3.0),
        lambda: plan_conversion(small(), radius=2.0),
        lambda: Settings.from_json({"terms": {"mhe_s": 2.0}}),
    ],
)
def test_an_option_without_effect_is_an_error_of_that_kind(call):
    with pytest.raises(NoEffectError, match="no effect"):
        call()


def test_what_an_error_knows_is_spelled_as_in_python():
    with pytest.raises(UsageError) as caught:
        Settings(epochs=2, warmup_epochs=5)
    assert caught.value.expected == "at most the 2 of epochs"
