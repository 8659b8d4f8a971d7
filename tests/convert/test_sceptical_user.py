"""What a sceptical user tried, and what must hold then."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import load, param_groups, plan_conversion, save, sphereify
from sphereify.errors import UsageError


class Casting(nn.Module):
    """The usual idiom of mixed precision: the weight follows the input's dtype."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def test_a_weight_that_is_cast_at_the_call_is_answered_in_every_dtype():
    torch.manual_seed(0)
    model, x = sphereify(nn.Sequential(Casting(), nn.Tanh()), example_inputs=torch.randn(5, 4), rescale="never"), 100.0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert model[0](x * torch.ones(5, 4, dtype=dtype)).abs().max() <= 1


class CentralDifference(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) - 0.7 * F.conv2d(x, self.weight.sum((2, 3), keepdim=True), padding=0)


def test_a_subclass_that_makes_two_convolutions_is_kept_whole_with_the_reason():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(CentralDifference(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Tanh()),
        torch.randn(2, 3, 8, 8),
    )
    found = {d.name: d for d in plan_conversion(model, example_inputs=x).decisions}
    assert found["0"].action == "keep"
    assert "more than one convolution" in found["0"].reason
    torch.testing.assert_close(sphereify(model, example_inputs=x)[0](x), model[0](x))


def test_filters_of_functional_calls_are_not_decayed():
    model = sphereify(nn.Sequential(Casting(), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()), example_inputs=torch.randn(5, 4),
                      exclude="2")  # fmt: skip
    decayed, plain = param_groups(model, 0.1)
    assert decayed["params"] == [model[2].weight]
    assert any(p is model[0].weight for p in plain["params"])


def classifier():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 5))  # fmt: skip


def test_a_layer_that_was_replaced_after_the_conversion_is_not_saved_as_if_it_were_converted(tmp_path):
    model = sphereify(classifier())
    model[5] = nn.Linear(4, 7)
    with pytest.raises(UsageError, match=r"5: was planned with weight \(5, 4\) and is now .*\(7, 4\)"):
        save(model, tmp_path / "out")
    model = sphereify(classifier())
    model[0] = nn.Conv2d(3, 4, 3)
    with pytest.raises(UsageError, match="0: was planned with weight"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_new_head_can_be_converted_and_saved_again(tmp_path):
    model = sphereify(classifier())
    model[5] = nn.Linear(4, 7)
    model = sphereify(model, inplace=True).eval()
    save(model, tmp_path)

    def factory():
        plain = classifier()
        plain[5] = nn.Linear(4, 7)
        return plain

    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(load(tmp_path, factory=factory)(x), model(x), rtol=0, atol=0)


class GuessedNorm(nn.Module):
    """Cannot be traced, and its BatchNorm is registered behind the convolution but does not run behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        if float(x.detach().sum()) == 0:
            return self.fc(x[:, :, 0, 0])
        return self.fc(self.bn(F.relu(self.conv(x), inplace=True)).mean((2, 3)))


def test_a_guessed_norm_leaves_the_output_free_to_be_changed_in_place():
    model = sphereify(GuessedNorm())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.conv.weight.grad.isfinite().all()


def test_a_hook_may_change_the_output_in_place():
    model = sphereify(classifier())
    model[0].register_forward_hook(lambda module, args, out: out.mul_(2))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_a_wrong_calibration_leaves_the_model_as_it_was():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="calibration: got no batches"):
        sphereify(model, calibration=[], inplace=True)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"include": 3}, "include: got 3, expected a pattern or a list of patterns"),
        ({"overrides": ["fc"]}, r"overrides: got \['fc'\], expected a dict of pattern to 'keep' or settings"),
        ({"eps": float("inf")}, "eps: got inf"),
        ({"operators": "linear"}, "option: got 'operators', .* Did you mean 'operator'?"),
    ],
)
def test_options_of_the_wrong_kind_are_told(options, text):
    with pytest.raises(UsageError, match=text):
        plan_conversion(classifier(), **options)
