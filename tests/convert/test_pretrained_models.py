"""Models with the methods and outputs of Transformers: what a conversion changes about them is said or refused."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sphereify import AngularLoss, fold, load, plan_conversion, save, sphereify
from sphereify.errors import ArgumentTypeError, SphereifyWarning, UnsupportedModelError, UsageError
from sphereify.nn import AngularHead, AngularOutput

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
TARGETS = torch.tensor([0, 2])


class Pretrained(nn.Module):
    """A stand-in for a PreTrainedModel."""

    def __init__(self, labels=3, problem=None):
        super().__init__()
        self.config = SimpleNamespace(problem_type=problem)
        self.embeddings, self.dense = nn.Embedding(8, 6), nn.Linear(6, 6)
        self.classifier = nn.Linear(6, labels)
        self.saved = None

    def forward(self, ids, labels=None):
        logits = self.classifier(self.dense(self.embeddings(ids).mean(1)).tanh())
        if labels is not None:
            return nn.functional.cross_entropy(logits.view(-1, 3), labels)
        return SimpleNamespace(loss=None, logits=logits)

    def save_pretrained(self, folder):
        self.saved = folder

    def get_output_embeddings(self):
        return self.classifier

    def resize_token_embeddings(self, tokens=None):
        self.embeddings = nn.Embedding(tokens or 8, 6)
        return self.embeddings


def converted(**options):
    torch.manual_seed(0)
    return sphereify(Pretrained(), example_inputs=IDS, **options)


def test_a_loss_takes_the_logits_of_an_output():
    for head in ("w-softmax", "a-softmax"):
        model = converted(head=head).train()
        loss, output = AngularLoss(model), model(IDS)
        assert isinstance(output.logits, AngularOutput) == (head == "a-softmax")
        for given in (output, {"logits": output.logits, "hidden": IDS}):
            torch.testing.assert_close(loss(given, TARGETS), loss(output.logits, TARGETS), rtol=0, atol=0)
    for nothing in (SimpleNamespace(loss=None), {"logits": None}, (output.logits,)):
        with pytest.raises(ArgumentTypeError, match="expected an AngularOutput or logits"):
            loss(nothing, TARGETS)


def test_a_margin_and_labels_say_how():
    model = converted(head="a-softmax").train()
    with pytest.raises(AttributeError, match=r"the loss is AngularLoss\(model\).*without its labels="):
        model(IDS, labels=TARGETS)
    converted().train()(IDS, labels=TARGETS).backward()


REGRESSIONS = [(1, None, "single number"), (3, "regression", "problem_type")]


@pytest.mark.parametrize(("labels", "problem", "reason"), REGRESSIONS)
def test_a_regression_gets_no_softmax(labels, problem, reason):
    model = Pretrained(labels, problem)
    (decision,) = [d for d in plan_conversion(model, example_inputs=IDS).decisions if d.name == "classifier"]
    assert decision.action == "keep"
    assert reason in decision.reason
    with pytest.raises(UsageError, match=rf"head='w-softmax': no classifier .*\(classifier: .*{reason}.*head='keep'"):
        plan_conversion(model, example_inputs=IDS, head="w-softmax")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), fold])
def test_save_pretrained_warns_and_saves_the_copy_that_is_asked(copied):
    model = converted()
    other = copied(model)
    with pytest.warns(SphereifyWarning, match=r"from_pretrained builds the plain Pretrained.*sphereify\.save"):
        other.save_pretrained("folder")
    assert (other.saved, model.saved) == ("folder", None)


def test_what_the_warning_names_keeps_the_model(tmp_path):
    model = converted().eval()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", factory=Pretrained)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_tokens_are_resized_unless_the_output_layer_is_angular():
    model = converted()
    assert type(model.classifier) is AngularHead
    before = model.embeddings
    with pytest.raises(UnsupportedModelError, match=r"resize_token_embeddings: classifier is angular \(AngularHead\)"):
        model.resize_token_embeddings(9)
    assert model.embeddings is before
    model.resize_token_embeddings()
    kept = converted(head="keep")
    assert kept.resize_token_embeddings(9).num_embeddings == 9


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=60, num_labels=3, **sizes)
    model = sphereify(transformers.BertForSequenceClassification(config), head="a-softmax", example_inputs=IDS).train()
    AngularLoss(model)(model(IDS), TARGETS).backward()
    with pytest.raises(AttributeError, match="without its labels="):
        model(IDS, labels=TARGETS)
    with pytest.warns(SphereifyWarning, match="BertForSequenceClassification"):
        model.save_pretrained(tmp_path)
    model.resize_token_embeddings(64)
    assert model(IDS).logits.logits.shape == (2, 3)
    config = transformers.LlamaConfig(vocab_size=60, tie_word_embeddings=False, **sizes)
    model = sphereify(transformers.LlamaForCausalLM(config), head="w-softmax", example_inputs=IDS)
    with pytest.raises(UnsupportedModelError, match="lm_head is angular"):
        model.resize_token_embeddings(64)
