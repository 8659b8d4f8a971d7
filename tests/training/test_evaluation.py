"""Evaluation: accuracies on held-out images."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sphereify import evaluate, load, save
from sphereify.datasets import Data
from sphereify.errors import ArgumentTypeError, DataError, TrainingError
from sphereify.training import DataOptions, Settings, accuracy, finetune
from sphereify.training.evaluation import write_evaluation
from tests.training.small import CPU, images, linear_net, net, plain_net, usual


def test_accuracy_is_the_share_of_right_answers_over_uneven_batches():
    logits = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]]
    data = TensorDataset(logits, torch.tensor([0, 1, 2, 3, 1, 2, 2]))
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    assert accuracy(model, DataLoader(data, batch_size=3)) == pytest.approx(5 / 7)
    assert not model.training


def scores(classes: int = 7, number: int = 23) -> Data:
    """Images that are their own scores."""
    torch.manual_seed(0)
    test = TensorDataset(torch.randn(number, classes, 1, 1), torch.arange(number) % classes)
    return Data("scores", test, test, [str(i) for i in range(classes)], (classes, 1, 1))


def test_an_evaluation_counts_each_image_by_its_class_and_its_answer():
    data = scores()
    x, y = data.test.tensors
    order = x.flatten(1).argsort(1, descending=True)
    found = evaluate(nn.Sequential(nn.Flatten(), nn.Dropout(0.9)), data, Settings(batch_size=5, **CPU))
    assert found.images == 23
    assert found.top1 == pytest.approx(sum(int(order[i, 0] == y[i]) for i in range(23)) / 23)
    assert found.top5 == pytest.approx(sum(int(y[i] in order[i, :5]) for i in range(23)) / 23)
    for true in range(7):
        for answer in range(7):
            assert found.confusion[true, answer] == sum(int(y[i] == true and order[i, 0] == answer) for i in range(23))
    assert found.per_class == pytest.approx((found.confusion.diagonal() / found.confusion.sum(1)).tolist())


def test_the_model_of_an_artifact_is_tested_on_the_classes_that_it_was_trained_on(tmp_path):
    model, data = net(), images()
    finetune(model, data, usual(epochs=1), output=tmp_path)
    model = load(tmp_path / "last", factory=plain_net)
    assert evaluate(model, data, usual()).images == 12
    for classes, text in (
        (["class 0", "class 1", "fish"], "trained on other classes than patterns has: class 2, fish"),
        (["class 1", "class 0", "class 2"], "trained on other classes than patterns has: in another order"),
        (["class 0", "class 1"], "the model has 3 classes, patterns has 2"),
    ):
        with pytest.raises(DataError, match=text):
            evaluate(model, Data(data.name, data.train, data.test, classes, data.image_size), usual())


def test_images_come_in_the_size_that_the_model_of_an_artifact_was_trained_with(tmp_path):
    model = net()
    save(model, tmp_path / "artifact", training={"image_size": [2, 6, 6]})
    model = load(tmp_path / "artifact", factory=plain_net)
    model.pretrained_cfg = {"input_size": (3, 20, 20)}
    asked = {}

    def load_data(name, **options):
        asked.update(options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sphereify.datasets.load_data", load_data)
        DataOptions("digits").open(model)
        assert asked["img_size"] is None
        DataOptions("digits").open(model, as_trained=True)
        assert asked["img_size"] == 6
        DataOptions("digits", img_size=9).open(model, as_trained=True)
        assert asked["img_size"] == 9


def test_a_data_set_without_test_images_is_an_error():
    data = images()
    empty = TensorDataset(torch.zeros(0, 2, 6, 6), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="patterns: has no test images"):
        evaluate(linear_net(), Data(data.name, data.train, empty, data.classes, data.image_size), usual())


# ------------------------------------------------------------------------------------------ scores that are not finite


def own_scores(scores: torch.Tensor, targets: list[int]) -> Data:
    """Images that are their own scores."""
    test = TensorDataset(scores[:, :, None, None], torch.tensor(targets))
    return Data("scores", test, test, [str(i) for i in range(scores.shape[1])], (scores.shape[1], 1, 1))


def test_an_image_without_a_finite_score_counts_as_wrong_and_is_said(tmp_path):
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor(
        [[1.0, 0, -inf], [0, nan, 0], [nan, nan, nan], [inf, 0, 0], [-inf, -inf, -inf], [-inf, -1, 2]]
    )
    data = own_scores(scores, [0, 1, 0, 0, 0, 2])
    found = evaluate(nn.Flatten(), data, Settings(batch_size=4, **CPU))
    assert (found.images, found.unanswered, found.unanswered_by_class) == (6, 4, (3, 1, 0))
    assert (found.top1, found.top5) == (pytest.approx(2 / 6), pytest.approx(2 / 6))
    assert found.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert found.per_class == [0.25, 0, 1]
    assert found.not_finite() == "the scores of 4 of 6 images are not finite, which counts as wrong"
    write_evaluation(found, data.classes, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["not_finite"] == 4
    assert accuracy(nn.Flatten(), DataLoader(data.test, batch_size=4)) == pytest.approx(2 / 6)


def test_a_network_without_any_finite_score_is_an_error_that_names_the_layer():
    model = net()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"all 12 test images are not finite; .* is .* \(its weight\)"):
        evaluate(model, images(), usual())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("resnet18", images()), "model: got str, expected a torch.nn.Module"),
        ((net(), 3), "data: got int, expected a Data"),
        ((net(), images(), {"lr": 1}), "settings: got dict, expected Settings"),
    ],
)
def test_arguments_of_other_types_are_named(arguments, text):
    for function in (evaluate, finetune):
        with pytest.raises(ArgumentTypeError, match=text):
            function(*arguments)
