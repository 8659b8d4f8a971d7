"""Pairs: all of them, exact random choices without repetitions, and lists in files."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from sphereify.errors import DataError
from sphereify.training.pairs import Pairs, pairs_of, read_pairs

IDENTITIES = torch.tensor([2, 0, 1, 2, 2, 0, 3, 1, 2, 0])


def as_set(pairs: Pairs) -> set:
    return {
        (*sorted((a, b)), s)
        for a, b, s in zip(*(t.tolist() for t in (pairs.first, pairs.second, pairs.same)), strict=True)
    }


ALL = {(i, j, bool(IDENTITIES[i] == IDENTITIES[j])) for i, j in combinations(range(10), 2)}


def test_all_pairs_where_there_are_few():
    pairs = pairs_of(IDENTITIES, 45)
    assert as_set(pairs) == ALL
    assert (len(pairs), pairs.total) == (45, 45)


@pytest.mark.parametrize("limit", [2, 3, 10, 20, 44])
def test_a_choice_has_no_pair_twice_and_pairs_of_both_kinds(limit):
    pairs = pairs_of(IDENTITIES, limit, seed=3)
    assert len(pairs) == limit
    assert len(as_set(pairs)) == limit
    assert as_set(pairs) < ALL
    assert pairs.same.any()
    assert not pairs.same.all()
    assert pairs.total == 45


def test_a_choice_is_the_same_for_a_seed_and_changes_with_it():
    assert as_set(pairs_of(IDENTITIES, 12, 1)) == as_set(pairs_of(IDENTITIES, 12, 1))
    assert len({frozenset(as_set(pairs_of(IDENTITIES, 12, seed))) for seed in range(6)}) == 6


def test_each_pair_of_a_kind_is_as_likely_as_another():
    drawn = [pairs_of(IDENTITIES, 20, seed) for seed in range(3000)]
    for kind in (True, False):
        counts = dict.fromkeys((pair for pair in ALL if pair[2] is kind), 0)
        for pairs in drawn:
            for pair in as_set(pairs):
                if pair[2] is kind:
                    counts[pair] += 1
        shares = torch.tensor(list(counts.values())) / 3000
        assert float((shares - shares.mean()).abs().max()) < 0.05


def test_a_choice_of_very_many_pairs_takes_no_memory_for_all_of_them():
    identities = torch.arange(400_000) // 4  # 80 thousand million pairs
    pairs = pairs_of(identities, 5_000)
    assert pairs.total == 400_000 * 399_999 // 2
    assert int(pairs.same.sum()) == 1_000
    assert torch.equal(identities[pairs.first] == identities[pairs.second], pairs.same)
    assert bool((pairs.first != pairs.second).all())
    assert len(as_set(pairs)) == 5_000


def test_pairs_of_unreadable_images_are_left_out():
    pairs = pairs_of(IDENTITIES, 45).among(torch.tensor([9, 1, 0]), 10)
    assert as_set(pairs) == {(0, 1, True), (0, 2, False), (1, 2, False)}


# ---------------------------------------------------------------------------------------------------------- lists


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for name in ("ann/1.png", "ann/2 b.png", "bob/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


LISTS = {
    "commas": "ann/1.png,ann/2 b.png,1\nann/1.png,bob/1.png,0\n",
    "a heading": "first,second,same\nann/1.png,ann/2 b.png,1\nann/1.png,bob/1.png,0",
    "words and blanks": "ann/1.png, ann/2 b.png, Same\n ann/1.png, bob/1.png, DIFFERENT ",
    "quotes": '"ann/1.png";"ann/2 b.png";true\nann/1.png;bob/1.png;false',
    "tabs, empty lines and remarks": "# mine\n\nann/1.png\tann/2 b.png\tyes\n\nann/1.png\tbob/1.png\t-1\n",
    "a byte order mark": "\ufeffann/1.png,ann/2 b.png,1\nann/1.png,bob/1.png,0",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_a_list_of_pairs(people, text):
    (people / "pairs.txt").write_text(text, encoding="utf-8")
    files, pairs = read_pairs(people / "pairs.txt", people)
    assert files == [people / "ann/1.png", people / "ann/2 b.png", people / "bob/1.png"]
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([0, 0], [1, 2], [True, False])
    assert pairs.total == 2


def test_blanks_may_separate_names_without_blanks(people):
    (people / "pairs.txt").write_text("ann/1.png bob/1.png 0\n")
    assert read_pairs(people / "pairs.txt", people)[1].same.tolist() == [False]


BAD = {
    "nothing": ("", "holds no pairs, expected lines such as a/1.png,b/2.png,0"),
    "a heading alone": ("first,second,same\n", "holds no pairs"),
    "no flag": ("ann/1.png,bob/1.png\n", r"line 1: got ann/1.png | bob/1.png, expected two paths and a flag"),
    "another flag": ("ann/1.png,bob/1.png,0\nann/1.png,bob/1.png,2", "line 2: got ann/1.png | bob/1.png | 2, expected"),
    "missing files": (
        "x/1.png,ann/1.png,0\n" + "".join(f"ann/1.png,y/{i}.png,0\n" for i in range(5)),
        "names images that are not in .*: x/1.png, y/0.png, y/1.png and 3 more",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_list_that_is_wrong(people, text, message):
    (people / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message.replace(" | ", r" \| ")):
        read_pairs(people / "pairs.txt", people)


def test_a_list_that_is_no_text(people):
    (people / "pairs.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(people / "pairs.txt", people)
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(people / "none.txt", people)
