"""Rows of a plan's table: layers that repeat share one, each layer is in one, and its name covers no other layer."""

import re

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sphereify import plan_conversion
from sphereify.convert.repeats import repeats


def folded(names, patterns=None):
    """The rows of these layers: their name and the number of layers."""
    return [(row.name, len(row.places)) for row in repeats(names, patterns or [""] * len(names))]


def spans(row_name, name):
    """True if the name of a row, in which `1–3` stands for the numbers from 1 to 3, covers this layer."""
    parts = name.split(".")
    covered = row_name.split(".")
    if len(covered) > len(parts):
        return False
    for shown, part in zip(covered, parts, strict=False):
        if (between := re.fullmatch(r"(.*?)([0-9]+)–([0-9]+)", shown)) is None:
            if shown != part:
                return False
            continue
        number = part.removeprefix(between[1])
        if not (part.startswith(between[1]) and number.isdigit() and int(between[2]) <= int(number) <= int(between[3])):
            return False
    return True


def is_sound(names, patterns):
    """True if each layer is in one row, rows hold what is alike, and their names cover their layers and no others."""
    rows = repeats(names, patterns)
    assert sorted(place for row in rows for place in row.places) == list(range(len(names)))
    for row in rows:
        assert {patterns[place] for place in row.places} == {row.pattern}
        covered = [place for place, name in enumerate(names) if spans(row.name, name)]
        own = [place for place, name in enumerate(names) if name == row.name]
        assert list(row.places) in (covered, own)
        assert len(row.places) > 1 or names[row.places[0]] == row.name
    return True


def test_numbered_blocks_that_are_alike_share_a_row():
    assert folded(["stem", "layer1.0.a", "layer1.0.b", "layer1.1.a", "layer1.1.b", "head"]) == [
        ("stem", 1), ("layer1", 4), ("head", 1)
    ]  # fmt: skip
    assert folded(["blocks.0.qkv", "blocks.0.fc", "blocks.1.qkv", "blocks.1.fc"], "+-+-") == [
        ("blocks.0–1.qkv", 2), ("blocks.0–1.fc", 2)
    ]  # fmt: skip


def test_layers_of_different_names_share_no_row():
    assert folded(["query", "key", "value"]) == [("query", 1), ("key", 1), ("value", 1)]


def test_numbers_without_layers_between_two_blocks_are_no_obstacle():
    assert folded([f"features.{i}" for i in (0, 3, 6)]) == [("features.0–6", 3)]


def test_a_block_that_differs_divides_the_row():
    names = [f"blocks.{i}.fc" for i in range(5)]
    assert folded(names, "++-++") == [("blocks.0–1.fc", 2), ("blocks.2.fc", 1), ("blocks.3–4.fc", 2)]


def test_blocks_with_other_layers_divide_the_row():
    names = ["b.0.x", "b.0.y", "b.1.x", "b.1.y", "b.2.x", "b.2.z", "b.3.x", "b.3.z"]
    rows = [("b.0–1.x", 2), ("b.0–1.y", 2), ("b.2–3.x", 2), ("b.2–3.z", 2)]
    assert folded(names, "+-+-+-+-") == rows


def test_blocks_that_run_in_another_order_than_their_numbers_share_none_across_a_third():
    assert folded(["b.0.x", "b.2.x", "b.1.x"]) == [("b.0.x", 1), ("b.2.x", 1), ("b.1.x", 1)]
    assert folded(["up.2.x", "up.1.x"]) == [("up.2.x", 1), ("up.1.x", 1)]


def test_a_single_layer_keeps_its_whole_name():
    assert folded(["a.1.conv", "fc"]) == [("a.1.conv", 1), ("fc", 1)]


def test_several_layers_of_one_name_and_a_layer_with_layers_inside():
    assert folded(["cell", "cell", "cell.out"]) == [("cell", 1), ("cell", 1), ("cell.out", 1)]


def test_no_layers_and_the_model_itself():
    assert repeats([], []) == []
    assert folded([""]) == [("", 1)]


def test_three_hundred_layers_are_a_few_rows():
    names = [f"stages.{s}.blocks.{b}.{part}" for s in range(3) for b in range(25) for part in ("a", "b", "c", "d")]
    patterns = ["kept" if name.endswith("d") else "angular" for name in names]
    assert folded(names, patterns) == [(f"stages.0–2.blocks.0–24.{part}", 75) for part in "abcd"]
    patterns[names.index("stages.1.blocks.7.b")] = "overridden"
    rows = folded(names, patterns)
    assert ("stages.1.blocks.7.b", 1) in rows
    assert len(rows) < 25
    assert is_sound(names, patterns)


PARTS = st.sampled_from(["a", "b", "0", "1", "2", "3", "a1", "a2", "a3"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=14, unique=True)


@given(NAMES, st.data())
def test_each_layer_is_in_one_row_whose_name_covers_no_other(names, data):
    patterns = data.draw(st.lists(st.sampled_from("+-"), min_size=len(names), max_size=len(names)))
    assert is_sound(names, patterns)


def plan_of(name, **options):
    with torch.device("meta"):
        return plan_conversion(timm.create_model(name), **options)


def patterns_of(plan):
    """What a reader of the whole table sees of each layer, but for its place."""
    rows = plan.rows(every=True)
    return [
        (row.kind, row.becomes, row.why.replace(decision.norm or "no norm", "its norm"))
        for row, decision in zip(rows, plan.decisions, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("resnet50", 14),
        pytest.param("vit_tiny_patch16_224", 3, marks=pytest.mark.zoo),
        pytest.param("mobilenetv3_small_100", 24, marks=pytest.mark.zoo),
        pytest.param("swin_tiny_patch4_window7_224", 3, marks=pytest.mark.zoo),
        pytest.param("convnext_tiny", 13, marks=pytest.mark.zoo),
        pytest.param("densenet121", 13, marks=pytest.mark.zoo),
    ],
)
def test_networks_of_today_are_few_rows_that_lose_nothing(name, most):
    plan = plan_of(name, skip_shortcuts=True)
    rows = plan.rows()
    assert len(rows) <= most
    assert len(plan.rows(every=True)) == len(plan.decisions)
    assert is_sound([decision.name for decision in plan.decisions], patterns_of(plan))
    assert sum(int(row.kind.split()[0]) if row.kind[0].isdigit() else 1 for row in rows) == len(plan.decisions)
    assert {row.becomes for row in rows} == {row.becomes for row in plan.rows(every=True)}


def test_layers_that_differ_have_a_row_of_their_own():
    unusual = {"layer3.2.conv2": "keep", "layer2.1.conv1": {"operator": "linear"}, "layer1.2.conv3": {"radius": 2.0}}
    rows = {row.layer: row for row in plan_of("resnet50", overrides=unusual).rows()}
    assert rows["layer3.2.conv2"].becomes == "kept"
    assert rows["layer2.1.conv1"].becomes == "linear"
    assert rows["layer1.2.conv3"].becomes == "cosine ρ=2"
    assert rows["layer4.1–2"].kind == "6 conv2d"


def test_a_layer_with_several_names_has_a_row_of_its_own():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared, nn.Linear(4, 4), nn.Linear(4, 4))
    rows = {row.layer: row.kind for row in plan_conversion(model, head="keep").rows()}
    assert rows["1, 3"] == "linear"
