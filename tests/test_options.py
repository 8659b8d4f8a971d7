"""An option has one home: its default, valid values and help are declared once, and taken from there elsewhere."""

import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass

import numpy as np
import pytest

from sphereify import AngularLoss, HypersphericalEnergy, export, predict
from sphereify.calibration.agreement import check_agreement
from sphereify.calibration.options import CalibrationOptions
from sphereify.datasets import load_data
from sphereify.deployment.options import ExportKeywords, ExportOptions
from sphereify.errors import UsageError
from sphereify.options import check_options, checked_option, option_field, options_of, same_option
from sphereify.shared_options import AugmentationOptions, EnergyOptions, LossOptions
from sphereify.training import DataOptions, Terms, compare, train_once
from sphereify.training.comparison_options import ComparisonKeywords, ComparisonOptions
from sphereify.training.knowledge import keep_knowledge, summary
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.start import start
from sphereify.training.verification import verification
from sphereify.training.verification_options import VerificationOptions


@dataclass(frozen=True)
class Rates:
    lr: float = option_field(1e-3, "Peak rate.", above=0, usual="1e-3")
    share: float | None = option_field(None, "A share.", above=0, below=1, noun="a share")
    steps: int = option_field(3, "Number of steps.", at_least=1)
    schedule: str = option_field("cosine", "Schedule.", choices=("cosine", "poly-1"))

    def __post_init__(self) -> None:
        check_options(self)


def default_of(function: typing.Any, name: str) -> typing.Any:
    return inspect.signature(function).parameters[name].default


def test_an_option_may_be_that_of_another_dataclass_under_another_name():
    @dataclass(frozen=True)
    class Training:
        peak: float = same_option(Rates, "lr", panel="Training")

    assert Training().peak == Rates().lr
    assert options_of(Training)["peak"] == dataclasses.replace(options_of(Rates)["lr"], panel="Training")


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("lr", 1, 1),
        ("lr", np.float32(0.5), 0.5),
        ("steps", np.int64(2), 2),
        ("share", None, None),
        ("share", 0.5, 0.5),
        ("schedule", "Poly_1", "poly-1"),
    ],
)
def test_a_value_alone_is_checked_as_in_its_dataclass(name, value, valid):
    assert checked_option(Rates, name, value) == valid
    assert type(checked_option(Rates, name, value)) is type(valid)  # JSON takes no numbers of numpy's
    assert getattr(Rates(**{name: value}), name) == valid


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lr", 0, "lr: got 0, expected a number above 0. Usual: 1e-3."),
        ("lr", None, "lr: got None, expected a number above 0. Usual: 1e-3."),
        ("share", 1.0, "share: got 1.0, expected a share above 0 and below 1"),
        ("steps", 1.5, "steps: got 1.5, expected a whole number of at least 1"),
        ("schedule", "cosin", "schedule: got 'cosin', expected one of cosine, poly-1. Did you mean 'cosine'?"),
    ],
)
def test_a_value_that_is_not_valid_is_the_same_error_alone_and_in_its_dataclass(name, value, text):
    with pytest.raises(UsageError) as alone:
        checked_option(Rates, name, value)
    with pytest.raises(UsageError) as together:
        Rates(**{name: value})
    assert str(alone.value) == str(together.value) == text
    with pytest.raises(UsageError) as renamed:
        checked_option(Rates, name, value, called="other")
    assert (str(renamed.value), renamed.value.option) == (text.replace(name, "other", 1), "other")


# --------------------------------------------------------------------------------------------------- homes and tenants

ENERGY = {
    "mhe_energy": "energy",
    "mhe_s": "s",
    "mhe_half_space": "half_space",
    "mhe_distance": "distance",
    "mhe_dimensions": "dimensions",
    "mhe_projections": "projections",
    "mhe_gamma": "gamma",
    "mhe_hidden": "hidden_weight",
    "mhe_output": "output_weight",
}


def test_the_energy_of_training_has_the_options_of_the_energy():
    assert [name for name in options_of(Terms) if name.startswith("mhe_")] == list(ENERGY)
    for name, own in ENERGY.items():
        mine, theirs = options_of(Terms)[name], options_of(EnergyOptions)[own]
        assert dataclasses.replace(mine, panel="") == theirs
        assert getattr(Terms(), name) == getattr(EnergyOptions(), own)


@pytest.mark.parametrize(("tenant", "home"), [(Terms, LossOptions), (DataOptions, AugmentationOptions)])
def test_training_and_what_it_calls_share_their_options(tenant, home):
    for field in dataclasses.fields(home):
        assert dataclasses.replace(options_of(tenant)[field.name], panel="") == options_of(home)[field.name]
        assert getattr(tenant, field.name) == field.default
        assert default_of(AngularLoss if home is LossOptions else load_data, field.name) == field.default


def test_the_energy_takes_its_defaults_from_its_options():
    for field in dataclasses.fields(EnergyOptions):
        assert default_of(HypersphericalEnergy, field.name) == field.default


def test_the_number_of_calibration_images_is_one_number():
    number = CalibrationOptions.images
    assert KnowledgeOptions.calibration_images == number
    for function in (start, compare, train_once):
        assert default_of(function, "calibration_images") == number
    for function in (keep_knowledge, summary):
        assert default_of(function, "images") == number
    assert options_of(KnowledgeOptions)["calibration_images"].usual == options_of(CalibrationOptions)["images"].usual


def test_no_calibrate_stands_for_no_images():
    assert KnowledgeOptions(calibration_images=70).images == 70
    assert KnowledgeOptions(no_calibrate=True, calibration_images=70).images == 0


def test_a_verification_takes_its_defaults_from_its_options():
    for name in ("max_pairs", "neighbours", "embedding_layer"):
        assert default_of(verification, name) == getattr(VerificationOptions, name)


@pytest.mark.parametrize(
    ("function", "options", "keywords"),
    [(export, ExportOptions, ExportKeywords), (compare, ComparisonOptions, ComparisonKeywords)],
)
def test_a_function_takes_the_fields_of_its_options_as_keywords(function, options, keywords):
    fields = {field.name: field.type for field in dataclasses.fields(options)}
    assert typing.get_type_hints(keywords) == fields
    assert list(keywords.__annotations__) == list(fields)
    assert not keywords.__required_keys__
    for field in dataclasses.fields(options):
        assert default_of(function, field.name) == field.default
        assert f"    {field.name}: {options_of(options)[field.name].help_in_python[:30]}" in inspect.getdoc(function)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: export(None, "model.onnx", formt="onnx"),
            "export() got an unexpected keyword argument 'formt'. Did you",
        ),
        (lambda: compare(Rates, None, [], output="x", sedes=2), "compare() got an unexpected keyword argument 'sedes'"),
        (lambda: predict(None, None, widht=1), "predict() got an unexpected keyword argument 'widht'"),
    ],
)
def test_a_keyword_that_is_no_option_is_told_as_of_the_function(call, text):
    with pytest.raises(TypeError, match=re.escape(text)):
        call()


def test_none_is_refused_where_a_value_is_required():
    assert checked_option(CalibrationOptions, "agreement", None) is None
    with pytest.raises(UsageError, match="agreement: got None, expected a number above 0 and below 1"):
        check_agreement(None, {})
