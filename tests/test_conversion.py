"""The whole path in one function, and the signatures that completion and `help` show."""

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn

from sphereify import ConversionOptions, plan_conversion, sphereify, suggest
from sphereify.errors import UsageError
from tests.convert.models import images, plain

OPTIONS = [field.name for field in dataclasses.fields(ConversionOptions)]
OWN = {
    sphereify: ["calibration", "calibration_steps", "agreement", "example_inputs", "inplace"],
    plan_conversion: ["example_inputs"],
    suggest: ["loss", "example_inputs", "on_trial", "on_radius"],
}


@pytest.mark.parametrize("function", OWN, ids=lambda function: function.__name__)
def test_the_signature_shows_every_option_with_type_and_default(function):
    parameters = inspect.signature(function).parameters
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == [*OPTIONS, *OWN[function]]
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for field in dataclasses.fields(ConversionOptions):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].annotation == field.type


@pytest.mark.parametrize("function", OWN, ids=lambda function: function.__name__)
def test_the_documentation_describes_every_parameter(function):
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in text, name
    assert "{options}" not in text
    assert "--" not in text
    assert "repeatable" not in text


@pytest.mark.parametrize("function", [sphereify, plan_conversion])
def test_an_unknown_keyword_is_refused_with_the_nearest_one(function):
    with pytest.raises(UsageError, match=r"option: got 'operators', .* Did you mean 'operator'?"):
        function(plain(), operators="linear")


def test_a_wrong_calibration_leaves_the_model_as_it_was():
    model = plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="calibration: got no batches"):
        sphereify(model, calibration=[], inplace=True)
    assert type(model.stem) is nn.Conv2d
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_steps_without_a_calibration_are_refused():
    with pytest.raises(UsageError, match="calibration_steps: has no effect without calibration"):
        sphereify(plain(), calibration_steps=5)


def test_a_calibrated_conversion_in_place_has_the_outputs_of_a_copied_one():
    batches = [images(batch=16)]
    torch.manual_seed(0)
    model = plain().eval()
    copied = sphereify(model, calibration=batches)
    changed = sphereify(model, calibration=batches, inplace=True)
    assert changed is model
    torch.testing.assert_close(changed(images()), copied(images()), rtol=1e-5, atol=1e-6)


def test_what_a_calibration_measured_goes_with_a_further_conversion_and_stays_without_one():
    torch.manual_seed(0)
    first, last, *_ = (d.name for d in plan_conversion(plain()).converted)
    model = sphereify(plain(), include=first, head="keep", calibration=[images()])
    assert model.calibrated
    same = sphereify(model, include=first, head="keep")
    assert same.calibrated
    assert same.calibration_fit == model.calibration_fit
    further = sphereify(model, include=last, head="keep")
    assert not hasattr(further, "calibrated")
    assert not hasattr(further, "calibration_fit")
