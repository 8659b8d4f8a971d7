"""convert, inspect and suggest: what each option does, what is printed where, and how they fail."""

import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from sphereify import load, plan_conversion, sphereify
from sphereify.artifact import read_document
from sphereify.convert.options import ConversionOptions
from sphereify.nn import AngularHead
from sphereify.options import options_of
from sphereify.sources import build_model, find_model
from tests.cli.words import FILES, TINY, one_line, written


def plain() -> nn.Module:
    layers = {"a": nn.Conv2d(3, 6, 3), "norm": nn.BatchNorm2d(6), "relu": nn.ReLU(), "b": nn.Conv2d(6, 6, 3)}
    model = nn.Sequential()
    for name, layer in {**layers, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(6, 4)}.items():
        model.add_module(name, layer)
    return model


@pytest.fixture
def small(monkeypatch):
    """Whatever model is named, a small one is opened."""
    monkeypatch.setattr("sphereify.cli.convert.open_model", lambda spec, source: plain())


# ------------------------------------------------------------------------------------------------------------- convert


def test_the_example_of_the_readme(run, folder):
    code, out, err = run("convert", "resnet18", "--operator", "cosine", "--skip-shortcuts")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-3] == "17 convolutions converted, 3 shortcuts kept, the head swapped for w-softmax"
    assert lines[-2] == "11,689,512 parameters; 98.9% of the multiplications are angular"
    assert lines[-1] == "saved to resnet18-cosine/ (model.safetensors, conversion.json)"
    (kept,) = (line for line in lines if "│ kept" in line)
    assert kept.split()[1:4] == ["layer2–4.0.downsample.0", "│", "3"]
    assert "1×1 convolution on a residual shortcut" in kept
    assert "6 rows for 21 layers; --all prints each layer" in lines
    assert written(folder) == {"resnet18-cosine", *(f"resnet18-cosine/{name}" for name in FILES)}
    model = load("resnet18-cosine")
    assert isinstance(model.fc, AngularHead)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def rows_of(out):
    """The cells of the rows of a plan's table, by the first."""
    rows = (re.split(r"\s*│\s*", line) for line in out.splitlines() if "│" in line)
    return {name: rest for _, name, *rest, _ in rows}


def test_the_whole_table_names_every_layer_with_its_reason(run):
    plan = plan_conversion(timm.create_model(TINY), skip_shortcuts=True, exclude="conv1.*", operator="linear")
    options = ["--skip-shortcuts", "--exclude", "conv1.*", "--operator", "linear"]
    _, out, _ = run("inspect", TINY, *options, "--all")
    rows = rows_of(out)
    assert list(rows) == [decision.name for decision in plan.decisions]
    for decision in plan.decisions:
        kind, becomes, why = rows[decision.name]
        assert (kind, becomes) == (decision.kind, decision.operator if decision.action == "convert" else "kept")
        assert why.endswith(decision.reason)
        assert decision.role == "hidden" or decision.role in why
    assert out.splitlines()[-2:] == [plan.summary(), plan.size()]
    _, folded, _ = run("inspect", TINY, *options)
    assert 3 < len(rows_of(folded)) < len(rows)


def test_a_row_names_the_radius_of_layers_that_have_one(run, small):
    def becomes(*given):
        _, out, _ = run("inspect", "any", *given)
        return {name: cells[1] for name, cells in rows_of(out).items()}

    assert becomes() == {"a": "cosine", "b": "cosine", "fc": "cosine"}
    assert becomes("--override", "b=radius:2") == {"a": "cosine", "b": "cosine ρ=2", "fc": "cosine"}
    learned = {"a": "cosine ρ=1.5 learned", "b": "cosine ρ=1.5 learned", "fc": "cosine"}
    assert becomes("--radius", "1.5", "--learn-radius") == learned


def test_brackets_in_the_name_of_a_layer_are_printed(run, own):
    code, out, err = run("inspect", f"{own}:in_brackets")
    assert (code, err) == (0, "")
    assert "│ [bold]tail[/] │" in out


def test_inspect_writes_nothing(run, folder):
    code, _, err = run("inspect", TINY)
    assert (code, err) == (0, "")
    assert written(folder) == set()


OPTIONS = {
    "operator": (["--operator", "linear"], {"operator": "linear"}),
    "operator spelled otherwise": (["--operator", "Learnable_Sigmoid"], {"operator": "learnable-sigmoid"}),
    "k": (["--operator", "sigmoid", "--k", "0.2"], {"operator": "sigmoid", "k": 0.2}),
    "share_k": (["--operator", "learnable-sigmoid", "--share-k", "layer"],
                {"operator": "learnable-sigmoid", "share_k": "layer"}),
    "head": (["--head", "keep"], {"head": "keep"}),
    "head_operator": (["--head-operator", "linear"], {"head_operator": "linear"}),
    "scale": (["--head", "s-softmax", "--scale", "12"], {"head": "s-softmax", "scale": 12.0}),
    "margin": (["--head", "ga-softmax", "--margin", "2.5"], {"head": "ga-softmax", "margin": 2.5}),
    "margin of cosface": (["--head", "CosFace", "--margin", "0.2"], {"head": "cosface", "margin": 0.2}),
    "margin_gradient": (["--head", "arcface", "--margin-gradient", "detached"],
                        {"head": "arcface", "margin_gradient": "detached"}),
    "similarity_power": (["--head", "sphereface2", "--similarity-power", "2"],
                         {"head": "sphereface2", "similarity_power": 2.0}),
    "positive_weight": (["--head", "sphereface2", "--positive-weight", "0.6"],
                        {"head": "sphereface2", "positive_weight": 0.6}),
    "rescale": (["--rescale", "always"], {"rescale": "always"}),
    "norm": (["--norm", "replace"], {"norm": "replace"}),
    "radius": (["--radius", "2"], {"radius": 2.0}),
    "learn_radius": (["--radius", "2", "--learn-radius"], {"radius": 2.0, "learn_radius": True}),
    "magnitude": (["--magnitude", "log"], {"magnitude": "log"}),
    "weighted": (["--weighted"], {"weighted": True}),
    "magnitude_radius": (
        ["--magnitude", "tanh", "--magnitude-radius", "0.5"], {"magnitude": "tanh", "magnitude_radius": 0.5}),
    "magnitude_mean": (
        ["--magnitude", "ball", "--magnitude-mean", "data"], {"magnitude": "ball", "magnitude_mean": "data"}),
    "learn_magnitude_radius": (
        ["--magnitude", "tanh", "--learn-magnitude-radius"], {"magnitude": "tanh", "learn_magnitude_radius": True}),
    "magnitude_beta": (
        ["--magnitude", "mix", "--magnitude-beta", "0.5"], {"magnitude": "mix", "magnitude_beta": 0.5}),
    "overrides with a magnitude": (
        ["--override", "b=magnitude:tanh,weighted:true"],
        {"overrides": {"b": {"magnitude": "tanh", "weighted": True}}}),
    "overrides with a radius": (["--override", "b=radius:2"], {"overrides": {"b": {"radius": 2.0}}}),
    "eps": (["--eps", "0.01"], {"eps": 0.01}),
    "include": (["--include", "a"], {"include": "a"}),
    "include twice": (["--include", "a", "--include", "re:[b]"], {"include": ["a", "re:[b]"]}),
    "exclude": (["--exclude", "a"], {"exclude": "a"}),
    "exclude twice": (["--exclude", "a", "--exclude", "fc"], {"exclude": ["a", "fc"]}),
    "overrides": (["--override", "a=keep"], {"overrides": {"a": "keep"}}),
    "overrides with settings": (
        ["--override", "a=operator:sigmoid, k:0.7 ,rescale:always,radius:2"],
        {"overrides": {"a": {"operator": "sigmoid", "k": 0.7, "rescale": "always", "radius": 2.0}}}),
    "overrides twice, first wins": (
        ["--override", "a=operator:linear", "--override", "[ab]=keep"],
        {"overrides": {"a": {"operator": "linear"}, "[ab]": "keep"}}),
}  # fmt: skip


@pytest.mark.parametrize(("given", "meant"), OPTIONS.values(), ids=OPTIONS)
def test_each_option_has_its_effect_on_the_plan(run, small, given, meant):
    code, out, err = run("inspect", "any", "--json", *given)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(plan_conversion(plain(), **meant).to_json())
    assert json.loads(out) != json.loads(plan_conversion(plain()).to_json())


def test_shortcuts_are_kept_on_demand(run):
    plans = [run("inspect", TINY, "--json", *given)[1] for given in (["--skip-shortcuts"], [])]
    assert json.loads(plans[0]) == json.loads(plan_conversion(timm.create_model(TINY), skip_shortcuts=True).to_json())
    assert plans[0] != plans[1]


def test_attention_is_converted_on_demand(run, own):
    spec = f"{own}:Attentive"
    plans = {}
    for word in ("keep", "convert"):
        code, out, err = run("inspect", spec, "--json", "--attention", word)
        assert (code, err) == (0, "")
        plans[word] = json.loads(out)
        meant = plan_conversion(build_model(find_model(spec)), attention=word)
        assert plans[word] == json.loads(meant.to_json())
    assert plans["keep"] != plans["convert"]
    assert json.loads(run("inspect", spec, "--json")[1]) == plans["keep"]


def test_no_option_of_a_conversion_is_left_out_above():
    tested = {name.split()[0] for name in OPTIONS} | {"skip_shortcuts", "skip_depthwise", "attention"}
    assert tested == set(options_of(ConversionOptions))


def test_verify_says_which_layers_are_called(run, own):
    code, out, err = run("inspect", f"{own}:Partly", "--json", "--verify")
    assert (code, err) == (0, "")
    called = {d["name"]: (d["called"], d["action"]) for d in json.loads(out)["decisions"]}
    assert called == {"conv": (True, "convert"), "spare": (False, "keep"), "fc": (True, "convert")}


def test_energies_are_printed_and_drawn(run, small):
    code, out, err = run("inspect", "any", "--energy", "--energy-plot", "energy.png")
    assert (code, err) == (0, "")
    assert "hyperspherical energy (s=1, euclidean)" in out
    assert re.search(r"^fc +\d+ +\d+ +0\.\d{4}", out, re.MULTILINE)
    assert out.endswith("drawn to energy.png\n")
    assert Path("energy.png").stat().st_size > 5000
    code, out, err = run("inspect", "any", "--energy-plot", "nowhere/energy.png")
    assert code == 2
    assert "nowhere/energy.png: cannot write the picture" in err


def test_convert_saves_the_network_that_the_options_describe(run):
    code, _, err = run(
        "convert", TINY, "--operator", "sigmoid", "--k", "0.4", "--skip-shortcuts", "--rescale", "always"
    )
    assert (code, err) == (0, "")
    torch.manual_seed(0)
    expected = sphereify(timm.create_model(TINY), operator="sigmoid", k=0.4, skip_shortcuts=True, rescale="always")
    model = load("test_resnet-sigmoid")
    assert model.conversion_plan == expected.conversion_plan
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), expected.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_json_is_all_there_is_on_stdout(run, small, command):
    code, out, err = run(command, "any", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(plan_conversion(plain()).to_json())
    assert Path("any-cosine").is_dir() == (command == "convert")


def test_the_seed_is_that_of_the_weights(run, own):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("convert", f"{own}:small", "-o", folder, "--seed", seed)[0] == 0
    a, b, c = (load_file(Path(folder) / "model.safetensors") for folder in "abc")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["0.weight"], c["0.weight"])


def test_classes_and_channels_are_the_models(run):
    assert run("convert", TINY, "--num-classes", 7, "--in-chans", 2)[0] == 0
    document = read_document("test_resnet-cosine")
    arguments = {"num_classes": 7, "in_chans": 2}
    assert document["source"] == {"library": "timm", "name": TINY, "arguments": arguments}
    assert load("test_resnet-cosine")(torch.randn(1, 2, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("place", ["file", "module"])
def test_a_network_of_ones_own(run, own, place):
    spec = f"{own}:small" if place == "file" else "own_networks:small"
    code, out, err = run("convert", spec, "--num-classes", 5, "--in-chans", 2)
    assert (code, err) == (0, "")
    assert "saved to small-cosine/" in out
    model = load("small-cosine", factory=lambda: build_model(find_model(spec, num_classes=5, in_chans=2)))
    assert model.conversion_plan.summary() == "1 convolution converted, the head swapped for w-softmax"
    assert model(torch.randn(1, 2, 8, 8)).shape == (1, 5)


def test_a_torchvision_network(run):
    code, _, err = run("convert", "torchvision:squeezenet1_1", "--head", "keep", "--num-classes", 3)
    assert (code, err) == (0, "")
    assert load("squeezenet1_1-cosine")(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_pretrained_weights_are_asked_of_the_library(run, monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **rest: asked.append(pretrained) or create(name, **rest)
    )
    assert run("convert", TINY, "--pretrained", "--json")[0] == 0
    assert asked[0] is True
    assert not any(asked[1:])  # saving builds the network again, without weights


def test_an_artifact_converted_again_stays_the_same(run, artifact):
    code, out, err = run("inspect", artifact, "--skip-shortcuts")
    assert (code, err) == (0, "")
    assert "12 convolutions converted, 3 shortcuts kept, the head swapped" in out, "how it was converted"
    code, out, err = run("convert", artifact, "-o", "again", "--skip-shortcuts")
    assert (code, err) == (0, "")
    assert "nothing new was converted" in out
    assert load("again").conversion_plan == load(artifact).conversion_plan
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(load("again")(x), load(artifact)(x), rtol=0, atol=0)


def test_an_artifact_can_be_converted_further(run, artifact):
    code, _, err = run("convert", artifact, "-o", "further", "--operator", "linear")
    assert (code, err) == (0, "")
    operators = {d.name: d.operator for d in load("further").conversion_plan.converted}
    assert operators["layer2.0.downsample.1"] == "linear"
    assert operators["layer2.0.conv1"] == "cosine"
    assert len(operators) == 16


@pytest.mark.parametrize("command", [["inspect"], ["convert", "-o", "again"]])
def test_an_artifact_of_ones_own_is_read_with_the_factory_that_made_it(run, own, command):
    assert run("convert", f"{own}:small", "--num-classes", "10", "--in-chans", "1", "-o", "mine")[0] == 0
    Path("plain.py").write_text(f"import {Path(own).stem}\ndef make():\n    return {Path(own).stem}.small(10, 1)\n")
    code, _, err = run(command[0], "mine", *command[1:])
    assert (code, "--factory" in err) == (2, True)
    code, _, err = run(command[0], "mine", *command[1:], "--factory", "plain.py:make")
    assert (code, err) == (0, "")


# -------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("flag", ["-o", "--output"])
def test_the_output_folder_is_made_with_its_parents(run, small, flag):
    assert run("convert", "any", flag, "deep/down/here")[0] == 0
    assert set(written(Path("deep/down/here"))) == FILES


def test_an_empty_folder_is_no_obstacle(run, small):
    Path("out").mkdir()
    assert run("convert", "any", "-o", "out")[0] == 0


def test_force_replaces_an_artifact_and_leaves_other_files(run, small):
    assert run("convert", "any", "-o", "out")[0] == 0
    Path("out/notes.txt").write_text("mine")
    code, _, err = run("convert", "any", "-o", "out", "--operator", "linear", "--force")
    assert (code, err) == (0, "")
    assert load("out", factory=plain).conversion_plan.converted[0].operator == "linear"
    assert written(Path("out")) == {*FILES, "notes.txt"}


@pytest.mark.parametrize("command", [["convert", TINY], ["finetune", TINY, "--data", "digits"]])
def test_an_output_that_exists_needs_force(refused, command):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    refused([*command, "-o", "out"], 2, "out: exists already; --force replaces the artifact in it, --output names")


@pytest.mark.parametrize("command", [["convert", TINY], ["finetune", TINY, "--data", "digits"],
                                     ["evaluate", TINY, "--data", "digits"]])  # fmt: skip
def test_an_output_that_is_a_file_is_wrong_use(refused, command):
    Path("out").write_text("mine")
    force = [[]] if command[0] == "evaluate" else [[], ["--force"]]
    for given in force:
        refused([*command, "-o", "out", *given], 2, "out: is a file; --output names a folder")
    assert Path("out").read_text() == "mine"


def test_an_output_below_a_file_is_a_failure(refused, small):
    Path("out").write_text("mine")
    refused(["convert", "any", "-o", "out/deep"], 1, "out/deep: cannot be written")


# --------------------------------------------------------------------------------------------------------- calibration


def test_convert_calibrates_and_prints_how_well_each_layer_did(run, own):
    code, out, err = run("convert", f"{own}:small", "--calibrate", "digits", "--calibration-images", 40,
                         "--calibrate-steps", 2, "-o", "calibrated")  # fmt: skip
    assert code == 0, err
    assert "2 layers calibrated" in out
    assert "the outputs' error fell from" in out
    torch.manual_seed(0)
    original = build_model(find_model(f"{own}:small"))
    calibrated = load("calibrated", factory=lambda: build_model(find_model(f"{own}:small")))
    assert not torch.equal(calibrated[0].weight, original[0].weight)


def test_convert_chooses_a_radius_and_prints_what_was_tried(run, own):
    code, out, err = run("convert", f"{own}:small", "--calibrate", "digits", "--calibration-images", 64,
                         "--agreement", 0.2, "--learn-radius", "-o", "agreed")  # fmt: skip
    assert code == 0, err
    assert "same class at low contrast" in out
    assert "ρ = 0: " in out
    assert "of 8 held-out inputs get the original's class" in out
    assert "ρ = 1: " in err  # as it went
    notes = json.loads(Path("agreed/conversion.json").read_text())["plan"]["notes"]
    assert any("radius chosen by agreement: ρ = 0" in note for note in notes)


def test_json_stays_alone_on_the_output_with_a_calibration(run, own):
    code, out, _ = run("convert", f"{own}:small", "--calibrate", "digits", "--calibration-images", 50, "--json")
    assert code == 0
    assert json.loads(out)["decisions"]


def test_suggest_names_layers_and_writes_nothing(run, own, folder):
    before = sorted(folder.iterdir())
    code, out, err = run("suggest", f"{own}:small", "--calibrate", "digits", "--calibration-images", 100)
    assert code == 0, err
    assert "agreement with the original" in out
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--calibrate: is missing; the images to calibrate on: digits, a folder, or a name of timm's"),
        (["--calibrate", "digits", "--calibrate-steps", "3"], "No such option: --calibrate-steps"),
        (
            ["--calibrate", "digits", "--accuracy-loss", "2"],
            "--accuracy-loss: got 2.0, expected a share above 0 and below 1",
        ),
    ],
)
def test_suggest_refuses_what_it_cannot_use(refused, own, given, told):
    refused(["suggest", f"{own}:small", *given], 2, told)


def test_a_folder_of_images_without_classes_calibrates_and_only_its_training_part(run, own, folder):
    from PIL import Image

    for name in ("a.png", "deep/er/b.png"):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (90, 20, 200)).save(folder / "photos" / name)
    code, _, err = run("convert", f"{own}:small", "--calibrate", "photos", "--img-size", 16, "-o", "one")
    assert code == 0, err
    (folder / "photos" / "train").mkdir()
    code, _, err = run("convert", f"{own}:small", "--calibrate", "photos", "--img-size", 16, "-o", "two")
    assert code == 1
    assert "no images in photos/train" in err
    assert not Path("two").exists()


@pytest.mark.parametrize(
    ("code", "options", "told"),
    [
        (2, ["--calibration-images", "5"], "--calibration-images: has no effect without --calibrate"),
        (2, ["--calibrate-steps", "5"], "--calibrate-steps: has no effect without --calibrate"),
        (
            2,
            ["--calibrate", "digits", "--calibrate-contrast-jitter"],
            "--calibrate-contrast-jitter: has no effect without --calibrate-steps",
        ),
        (2, ["--agreement", "0.9"], "--agreement: has no effect without --calibrate"),
        (
            2,
            ["--calibrate", "digits", "--agreement", "1"],
            "--agreement: got 1.0, expected a number above 0 and below 1",
        ),
        (
            2,
            ["--calibrate", "digits", "--agreement", "0.9", "--radius", "2"],
            "--radius 2.0: --agreement chooses the radius; give one of the two",
        ),
        (2, ["--calibrate", ""], "empty name"),
        (2, ["--calibrate", "digits", "--img-size", "0"], "--img-size: got 0"),
        (2, ["--calibrate", "digits", "--calibrate-steps", "-1"], "--calibrate-steps: got -1"),
        (2, ["--calibrate", "digits", "--calibration-images", "0"], "--calibration-images: got 0"),
        (2, ["--calibrate", "digits", "--data-root", "x"], "--data-root: has no effect on 'digits'"),
        (1, ["--calibrate", "nowhere"], "neither 'digits' nor a folder"),
    ],
)
def test_wrong_words_about_a_calibration_are_told_and_nothing_is_written(refused, own, code, options, told):
    refused(["convert", f"{own}:small", *options, "-o", "out"], code, told)


def test_an_artifact_is_not_calibrated_against_itself(refused, artifact):
    refused(["convert", artifact, "--calibrate", "digits", "-o", "out"], 2, "converted already")


# ----------------------------------------------------------------------------------------------------------- bad input

WRONG_OPTIONS = {
    "unknown operator": (["--operator", "cosin"], "error: --operator: got 'cosin', expected one of linear, cosine, "
                         "sigmoid, learnable-sigmoid. Did you mean 'cosine'?"),
    "unknown head operator": (["--head-operator", "sin"], "error: --head-operator: got 'sin', expected one of"),
    "unknown head": (
        ["--head", "softmax"],
        "--head: got 'softmax', expected one of auto, keep, w-softmax, ga-softmax, a-softmax, s-softmax",
    ),
    "unknown rescale": (["--rescale", "maybe"], "--rescale: got 'maybe', expected one of auto, always, never"),
    "unknown share": (["--share-k", "model"], "--share-k: got 'model', expected one of filter, layer, network"),
    "k of 0": (["--operator", "sigmoid", "--k", "0"], "error: --k: got 0.0, expected a positive finite number"),
    "k not finite": (["--operator", "sigmoid", "--k", "nan"], "k: got nan, expected a positive finite number"),
    "k where there is none": (["--k", "0.3"], "--k: got 0.3 for the cosine operator, which has none. Leave it out or"),
    "k not a number": (["--k", "large"], "Invalid value for '--k'"),
    "negative radius": (["--radius", "-1"], "--radius: got -1.0, expected a number of at least 0"),
    "radius not finite": (["--radius", "nan"], "--radius: got nan, expected a number of at least 0"),
    "radius not a number": (["--radius", "wide"], "Invalid value for '--radius'"),
    "learned radius without a start": (["--learn-radius"], "--learn-radius: ρ starts from --radius, whose gradient is "
                                       "0 at 0; give it a start, such as --radius 1.0"),
    "radius of no convolution": (["--radius", "2", "--include", "fc"], "--radius 2.0: has no effect, since no "),
    "radius of a linear map": (["--override", "fc=radius:2"], "--override['fc']: radius has no effect on fc"),
    "margin below 1": (["--margin", "0.5"], "--margin: got 0.5, expected a number of at least 1"),
    "scale of 0": (["--scale", "0"], "--scale: got 0.0, expected a number above 0"),
    "scale where there is none": (["--scale", "3"], "--scale: has no effect on --head auto; it belongs to s-softmax"),
    "include without match": (["--include", "layer9.*"], "--include: pattern 'layer9.*' matches no convolution or "
                              "linear layer; names look like"),
    "override without match": (["--override", "head=keep"], "--override: pattern 'head' matches no convolution or"),
    "broken expression": (["--include", "re:("], "--include: 're:(' is not a regular expression"),
    "override without =": (["--override", "layer1.*"], "--override: got 'layer1.*', expected PATTERN=keep or PATTERN="),
    "override of unknown key": (["--override", "fc=margin:3"], "got 'margin', expected one of operator, k, rescale"),
    "nothing to convert": (["--exclude", "*"], "nothing to convert: all 3 layers would be kept (3 × excluded by "
                           "pattern). Widen the patterns."),
    "unknown option": (["--opertor", "cosine"], "No such option: --opertor"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "text"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_wrong_option_is_wrong_use(refused, small, given, text):
    refused(["inspect", "any", *given], 2, text)


def test_a_wrong_option_of_convert_is_wrong_use_and_nothing_is_written(refused, small):
    refused(
        ["convert", "any", "--exclude", "layer1"], 2, "--exclude: pattern 'layer1' matches no convolution or linear"
    )


def test_an_override_of_a_layer_is_checked_like_an_option(refused, small):
    refused(
        ["inspect", "any", "--override", "fc=operator:cos"], 2, "--override['fc']: operator: got 'cos', expected one of"
    )
    refused(["inspect", "any", "--override", "fc=rescale:yes"], 2, "got 'yes', expected one of auto, always, never")


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("resnet81", ["model 'resnet81': not found", "did you mean", "resnet18", "? Accepted are a timm name"]),
        ("torchvision:resnet81", ["model 'torchvision:resnet81': not found", "did you mean", "torchvision:resnet18"]),
        ("zzzzqqqq", ["model 'zzzzqqqq': not found", "timm.list_models()", ". Accepted are a timm name",
                      "path/to/file.py:factory"]),
        ("nowhere.py:make", ["model 'nowhere.py:make': there is no file nowhere.py"]),
        ("no_such_module:make", ["model 'no_such_module:make'", "importing no_such_module failed"]),
        ("own_networks.py:smal", ["own_networks.py has no function 'smal'; did you mean own_networks.py:small?"]),
        ("own_networks.py:a_number", ["own_networks.py:a_number: returned int, expected a torch.nn.Module"]),
        ("own_networks.py:without_layers", ["Sequential has no convolution or linear layer", "nothing to convert"]),
        ("own_networks.py:lazy", ["0 (LazyConv2d) is lazy and has no weights yet: run one forward pass"]),
        pytest.param("own_networks.py:compiled",
                     ["OptimizedModule (torch.compile): convert the plain model first, then wrap"],
                     marks=pytest.mark.exhaustive),
        ("own_networks.py:parallel", ["DataParallel (torch.nn.parallel): convert the plain model first, then wrap"]),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_had_or_converted_is_wrong_use(refused, own, spec, texts):
    refused(["convert", spec], 2, *texts)


def test_a_head_without_a_classifier_is_wrong_use(refused, own):
    refused(["convert", f"{own}:features", "--head", "s-softmax"], 2, "no classifier", "--head keep")


def test_a_mistake_in_the_users_own_factory_is_told(run, own):
    code, out, err = run("inspect", f"{own}:broken")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError: the user's own mistake" in one_line(err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("empty", "damaged: there is no conversion.json in it; an artifact is a folder with conversion.json and model"),
        ("truncated", "damaged/model.safetensors: truncated or damaged"),
        ("newer", "damaged/conversion.json: format version 99 is newer than 1"),
    ],
)
@pytest.mark.parametrize("command", [["convert", "-o", "out"], ["finetune", "--data", "digits"]])
def test_a_damaged_artifact_is_a_failure(refused, artifact, command, how, text):
    damaged = Path("damaged")
    damaged.mkdir()
    for name in FILES if how != "empty" else ():
        (damaged / name).write_bytes((artifact / name).read_bytes())
    if how == "truncated":
        (damaged / "model.safetensors").write_bytes((artifact / "model.safetensors").read_bytes()[:1000])
    if how == "newer":
        document = json.loads((damaged / "conversion.json").read_text())
        (damaged / "conversion.json").write_text(json.dumps({**document, "format_version": 99}))
    refused([command[0], damaged, *command[1:]], 1, text)


def test_copied_weights_come_with_a_line_on_what_they_lose(run, own):
    torch.manual_seed(0)
    sys.path.insert(0, "")
    import own_networks

    torch.save(own_networks.small().state_dict(), "mine.pt")
    command = ["convert", f"{own}:small", "-o", "out", "--force"]
    for given, is_told in (
        (["--weights", "mine.pt"], True),
        ([], False),
        (["--weights", "mine.pt", "--calibrate", "digits", "--calibration-images", 40, "--img-size", 8], False),
        (["--weights", "mine.pt", "--json"], False),
    ):
        code, out, err = run(*command, *given)
        assert (code, err) == (0, "")
        assert ("the weights were copied, which loses most of what they know; --calibrate" in out) == is_told
