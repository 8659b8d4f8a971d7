"""The rules of what goes together in a test or a comparison are the library's, in the words of Python."""

from pathlib import Path

import pytest
import torch

from sphereify import save, sphereify
from sphereify.errors import UsageError
from sphereify.models import SourceOptions
from sphereify.training import DataOptions
from sphereify.training.comparison_options import ComparisonOptions
from sphereify.training.evaluation_options import EvaluationOptions
from sphereify.training.knowledge import ALL, NOTHING
from sphereify.training.recipe import GENTLE_RADIUS
from sphereify.training.start import open_to_compare, open_to_test
from sphereify.training.verification_options import VerificationOptions
from tests.training.test_knowledge import HERE, small

SMALL = f"{HERE}:small"
VERIFIED = VerificationOptions(verification=True)


def digits(**options) -> DataOptions:
    return DataOptions("digits", img_size=8, **options)


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.save(small().state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.mark.parametrize(
    ("options", "text", "name"),
    [
        ({"against": "resnet18"}, "against: has no effect without corruptions", "against"),
        (
            {"corruptions": True, "against_weights": Path("a.pt")},
            "against_weights: has no effect without against",
            "against_weights",
        ),
        (
            {"corruptions": True, "verified": VERIFIED},
            "verification and corruptions: got both, expected one at a time",
            "verification",
        ),
    ],
)
def test_options_of_an_evaluation_that_do_not_go_together_are_refused(options, text, name):
    with pytest.raises(UsageError) as caught:
        EvaluationOptions(**options)
    assert (str(caught.value), caught.value.option) == (text, name)


def test_those_that_do_are_taken():
    assert EvaluationOptions(verified=VERIFIED).verified.verification
    assert EvaluationOptions(corruptions=True, against="a", against_weights=Path("a.pt")).against == "a"


def test_a_network_is_opened_with_its_original(weights):
    source = SourceOptions(weights=weights, in_chans=1)
    alone = open_to_test(SMALL, digits(), source)
    assert alone.original is None
    asked = EvaluationOptions(corruptions=True, against=SMALL, against_weights=weights)
    opened = open_to_test(SMALL, digits(), source, asked)
    assert torch.equal(opened.original[0].weight, opened.model[0].weight)
    with pytest.raises(UsageError, match=r"against: .*:small needs against_weights"):
        open_to_test(SMALL, digits(), source, EvaluationOptions(corruptions=True, against=SMALL))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seeds": 0}, "seeds: got 0, expected a number of at least 1"),
        ({"reach": 95}, "reach: got 95, expected an accuracy above 0 and at most 1. Usual: 0.7 to 0.95."),
    ],
)
def test_numbers_of_a_comparison_are_checked(options, text):
    with pytest.raises(UsageError) as caught:
        ComparisonOptions(**options)
    assert str(caught.value) == text


def test_a_comparison_starts_from_a_plain_model(tmp_path):
    save(sphereify(small(), example_inputs=torch.randn(2, 1, 8, 8)), tmp_path / "saved")
    with pytest.raises(UsageError, match="saved: is a saved artifact; compare starts from the plain model"):
        open_to_compare(str(tmp_path / "saved"), digits(), "cosine")


def test_a_verification_in_a_comparison_needs_classes_that_are_left_out():
    with pytest.raises(UsageError, match="verification: needs hold_out_classes, the classes to verify on") as caught:
        open_to_compare(SMALL, digits(), "cosine", verification=True)
    assert caught.value.option == "verification"
    source = SourceOptions(in_chans=1)
    opened = open_to_compare(SMALL, digits(hold_out_classes=3), "cosine", source=source, verification=True)
    assert (len(opened.data.classes), len(opened.held_out.classes)) == (7, 3)
    assert open_to_compare(SMALL, digits(hold_out_classes=3), "cosine", source=source).held_out is None


def test_a_comparison_of_a_trained_network_pools_and_builds_the_same_weights_again(weights):
    source = SourceOptions(weights=weights, in_chans=1)
    opened = open_to_compare(SMALL, digits(), "cosine,linear", {"rescale": "always"}, source=source)
    assert opened.learned == ALL
    assert [variant.name for variant in opened.variants] == ["original", "cosine", "linear"]
    assert opened.variants[1].options == {"operator": "cosine", "rescale": "always", "radius": GENTLE_RADIUS}
    assert torch.equal(opened.build()[0].weight, opened.build()[0].weight)


def test_a_comparison_of_a_trained_network_takes_options_of_its_operator(weights):
    source = SourceOptions(weights=weights, in_chans=1)
    opened = open_to_compare(SMALL, digits(), "sigmoid", {"k": 0.4}, source=source)
    assert opened.variants[1].options == {"operator": "sigmoid", "k": 0.4, "radius": GENTLE_RADIUS}


def test_a_comparison_of_a_new_network_draws_its_weights_by_the_seed_of_the_run():
    opened = open_to_compare(SMALL, digits(), "cosine", source=SourceOptions(in_chans=1, seed=5))
    assert opened.learned == NOTHING
    assert "radius" not in opened.variants[1].options
    torch.manual_seed(1)
    first = opened.build()[0].weight
    torch.manual_seed(1)
    assert torch.equal(opened.build()[0].weight, first)
    assert not torch.equal(opened.build()[0].weight, first)
