"""The arguments of a forward pass: the forms in which a user gives them, and their values."""

import collections

import pytest
import torch
from torch import nn

from sphereify import calibrate, fold, plan_conversion, sphereify, suggest
from sphereify.convert.arguments import ModelArguments
from sphereify.convert.input_values import filled
from sphereify.errors import ArgumentTypeError, UsageError


class Weighted(nn.Module):
    """Takes tokens by keyword alone, and reads another layer where weights are given."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.plain, self.weighted, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, *, tokens, weights=None):
        x = self.embed(tokens)
        x = self.plain(x) if weights is None else self.weighted(x * weights[..., None])
        return {"logits": self.fc(x.relu().mean(1))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Weighted().eval()


def keywords(rows=4):
    torch.manual_seed(1)
    return {"tokens": torch.randint(0, 20, (rows, 5)), "weights": torch.rand(rows, 5)}


FORMS = {
    "dict": lambda given: given,
    "mapping of a tokenizer": collections.UserDict,
    "pair": lambda given: ((), given),
    "arguments": lambda given: ModelArguments((), given),
}


def called(plan):
    return {decision.name: decision.called for decision in plan.decisions}


def test_one_tensor_is_one_argument_a_tuple_several_and_a_list_one():
    x = torch.zeros(2)
    assert ModelArguments.of(x) == ModelArguments((x,))
    assert ModelArguments.of((x, 3)) == ModelArguments((x, 3))
    assert ModelArguments.of([x]) == ModelArguments(([x],))
    assert ModelArguments.of(((x,), {"scale": 3})) == ModelArguments((x,), {"scale": 3})


def test_a_forward_may_write_to_its_arguments():
    x, y, z = torch.zeros(2), torch.zeros(3), torch.zeros(4)

    def forward(first, *, second):
        first.add_(1)
        second[0].add_(second[1]["z"].sum() + 1)

    ModelArguments((x,), {"second": [y, {"z": z}]}).run(forward)
    assert not x.any()
    assert not y.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_and_its_proof_take_keywords_in_each_form(model, form):
    inputs = FORMS[form](keywords())
    plan = plan_conversion(model, example_inputs=inputs)
    assert called(plan) == {"embed": True, "weighted": True, "fc": True, "plain": False}
    assert called(plan.verify(model, inputs)) == called(plan)
    assert plan.inputs == plan.verify(model, inputs).inputs == "tokens int64 4×5, weights float32 4×5"
    assert called(plan_conversion(model, example_inputs={"tokens": keywords()["tokens"]}))["plain"] is True


@torch.no_grad()
def test_a_calibration_takes_batches_by_keyword(model):
    batches = [{k: v[i::4] for k, v in keywords(64).items()} for i in range(4)]
    fitted = sphereify(model, example_inputs=keywords(), calibration=batches, exclude="fc", head="keep")
    given = keywords(8)
    torch.manual_seed(2)
    as_copied = sphereify(model, example_inputs=keywords(), exclude="fc", head="keep")
    target = model(**given)["logits"]
    errors = [float((m.eval()(**given)["logits"] - target).square().mean()) for m in (fitted, as_copied)]
    assert errors[0] < 0.5 * errors[1]


def test_batches_by_keyword_are_cut_by_rows_and_joined_in_any_order_of_the_keywords(model):
    whole = keywords(32)
    turned = {name: whole[name] for name in reversed(whole)}
    results = []
    for batch in (whole, turned):
        converted = sphereify(model, example_inputs=keywords())
        results.append(calibrate(converted, model, batch, steps=2).difference)
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert 0 <= suggest(model, [whole], loss=0.3, example_inputs=keywords()).agreement <= 1


def test_folding_is_checked_on_keywords(model):
    converted = sphereify(model, example_inputs=keywords())
    folded = fold(converted.eval(), keywords())
    torch.testing.assert_close(folded(**keywords()), converted(**keywords()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        (
            {"words": torch.zeros(2, 3)},
            UsageError,
            "unexpected keyword argument 'words'; got words float32 2×3. Its arguments are tokens",
        ),
        ({3: torch.zeros(2)}, ArgumentTypeError, "a key: got int, expected the name of an argument"),
        ({"tokens": [[1, 2]]}, UsageError, "must be Tensor, not list; got tokens list$"),
    ],
)
def test_keywords_that_do_not_fit_are_one_clear_error(model, inputs, error, text):
    with pytest.raises(error, match=text):
        plan_conversion(model, example_inputs=inputs)


def test_a_model_whose_argument_is_a_dict_takes_it_in_a_tuple():
    class OfDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, batch):
            return self.fc(batch["x"] if batch["x"].sum() < 9 else -batch["x"])

    batch = {"x": torch.zeros(2, 4)}
    assert called(plan_conversion(OfDict(), example_inputs=(batch,))) == {"fc": True}
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'x'.*give a tuple: \(inputs,\)"):
        plan_conversion(OfDict(), example_inputs=batch)


def test_shapes_get_values_that_a_model_can_take(model):
    class Signature(nn.Module):
        def __init__(self):
            super().__init__()
            self.ids, self.types = nn.Embedding(50, 4), nn.Embedding(3, 4)

        def forward(self, ids, attention_mask, token_type_ids=None, lengths=None, x=None):
            raise NotImplementedError

    meta = {"dtype": torch.int64, "device": "meta"}
    ids, mask, types, lengths = (torch.empty(*shape, **meta) for shape in ((4, 9), (4, 9), (4, 9), (4,)))
    x = torch.empty(2, 3, dtype=torch.float64, device="meta")
    got = filled(ModelArguments((ids, mask), {"token_type_ids": types, "lengths": lengths, "x": x}), Signature())
    assert got.args[0].unique().tolist() == [0, 1, 2]
    assert got.args[1].unique().tolist() == [1]
    assert got.kwargs["token_type_ids"].unique().tolist() == [0]
    assert got.kwargs["lengths"].tolist() == [9] * 4
    assert got.kwargs["x"].dtype == torch.float64
    assert torch.equal(got.kwargs["x"], filled(ModelArguments((), {"x": x}), Signature()).kwargs["x"])
