"""Verification: its measures against slow loops in float64, what is too little data, and its files."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sphereify.datasets import Data
from sphereify.errors import ArgumentTypeError, DataError, UsageError
from sphereify.scikit_learn import roc
from sphereify.training import Settings
from sphereify.training.pairs import Pairs, pairs_of
from sphereify.training.verification import (
    cosines,
    equal_error_rate,
    true_accept_rate,
    verification,
    write_verification,
)
from tests.training.small import CPU, images, net


class Vectors(nn.Module):
    """A network whose embedding is the image itself."""

    def __init__(self, features: int):
        super().__init__()
        self.fc = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def clusters(number: int = 30, identities: int = 4, spread: float = 0.8, seed: int = 0) -> Data:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(identities, (number,), generator=draw)
    centres = torch.randn(identities, 5, 1, 1, generator=draw)
    points = centres[targets] + spread * torch.randn(number, 5, 1, 1, generator=draw)
    part = TensorDataset(points, targets)
    return Data("clusters", part, part, [str(i) for i in range(identities)], (5, 1, 1))


def verified(data: Data, **options):
    return verification(Vectors(5), data, Settings(batch_size=7, **CPU), **options)


class Loops:
    """The same measures, pair by pair and threshold by threshold."""

    def __init__(self, data: Data):
        points, targets = data.test.tensors
        vectors = points.flatten(1).double()
        self.vectors = [vector / vector.square().sum().sqrt() for vector in vectors]
        self.targets = targets.tolist()
        number = range(len(self.targets))
        scores = [(float(self.vectors[i] @ self.vectors[j]), i, j) for i in number for j in number if i < j]
        self.same = [score for score, i, j in scores if self.targets[i] == self.targets[j]]
        self.different = [score for score, i, j in scores if self.targets[i] != self.targets[j]]

    def rates(self, threshold: float) -> tuple[float, float]:
        """False and true accept rate of the pairs whose score is at least a threshold."""
        shares = [sum(s >= threshold for s in kind) / len(kind) for kind in (self.different, self.same)]
        return shares[0], shares[1]

    def curve(self) -> list[tuple[float, float]]:
        return [self.rates(t) for t in sorted({np.inf, *self.same, *self.different}, reverse=True)]

    def tar(self, rate: float) -> float:
        return max(true for false, true in self.curve() if false <= rate)

    def eer(self) -> float:
        """By bisection on the line through the points of the curve."""
        false, true = zip(*self.curve(), strict=True)
        low, high = 0.0, float(len(false) - 1)
        for _ in range(60):
            middle = (low + high) / 2
            at = [np.interp(middle, range(len(false)), rates) for rates in (false, true)]
            low, high = (middle, high) if at[0] < 1 - at[1] else (low, middle)
        return float(np.interp(low, range(len(false)), false))

    def neighbours(self, k: int) -> float:
        right = []
        for i, vector in enumerate(self.vectors):
            others = [j for j in range(len(self.vectors)) if j != i]
            nearest = sorted(others, key=lambda j: -float(vector @ self.vectors[j]))[:k]
            votes = Counter(self.targets[j] for j in nearest)
            winner = min(name for name, number in votes.items() if number == max(votes.values()))
            if self.targets.count(self.targets[i]) > 1:
                right.append(winner == self.targets[i])
        return sum(right) / len(right)


@pytest.mark.parametrize("seed", range(4))
def test_the_measures_of_all_pairs_are_those_of_loops(seed):
    data = clusters(20, seed=seed)
    found, loops = verified(data, neighbours=1 + 2 * (seed % 2)), Loops(data)
    assert (found.same, found.different) == (len(loops.same), len(loops.different))
    assert found.eer == pytest.approx(loops.eer(), abs=1e-9)
    assert found.tar[0.1] == pytest.approx(loops.tar(0.1))
    assert found.roc.true_accepts == pytest.approx([loops.tar(f + 1e-12) for f in found.roc.false_accepts])
    assert found.neighbour_accuracy == pytest.approx(loops.neighbours(1 + 2 * (seed % 2)))
    assert found.roc.false_accepts[0] == pytest.approx(1 / len(loops.different))
    assert found.roc.false_accepts[-1] == found.roc.true_accepts[-1] == pytest.approx(1)
    for counts, scores in ((found.same_scores, loops.same), (found.different_scores, loops.different)):
        assert counts == np.histogram(np.float32(scores), 200, (-1, 1))[0].tolist()


def test_scores_of_equal_value_are_accepted_together():
    """Two directions only, so that the curve has three points."""
    points = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])[[0, 0, 0, 1, 1, 0, 1, 0]].view(-1, 5, 1, 1)
    part = TensorDataset(points, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    data = Data("corners", part, part, ["a", "b"], (5, 1, 1))
    found, loops = verified(data), Loops(data)
    assert found.eer == pytest.approx(loops.eer(), abs=1e-9)
    assert found.roc.true_accepts == pytest.approx([loops.tar(f + 1e-12) for f in found.roc.false_accepts])
    assert found.tar[0.1] is None


def test_points_of_the_curve_that_lie_on_a_line_are_not_dropped():
    false, true = roc(np.array([1, 0, 1, 0, 1, 0, 1, 0]), np.array([4, 4, 3, 3, 2, 2, 1, 1]))
    assert true_accept_rate(false, true, 0.6) == 0.5
    assert equal_error_rate(false, true) == 0.5


def test_identities_far_apart_are_told_without_an_error():
    found = verified(clusters(200, spread=0.01))
    assert (found.eer, found.neighbour_accuracy) == (0, 1)
    assert found.tar[0.01] == found.tar[0.001] == 1


def test_a_rate_needs_ten_pairs_that_are_falsely_accepted():
    found = verified(clusters(30))
    assert found.different < 1000
    assert found.tar[0.1] is not None
    assert found.tar[0.01] is found.tar[0.001] is found.tar[0.0001] is None
    assert found.too_few(0.001) == f"needs 10,000 pairs of different identities, there are {found.different}"
    assert found.too_few(0.1) == ""
    assert set(found.to_json()["too_few_pairs"]) == {"0.01", "0.001", "0.0001"}


def test_a_choice_of_pairs_estimates_the_measures_of_all():
    data = clusters(300, spread=1.2)
    everything, some = verified(data), verified(data, max_pairs=8_000)
    assert (some.same + some.different, some.pairs) == (8_000, everything.same + everything.different)
    assert some.eer == pytest.approx(everything.eer, abs=0.03)
    assert some.neighbour_accuracy == everything.neighbour_accuracy
    assert "chosen of 44,850" in some.of_what()
    assert verified(data, max_pairs=8_000) == some


def test_scores_are_computed_a_part_at_a_time(monkeypatch):
    vectors, identities = torch.nn.functional.normalize(torch.randn(40, 6)), torch.arange(40) % 3
    pairs = pairs_of(identities, 10_000)
    whole = cosines(vectors, pairs)
    monkeypatch.setattr("sphereify.training.verification.CHUNK", 7)
    np.testing.assert_allclose(cosines(vectors, pairs), whole, rtol=0, atol=1e-7)
    np.testing.assert_allclose(whole, (vectors[pairs.first].double() * vectors[pairs.second]).sum(1), atol=1e-6)


def test_identities_with_one_image_are_neighbours_only():
    points = torch.eye(5)[[0, 0, 1, 1, 2]].view(-1, 5, 1, 1)
    part = TensorDataset(points, torch.tensor([0, 0, 1, 1, 2]))
    assert verified(Data("few", part, part, ["a", "b", "c"], (5, 1, 1))).neighbour_accuracy == 1


def test_listed_pairs_are_scored_as_they_are_and_have_no_neighbours():
    data = clusters(6)
    flags = torch.tensor([True, False, False])
    pairs = Pairs(torch.tensor([0, 1, 0]), torch.tensor([2, 3, 5]), flags, 3)
    found = verified(data, pairs=pairs)
    assert (found.same, found.different, found.pairs) == (1, 2, 3)
    assert found.identities is found.neighbour_accuracy is None
    assert found.of_what() == "6 images; 1 pairs of one identity, 2 of two"


def test_classes_of_the_model_need_not_be_those_of_the_images():
    assert verified(clusters(90, identities=9)).identities == 9


def with_targets(*targets: int) -> Data:
    part = TensorDataset(torch.randn(len(targets), 5, 1, 1), torch.tensor(targets))
    return Data("few", part, part, [str(i) for i in range(4)], (5, 1, 1))


def test_what_cannot_be_verified_is_refused_before_the_network_runs():
    for data, options, error, message in (
        (with_targets(2, 2, 2), {}, DataError, "verification: few has images of one identity only, or none; pairs of"),
        (with_targets(), {}, DataError, "one identity only, or none"),
        (with_targets(0, 1, 2, 3), {}, DataError, "verification: few has no two images of one identity"),
        (with_targets(0, 1, 1), {"max_pairs": 1}, UsageError, "max_pairs: got 1, expected a number of at least 2"),
        (with_targets(0, 1, 1), {"neighbours": 0}, UsageError, "neighbours: got 0, expected a number of at least 1"),
        (with_targets(0, 1, 1), {"neighbours": 3}, UsageError, "neighbours: got 3, expected fewer than the 3 images"),
        (with_targets(0, 1, 1), {"pairs": Pairs(*torch.tensor([[0], [1]]), torch.tensor([False]), 1)}, DataError,
         "no two images of one identity"),
        (with_targets(0, 1, 1), {"pairs": Pairs(*torch.tensor([[0, 1], [2, 3]]), torch.tensor([False, True]), 2)},
         DataError, "pairs: name image 3, but few has 3 images, from 0 on"),
        (with_targets(0, 1, 1), {"pairs": [(0, 1, True)]}, ArgumentTypeError, "pairs: got list, expected Pairs"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            verification(nn.Identity(), data, **options)  # it has no classifier, which would be said next
    with pytest.raises(ArgumentTypeError, match=r"model: got str, expected a torch\.nn\.Module"):
        verification("net", with_targets(0, 1))


class HalfBroken(TensorDataset):
    def __getitem__(self, row):
        if self.tensors[1][row] == 0:
            raise DataError("cannot be read")
        return super().__getitem__(row)


def test_a_kind_of_pairs_may_be_gone_with_images_that_cannot_be_read():
    part = HalfBroken(torch.randn(4, 5, 1, 1), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(DataError, match="one identity only"):
        verified(Data("half", part, part, ["a", "b"], (5, 1, 1)))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(UsageError, match=r"verification needs scikit-learn: pip install 'sphereify\[verification\]'"):
        verification(net(), images(), Settings(**CPU))


def test_results_are_written_with_a_picture(tmp_path):
    found = verified(clusters(60))
    write_verification(found, tmp_path)
    results = json.loads((tmp_path / "verification.json").read_text())
    assert results == json.loads(json.dumps(found.to_json()))
    assert results["pairs"] == {"same": found.same, "different": found.different, "chosen_of": 60 * 59 // 2}
    assert results["tar"]["0.0001"] is None
    assert (tmp_path / "verification.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_of_very_few_pairs(tmp_path):
    write_verification(verified(with_targets(0, 1, 1)), tmp_path)
    assert (tmp_path / "verification.png").is_file()
