"""The examples with other libraries run, and what they print is what docs/ecosystem.md says of these libraries."""

import re

import pytest

from tests.examples.test_examples import run

pytestmark = pytest.mark.papers


def shares(text: str, pattern: str) -> list[float]:
    """The percentages that stand where a pattern has its groups, in the order of the lines."""
    return [
        float(share) for found in re.findall(pattern, text) for share in ([found] if isinstance(found, str) else found)
    ]


def test_embeddings_are_learned_in_the_trainer_of_pytorch_metric_learning(tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    text = run("training/with_metric_learning.py", "--epochs", "3", folder=tmp_path)
    before, after = shares(text, r"right for ([\d.]+)%")
    assert after > before
    before, after = shares(text, r"R-precision ([\d.]+)%")
    assert after > before + 5


def test_adapters_in_the_weights_merge_exactly_and_those_beside_layers_do_not(tmp_path):
    pytest.importorskip("peft")
    text = run("training/with_peft.py", "--epochs", "2", folder=tmp_path)
    (start,) = shares(text, r"before adapters: test accuracy ([\d.]+)%")
    beside, merged_beside, within, merged_within = shares(text, r"test accuracy ([\d.]+)%, merged ([\d.]+)%")
    assert within > start
    assert merged_within == within
    assert merged_beside < beside
    change_beside, change_within = map(float, re.findall(r"changes the outputs by (\S+)", text))
    assert change_beside > 0.1
    assert change_within < 1e-5


def test_convolutions_take_low_rank_changes_that_merge_exactly(tmp_path):
    text = run("training/low_rank.py", "--epochs", "2", folder=tmp_path)
    start, adapted, merged = shares(text, r"test accuracy ([\d.]+)%")
    assert adapted > start
    assert merged == adapted
    assert float(re.search(r"changes the outputs by (\S+)", text)[1]) < 1e-5


def test_a_run_is_read_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    text = run("training/with_tensorboard.py", folder=tmp_path)
    (accuracies,) = re.findall(r"^accuracy: (.*)", text, re.MULTILINE)
    first, *_, last = map(float, re.findall(r"([\d.]+) at step", accuracies))
    assert last > first


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_exported_network_answers_alike_in_other_runtimes(tmp_path, runtime):
    pytest.importorskip("onnxscript")
    pytest.importorskip(runtime)
    text = run(f"deployment/with_{runtime}.py", folder=tmp_path)
    difference, largest = map(float, re.search(r"logits (\S+), largest logit (\S+)", text).groups())
    assert difference < 1e-4 * largest
    assert shares(text, r"same class for ([\d.]+)%") == [100]


def test_a_folded_network_is_quantized_by_torchao_and_one_that_is_not_is_refused(tmp_path):
    pytest.importorskip("torchao")
    text = run("deployment/with_torchao.py", folder=tmp_path)
    plain, weights, activations = shares(text, r"test accuracy ([\d.]+)%")
    assert plain > 20  # a guess is right in 10 %
    assert abs(weights - plain) < 2
    assert abs(activations - plain) < 5
    before, *after = (float(size) for size in re.findall(r"([\d.]+) MB", text))
    assert all(size < before / 2 for size in after)
    assert "without folding: SphereLinear: its weight is being quantized (Int8Tensor)" in text
