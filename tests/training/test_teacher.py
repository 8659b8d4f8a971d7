"""Teachers: found by name, refused where their classifier knows nothing, followed at a temperature."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sphereify import save, sphereify
from sphereify.errors import UsageError
from sphereify.training import Original, finetune, open_teacher
from sphereify.training.teacher import distillation
from tests.training.small import images, linear_net, net, same, state, usual


def pretrained(classes: int) -> nn.Module:
    """A model whose pretrained weights are said to be for so many classes."""
    model = nn.Linear(2, 3)
    model.pretrained_cfg = {"num_classes": classes}
    return model


def test_the_original_is_the_network_that_was_converted(tmp_path):
    plain = linear_net()
    assert open_teacher("original", 3, original=Original(plain, weights=tmp_path)) is plain
    model = pretrained(3)
    assert open_teacher("original", 3, original=Original(model, pretrained=True)) is model


@pytest.mark.parametrize(
    ("original", "options", "text"),
    [
        (None, {}, "teacher='original': an artifact does not hold what it was before"),
        (Original(linear_net()), {}, "teacher='original': it has not been trained; bring its weights with weights"),
        (Original(pretrained(1000), pretrained=True), {}, "teacher: .* for 1000 classes, the data has 3: .* is new"),
        (Original(linear_net()), {"weights": "w.safetensors"}, "teacher_weights: belong to a teacher by name"),
    ],
)
def test_an_original_that_knows_nothing_is_refused(original, options, text):
    with pytest.raises(UsageError, match=text):
        open_teacher("original", 3, original=original, **options)


def test_a_model_of_ones_own_needs_weights():
    with pytest.raises(UsageError, match=r"teacher: own\.py:net needs teacher_weights"):
        open_teacher("own.py:net", 3)


def test_a_model_by_name_is_built_for_the_classes_and_filled_with_its_weights(tmp_path):
    trained = timm.create_model("test_resnet", num_classes=3)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    teacher = open_teacher("test_resnet", 3, weights=tmp_path / "w.safetensors")
    assert same(state(teacher), state(trained))


def test_pretrained_weights_for_other_classes_are_refused(monkeypatch):
    monkeypatch.setattr("sphereify.training.teacher.build_model", lambda source, pretrained: pretrained_on_imagenet)
    pretrained_on_imagenet = pretrained(1000)
    with pytest.raises(UsageError, match="teacher: its pretrained weights are for 1000 classes, the data has 3"):
        open_teacher("test_resnet", 3)
    assert open_teacher("test_resnet", 1000) is pretrained_on_imagenet


def test_an_artifact_is_a_teacher(tmp_path):
    model = sphereify(timm.create_model("test_resnet", num_classes=3))
    save(model, tmp_path / "artifact")
    assert same(state(open_teacher(str(tmp_path / "artifact"), 3)), state(model))


def test_distillation_is_the_divergence_of_softened_scores():
    torch.manual_seed(0)
    logits, scores, t = torch.randn(4, 3, dtype=torch.double), torch.randn(4, 3, dtype=torch.double), 2.5
    teacher = nn.Linear(1, 1)
    teacher.forward = lambda images: scores
    p, q = (scores / t).softmax(1), (logits / t).softmax(1)
    expected = t**2 * sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(4)) / 4
    torch.testing.assert_close(distillation(logits, teacher, torch.zeros(4), t).double(), expected, rtol=1e-6, atol=0)


def test_a_network_follows_its_teacher_alone_where_the_labels_have_no_weight():
    """The teacher answers with one class whatever it sees, and so does the network in the end."""
    teacher = linear_net()
    with torch.no_grad():
        teacher[1].weight.zero_()
        teacher[1].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    model, data = net(), images()
    finetune(model, data, usual(epochs=6, teacher_weight=1.0), teacher=teacher)
    assert model(data.test.tensors[0]).argmax(1).eq(2).all()
