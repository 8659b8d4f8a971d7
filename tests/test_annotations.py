"""What the package writes on a model: it goes wherever the model goes, and changes nothing else of it."""

import copy
import pickle

import pytest
from torch import nn

from sphereify import annotations, fold, load, save, sphereify
from sphereify.annotations import Annotation

ALL = [thing for thing in vars(annotations).values() if isinstance(thing, Annotation)]


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def test_no_two_annotations_share_an_attribute():
    assert len({annotation.attribute for annotation in ALL}) == len(ALL) > 0


@pytest.mark.parametrize("annotation", ALL)
def test_a_copy_and_a_pickle_carry_an_annotation_and_the_state_does_not(annotation):
    model = plain()
    state = list(model.state_dict())
    assert (annotation.of(model), annotation.is_on(model)) == (None, False)
    annotation.write(model, {"a fact": 1})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert annotation.required(twin) == annotation.of(twin) == {"a fact": 1}
        assert list(twin.state_dict()) == state
    for _ in range(2):
        annotation.remove(model)
        assert not annotation.is_on(model)
    with pytest.raises(AttributeError, match=annotation.attribute):
        annotation.required(model)


def test_a_converted_a_folded_and_a_loaded_model_carry_what_users_and_commands_read(tmp_path):
    model = sphereify(plain())
    assert annotations.PLAN.of(model) is model.conversion_plan
    folded = fold(model)
    assert annotations.FOLDING.of(folded) is folded.folding
    loaded = load(save(model, tmp_path, training={"data": "digits"}), factory=plain)
    assert annotations.TRAINING_RECORD.of(loaded) == {"data": "digits"}
    assert annotations.LOADED_FINGERPRINT.is_on(loaded)
    assert not annotations.CALIBRATED.is_on(loaded)
