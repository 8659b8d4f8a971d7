"""The options of a conversion: declared once, checked at once, and back from JSON."""

import dataclasses
import typing

import pytest
from torch import nn

from sphereify import ConversionOptions, plan_conversion
from sphereify.convert.options import ConversionKeywords
from sphereify.errors import UsageError
from sphereify.options import options_of
from tests.convert.models import Power, plain


def test_the_keywords_for_type_checkers_are_the_fields_of_the_options():
    fields = {field.name: field.type for field in dataclasses.fields(ConversionOptions)}
    assert typing.get_type_hints(ConversionKeywords) == fields
    assert list(ConversionKeywords.__annotations__) == list(fields)
    assert not ConversionKeywords.__required_keys__


def test_every_field_is_an_option_with_help_and_a_panel():
    options = options_of(ConversionOptions)
    assert list(options) == [field.name for field in dataclasses.fields(ConversionOptions)]
    assert all(about.help.endswith(".") and about.panel for about in options.values())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"include": 3}, "include: got 3, expected a pattern or a list of patterns"),
        ({"overrides": ["fc"]}, r"overrides: got \['fc'\], expected a dict of pattern to 'keep' or settings"),
        ({"overrides": {"re:(": "keep"}}, r"overrides: 're:\(' is not a regular expression"),
        ({"overrides": {"fc": {"operator": 5}}}, "operator: got 5, expected a name or a callable"),
        ({"overrides": {"fc": {"rescale": "alway"}}}, r"overrides\['fc'\]: rescale: got 'alway'.*mean 'always'"),
        ({"eps": float("inf")}, "eps: got inf"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_before_there_is_a_model(options, text):
    with pytest.raises(UsageError, match=text):
        ConversionOptions(**options)


def test_an_unknown_option_is_told_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"option: got 'operators', .* Did you mean 'operator'?"):
        ConversionOptions.from_keywords({"operators": "linear"})


def test_words_take_their_canonical_spelling():
    options = ConversionOptions(head="W_Softmax", overrides={"fc": {"rescale": "NEVER"}})
    assert options.head == "w-softmax"
    assert options.overrides == {"fc": {"rescale": "never"}}


def test_patterns_from_an_iterator_can_be_read_again():
    options = ConversionOptions(exclude=(name for name in ("stem", "body")))
    assert options.exclude == ["stem", "body"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"operator": "sigmoid", "k": 0.5, "exclude": "stem"},
        {"head": "s-softmax", "scale": 10.0, "include": ["body", "re:fc"], "eps": 1e-6},
        {"overrides": {"stem": "keep", "body": {"operator": "linear", "rescale": "always"}}, "skip_shortcuts": True},
    ],
)
def test_options_go_to_json_and_back_and_make_the_same_plan(options):
    made = ConversionOptions(**options)
    back = ConversionOptions.from_json(made.to_json())
    assert back == made
    assert plan_conversion(plain(), **back.keywords()) == plan_conversion(plain(), **options)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"operator": Power(2)}, r"operator: got Power\(\)"),
        ({"head_operator": nn.Identity()}, r"head_operator: got Identity\(\)"),
        ({"overrides": {"fc": {"operator": Power(2)}}}, r"overrides\['fc'\]: got Power\(\)"),
    ],
)
def test_an_operator_object_is_refused_by_json(options, place):
    with pytest.raises(UsageError, match=f"{place}, an operator object, which JSON cannot hold"):
        ConversionOptions(**options).to_json()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "options: not JSON"),
        ("[]", "options: got list in JSON, expected an object"),
        ('{"operators": "linear"}', "option: got 'operators'"),
        ('{"eps": -1}', "eps: got -1"),
    ],
)
def test_a_text_that_holds_no_options_is_refused(text, problem):
    with pytest.raises(UsageError, match=problem):
        ConversionOptions.from_json(text)
