"""finetune, evaluate and compare: their options reach the library, what is printed, and how they fail."""

import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

from sphereify import load, save, sphereify
from sphereify.artifact import read_document
from sphereify.convert.options import ConversionOptions
from sphereify.datasets import load_data
from sphereify.nn import AngularHead
from sphereify.options import options_of
from sphereify.sources import build_model, find_model
from sphereify.training import DataOptions, Epoch, Result, Settings, Terms, accuracy, with_recipe
from tests.cli.words import TINY, one_line, words, written

FEW = ["--train-images", 64, "--test-images", 30, "--batch-size", 32, "--epochs", 1, "--device", "cpu"]


def test_finetune_trains_an_artifact_and_saves_it_with_its_accuracy(run, artifact):
    before = (artifact / "model.safetensors").read_bytes()
    code, out, err = run("finetune", artifact, "--data", "digits", "--train-images", 64, "--test-images", 90,
                         "--epochs", 2, "--batch-size", 32, "-o", "trained", "--device", "cpu")  # fmt: skip
    assert (code, err) == (0, "")
    *epochs, last = out.splitlines()
    assert [line.split()[:2] for line in epochs] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all(re.search(r"loss \d+\.\d{4}  test accuracy \d+\.\d{2}%  \d+ images/s$", line) for line in epochs)
    training = read_document("trained/last")["training"]
    assert training["data"] == "digits, 64 train images, 90 test images"
    assert training["classes"] == [str(digit) for digit in range(10)]
    assert training["epochs"] == 2
    assert training["image_size"] == [1, 32, 32]
    best = read_document("trained/best")["training"]
    assert last == (f"test accuracy {training['accuracy']:.2%}, saved to trained/last; best {best['accuracy']:.2%} in "
                    f"epoch {best['epochs']}, saved to trained/best")  # fmt: skip
    assert best["accuracy"] >= training["accuracy"]
    model = load("trained/last")
    test = torch.utils.data.DataLoader(load_data("digits", channels=1, test_images=90).test, 90)
    assert accuracy(model, test) == pytest.approx(training["accuracy"])
    assert model.conversion_plan == load(artifact).conversion_plan
    assert not torch.equal(model.conv1[0].weight, load(artifact).conv1[0].weight)
    assert (artifact / "model.safetensors").read_bytes() == before


def test_finetune_converts_a_plain_model_for_the_classes_of_the_data(run, shapes):
    code, out, err = run("finetune", TINY, "--data", shapes, "--epochs", 1, "--batch-size", 6, "--img-size", 32,
                         "--device", "cpu")  # fmt: skip
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith("saved to test_resnet-finetuned/best")
    model = load("test_resnet-finetuned/last")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    assert isinstance(model.fc, AngularHead)
    assert read_document("test_resnet-finetuned/last")["training"]["classes"] == ["bright", "dark"]


def test_an_artifact_of_ones_own_is_trained_with_the_factory_that_made_it(run, own):
    assert run("convert", f"{own}:small", "--num-classes", "10", "--in-chans", "1", "-o", "mine")[0] == 0
    Path("plain.py").write_text(f"import {Path(own).stem}\ndef make():\n    return {Path(own).stem}.small(10, 1)\n")
    command = ["finetune", "mine", "--data", "digits", "--img-size", 8, *FEW]
    code, _, err = run(*command)
    assert (code, "--factory" in err) == (2, True)
    code, _, err = run(*command, "--factory", "plain.py:make")
    assert (code, err) == (0, "")


# ------------------------------------------------------------------------------------------------ options of finetune


@pytest.fixture
def begun(monkeypatch) -> dict:
    """The arguments with which training would begin; it does not."""
    seen = {}

    def train(model, data, settings, **others):
        seen.update(model=model, data=data, settings=settings, **others)
        return Result([Epoch(1, 0.5, 0.25), Epoch(2, 0.4, 0.125)], None)

    monkeypatch.setattr("sphereify.training.finetune", train)
    return seen


TERMS = {
    "label_smoothing": 0.1, "margin_anneal": False, "mhe": 0.5, "mhe_s": 2.0, "mhe_half_space": True,
    "mhe_distance": "angular", "mhe_hidden": 0.5, "mhe_output": 10.0, "orthogonality": 0.01, "sampled_classes": 0.5,
    "mhe_energy": "compressive", "mhe_dimensions": 24, "mhe_projections": 5,
}  # fmt: skip
DETERMINANT = {"mhe": 0.5, "mhe_energy": "determinant", "mhe_gamma": 2.0}
SETTINGS = {
    "epochs": 3, "epoch_batches": 4,
    "batch_size": 5, "lr": 0.25, "opt": "lamb", "sched": "step", "warmup_epochs": 1.5, "min_lr": 1e-5,
    "decay_epochs": 1.5, "milestones": (1, 2), "decay_rate": 0.5,
    "weight_decay": 0.125, "layer_decay": 0.75, "accumulate": 2, "clip_grad": 1.5, "ema": 0.5, "mixup": 0.2,
    "cutmix": 1.0, "amp": "bf16", "channels_last": True, "compile": True, "freeze": ("conv1", "layer1.*"),
    "warmup_head_epochs": 1, "teacher_weight": 0.25, "teacher_temperature": 4.0, "seed": 7, "deterministic": True,
    "workers": 2, "device": "cpu", "strict": True, "checkpoint_minutes": 0.5,
}  # fmt: skip


def test_each_option_of_finetune_reaches_the_training(run, artifact, begun):
    given = words(SETTINGS | TERMS)
    code, out, _ = run("finetune", artifact, "--data", "digits", "--img-size", 24, *given, "-o", "out")
    assert code == 0
    assert begun["settings"] == Settings(**SETTINGS, terms=Terms(**TERMS))
    assert SETTINGS.keys() | {"fsdp", "morph"} == options_of(Settings).keys()
    assert TERMS.keys() | DETERMINANT.keys() == options_of(Terms).keys()
    assert not [name for name, value in (SETTINGS | TERMS).items() if name != "device"
                and value in (getattr(Settings(), name, None), getattr(Terms(), name, None))]  # fmt: skip
    assert begun["data"].image_size == (1, 24, 24)
    assert (begun["output"], begun["resume"], begun["teacher"]) == (Path("out"), False, None)
    assert out == "test accuracy 12.50%, saved to out/last; best 25.00% in epoch 1, saved to out/best\n"


def test_options_of_another_energy_reach_the_training(run, artifact, begun):
    given = words(DETERMINANT)
    assert run("finetune", artifact, "--data", "digits", "--img-size", 24, *given, "-o", "out")[0] == 0
    assert begun["settings"].terms == Terms(**DETERMINANT)


def test_a_morph_begins_with_the_original_and_reaches_the_training(run, begun, own, artifact):
    code, _, _ = run("finetune", f"{own}:small", "--data", "digits", "--morph", 0.5, "--radius", 1, "-o", "out")
    assert code == 0
    assert begun["settings"].morph == 0.5
    assert begun["model"][0].morph == 0
    code, _, err = run("finetune", artifact, "--data", "digits", "--morph", 0.5, "-o", "other")
    assert code == 2
    assert "--morph: starts from the original network, and the artifact" in err


def test_the_seed_of_finetune_is_that_of_the_weights_of_a_plain_model_too(run, begun, own):
    weights = []
    for seed in (1, 1, 2):
        assert run("finetune", f"{own}:small", "--data", "digits", "--seed", seed, "-o", "out", "--force")[0] == 0
        weights.append(begun["model"][0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("start", ["artifact", "plain model"])
def test_images_of_a_folder_come_as_the_configuration_of_the_model_says(run, begun, shapes, folder, start):
    config = timm.create_model(TINY).pretrained_cfg
    if start == "artifact":
        save(sphereify(build_model(find_model(TINY, num_classes=2))), folder / "two")
    code, _, _ = run("finetune", folder / "two" if start == "artifact" else TINY, "--data", shapes, "-o", "out")
    assert code == 0
    data = begun["data"]
    assert data.image_size == config["input_size"] == (3, 160, 160)
    expected = (torch.tensor([230, 230, 230]) / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(data.test[0][0].mean((1, 2)), expected, atol=0.02, rtol=0)


def test_a_plain_model_for_gray_images_gets_gray_images(run, begun, own):
    code, _, _ = run("finetune", f"{own}:gray", "--data", "digits", "-o", "out")
    assert code == 0
    assert begun["data"].image_size[0] == 1


def test_the_original_teaches_with_the_weights_it_was_given(run, begun, own):
    sys.path.insert(0, "")
    import own_networks

    saved = own_networks.small(10, 3)
    torch.save(saved.state_dict(), "mine.pt")
    code, _, err = run("finetune", f"{own}:small", "--data", "digits", "--weights", "mine.pt", "--teacher", "original",
                       "-o", "out")  # fmt: skip
    assert (code, err) == (0, "")
    assert torch.equal(begun["teacher"][0].weight, saved[0].weight)
    assert not isinstance(begun["teacher"][-1], AngularHead)


def test_a_trained_network_is_trained_further_with_a_gentle_recipe(run, begun, own):
    sys.path.insert(0, "")
    import own_networks

    torch.save(own_networks.small(10, 3).state_dict(), "mine.pt")
    for given, trained in ((("--weights", "mine.pt"), True), ((), False)):
        assert run("finetune", f"{own}:small", "--data", "digits", *given, "-o", "out", "--force")[0] == 0
        assert begun["settings"] == with_recipe(Settings(), trained=trained)


# ------------------------------------------------------------------------------------------------- a run in its folder


def test_a_run_is_continued_with_the_options_of_its_beginning(run, begun, own):
    assert run("finetune", f"{own}:small", "--data", "digits", "--img-size", 8, "--lr", 0.5, "--freeze", "0",
               "--seed", 3, "--mhe", 1, "-o", "out")[0] == 0  # fmt: skip
    first = dict(begun)
    first["on_start"]()  # writes the options of the run
    begun.clear()
    Path("out").rename("moved")
    code, _, err = run("finetune", "--resume", "moved", "--workers", 1)
    assert (code, err) == (0, "")
    expected = Settings(lr=0.5, freeze=("0",), seed=3, workers=1, terms=Terms(mhe=1.0))
    assert begun["settings"] == with_recipe(expected)
    assert (begun["resume"], begun["output"]) == (True, Path("moved"))
    torch.testing.assert_close(begun["model"].state_dict(), first["model"].state_dict(), rtol=0, atol=0)
    code, _, err = run("finetune", "--resume", "moved", "--lr", "0.25")
    assert code == 2
    assert "cannot be continued otherwise than it began: --lr: 0.5 before, 0.25 now" in one_line(err)


def test_what_is_no_run_is_not_continued(refused):
    refused(
        ["finetune", "--resume", "nowhere"], 2, "--resume: nowhere is not the folder of a run, there is no run.json"
    )


def test_a_new_run_by_force_leaves_nothing_of_the_old_one(run, own):
    begin = ["finetune", f"{own}:small", "--data", "digits", "--img-size", 8, *FEW, "-o", "out"]
    assert run(*begin)[0] == 0
    assert Path("out/summary.json").is_file()
    assert run(*begin, "--force", "--lr", "1e30")[0] == 1
    assert not {"summary.json", "metrics.csv", "curves.png", "last"} & {path.name for path in Path("out").iterdir()}


# ------------------------------------------------------------------------------------------------- evaluate and compare


@pytest.fixture
def tested(monkeypatch) -> dict:
    """The arguments with which a test would begin; it does not."""
    seen = {}

    def test(model, data, settings):
        seen.update(model=model, data=data, settings=settings)
        raise SystemExit(0)

    monkeypatch.setattr("sphereify.training.evaluate", test)
    return seen


def test_evaluate_takes_the_size_that_the_network_was_trained_at(run, own, tested):
    assert run("finetune", f"{own}:small", "--data", "digits", "--img-size", 16, *FEW, "-o", "out")[0] == 0
    for given, size in (([], 16), (["--img-size", 24], 24)):
        evaluate = ["evaluate", "out/last", "--factory", f"{own}:of_ten_classes", "--data", "digits"]
        assert run(*evaluate, *given)[0] == 0
        assert tested["data"].image_size == (3, size, size)


def test_evaluate_on_other_classes_is_a_failure(run, shapes, own):
    finetune = ["finetune", f"{own}:small", "--data", shapes, "--epochs", 1, "--batch-size", 6, "--img-size", 8]
    assert run(*finetune, "-o", "out")[0] == 0
    for part in ("train", "val"):
        (shapes / part / "bright").rename(shapes / part / "light")
    code, out, err = run("evaluate", "out/last", "--factory", f"{own}:of_two_classes", "--data", shapes)
    assert (code, out) == (1, "")
    assert "was trained on other classes than" in one_line(err)
    assert "bright, light" in one_line(err)


def test_an_evaluation_is_written_as_plain_json(run, artifact):
    code, out, err = run("evaluate", artifact, "--data", "digits", "--test-images", 5, "--img-size", 24, "-o", "report")
    assert (code, err) == (0, "")
    assert "of 5 images" in out
    assert "written to report/evaluation.json, drawn to report/confusion.png" in out
    numbers = json.loads(Path("report/evaluation.json").read_text(), parse_constant=pytest.fail)
    assert None in numbers["per_class"]
    assert numbers["images"] == 5
    assert Path("report/confusion.png").is_file()


def test_each_option_of_evaluate_reaches_the_test(run, artifact, tested):
    options = {"batch_size": 7, "workers": 1, "device": "cpu", "amp": "bf16", "channels_last": True, "strict": True}
    assert run("evaluate", artifact, "--data", "digits", *words(options))[0] == 0
    assert tested["settings"] == Settings(**options)


def test_compare_trains_the_original_and_conversions_alike(run, own, monkeypatch):
    seen = {}

    def compare(build, data, variants, settings, **others):
        seen.update(build=build, data=data, variants=variants, settings=settings, **others)
        raise SystemExit(0)

    monkeypatch.setattr("sphereify.training.compare", compare)
    code, _, err = run("compare", f"{own}:small", "--data", "digits", "--operators", "sigmoid,Learnable_Sigmoid",
                       "--k", 0.25, "--rescale", "always", "--seeds", 3, "--reach", 0.5, "--lr", 0.5)  # fmt: skip
    assert (code, err) == (0, "")
    assert [variant.name for variant in seen["variants"]] == ["original", "sigmoid", "learnable-sigmoid"]
    assert seen["variants"][0].options is None
    expected = ConversionOptions(operator="sigmoid", k=0.25, rescale="always")
    assert ConversionOptions(**seen["variants"][1].options) == expected
    assert (seen["settings"], seen["seeds"], seen["reach"]) == (Settings(lr=0.5), 3, 0.5)
    assert seen["output"] == Path("small-compared")
    assert seen["build"]()[-1].out_features == 10
    torch.manual_seed(3)
    first = seen["build"]()[0].weight
    assert not torch.equal(first, seen["build"]()[0].weight), "the seed is that of each run"


def test_compare_starts_from_a_plain_model(refused, artifact):
    refused(["compare", artifact, "--data", "digits"], 2, "is a saved artifact; compare starts from the plain model")
    refused(
        ["compare", TINY, "--data", "digits", "--operators", " ,"], 2, "--operators: got none, expected some of linear"
    )
    refused(["compare", TINY, "--data", "digits", "--operators", "cosine,sin"], 2, "--operators: got 'sin', expected")


# ------------------------------------------------------------------------------------- trained weights, and corruptions


@pytest.fixture
def trained_weights(own) -> str:
    """The checkpoint of a network of the user's own for ten classes."""
    sys.path.insert(0, "")
    import own_networks

    torch.manual_seed(5)
    torch.save(own_networks.small(10, 3).state_dict(), "mine.pt")
    return "mine.pt"


def test_finetune_keeps_what_trained_weights_know_and_says_so(run, own, trained_weights, begun):
    command = ["finetune", f"{own}:small", "--data", "digits", "--img-size", 8, "-o", "out"]
    code, out, err = run(*command, "--weights", trained_weights, "--calibration-images", 70, "--radius", 2)
    assert (code, err) == (0, "")
    first, *_ = out.splitlines()
    assert first.startswith("kept what was learned, on 70 training images without labels: 2 layers calibrated, R² ")
    assert first.endswith("(--no-calibrate leaves it out)")
    assert begun["model"][0].radius == 2.0
    weight = torch.load(trained_weights, weights_only=True)["0.weight"]
    assert not torch.equal(begun["model"][0].weight, weight)
    for others in (["--weights", trained_weights, "--no-calibrate"], []):
        code, out, _ = run(*command, *others)
        assert "kept" not in out
        assert torch.equal(begun["model"][0].weight, weight) == bool(others)


def test_a_run_is_continued_without_another_calibration(run, own, trained_weights, monkeypatch):
    command = ["finetune", f"{own}:small", "--data", "digits", "--img-size", 8, *FEW, "-o", "out"]
    assert run(*command, "--weights", trained_weights)[0] == 0
    Path("out/summary.json").unlink()
    monkeypatch.setattr("sphereify.training.start.keep_knowledge", pytest.fail)
    code, out, err = run("finetune", "--resume", "out")
    assert (code, err) == (0, "")
    assert "kept" not in out


def test_compare_keeps_what_trained_weights_know(run, own, trained_weights):
    command = ["compare", f"{own}:small", "--data", "digits", "--img-size", 8, *FEW, "-o", "out", "--corruptions"]
    code, out, err = run(*command, "--weights", trained_weights, "--calibration-images", 70)
    assert (code, err) == (0, "")
    assert out.count("kept what was learned, on 64 training images without labels: 2 layers calibrated") == 1
    assert "under corruptions, %" in one_line(out)
    assert (
        one_line(out).count("original, contrast standardised") == 2
    )  # in the table of corruptions, and in the main one


def test_evaluate_under_corruptions_puts_the_original_and_its_rival_beside_the_network(run, own, trained_weights):
    assert run("convert", f"{own}:small", "--weights", trained_weights, "--num-classes", 10, "-o", "mine")[0] == 0
    command = ["evaluate", "mine", "--factory", f"{own}:of_ten_classes", "--data", "digits", "--img-size", 8,
               "--test-images", 20, "--corruptions", "--against", f"{own}:small"]  # fmt: skip
    code, out, err = run(*command, "--against-weights", trained_weights, "-o", "report")
    assert (code, err) == (0, "")
    assert written(Path("report")) == {"evaluation.json", "confusion.png", "robustness.json", "robustness.png"}
    found = json.loads(Path("report/robustness.json").read_text())
    assert list(found["networks"]) == ["mine", "original", "original, contrast standardised"]
    assert found["images"] == 20
    assert "written to report/robustness.json, drawn to report/robustness.png" in out
    table = one_line(out)
    assert "means over five strengths, 20 images; chance is 10.0%" in table
    mean = found["networks"]["original"]["mean"]
    assert f" {100 * mean:.1f} " in table


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--against", TINY], "--against: has no effect without --corruptions"),
        (["--corruptions", "--against-weights", "x.pt"], "--against-weights: has no effect without --against"),
        (["--corruptions", "--against", "own_networks.py:small"], "own_networks.py:small needs --against-weights"),
    ],
)
def test_a_wrong_original_is_wrong_use(refused, artifact, own, given, text):
    refused(["evaluate", artifact, "--data", "digits", *given], 2, text)


def test_an_artifact_may_be_the_original_but_takes_no_other_weights(run, refused, artifact):
    command = ["evaluate", artifact, "--data", "digits", "--corruptions", "--against", artifact]
    refused([*command, "--against-weights", "x.pt"], 2, "--against-weights: does not go with the artifact")
    code, out, _ = run(*command, "--test-images", 3, "--img-size", 24)
    assert code == 0
    assert "original, contrast standardised" in one_line(out)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--lr", "0"], "--lr: got 0.0, expected a number above 0"),
        (["--epochs", "0"], "--epochs: got 0, expected a number of at least 1"),
        (["--img-size", "0"], "--img-size: got 0, expected a number of at least 1"),
        (["--device", "cuda"], "--device: got 'cuda', but torch sees no CUDA device. Leave it out, or take 'cpu'."),
        (["--mhe-s", "2"], "--mhe-s: no effect without --mhe"),
        (["--fsdp", "--amp", "fp16"], "--fsdp: does not go with --amp fp16"),
        (["--train-images", "9999"], "--train-images: got 9999, expected 1 to 1437"),
        (["--augment", "rand-m9"], "--augment: the digits are not photographs"),
        (["--color-jitter", "0.4"], "--color-jitter: the digits are not photographs"),
        (["--color-jitter", "2"], "--color-jitter: got 2.0, expected a number of at least 0 and at most 1"),
        (["--teacher-weights", "nowhere.pt"], "--teacher-weights: belong to a --teacher by name"),
        (["--head", "a-softmax"], "--head: does not go with the artifact"),
    ],
)
def test_a_wrong_option_of_finetune_is_wrong_use(refused, monkeypatch, artifact, given, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(["finetune", artifact, "--data", "digits", *given], 2, text)


@pytest.mark.parametrize("command", ["finetune", "evaluate", "compare"])
def test_without_data_is_wrong_use(refused, command):
    refused(
        [command, TINY], 2, "--data: is missing; digits, a folder with train/ and val/ (or test/), or a data set of"
    )


def test_without_a_model_is_wrong_use(refused):
    refused(["finetune", "--data", "digits"], 2, "MODEL: is missing")


@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_an_unknown_model_is_told_before_the_data_is_read(refused, command):
    refused([command, "resnet81", "--data", "nowhere"], 2, "model 'resnet81': not found")


def test_data_that_does_not_exist_is_a_failure(refused, artifact):
    refused(["finetune", artifact, "--data", "nowhere"], 1, "data 'nowhere': neither 'digits' nor a folder",
            "A folder needs train/ and val/ (or test/) inside")  # fmt: skip


def test_data_without_classes_is_a_failure(refused, artifact):
    Path("empty/train").mkdir(parents=True)
    Path("empty/val").mkdir()
    refused(
        ["finetune", artifact, "--data", "empty"], 1, "empty/train", "Expected one folder a class with images in it"
    )


def test_data_without_a_held_out_part_is_a_failure(refused, artifact, shapes):
    (shapes / "val").rename(shapes / "old")
    refused(["finetune", artifact, "--data", "shapes"], 1, "data 'shapes': expected train/ and val/ (or test/) inside, "
            "found old, train")  # fmt: skip


def test_data_of_other_classes_than_the_model_is_a_failure(refused, artifact, shapes):
    refused(["finetune", artifact, "--data", "shapes", "--img-size", 32, "-o", "out"], 1,
            "the model has 10 classes, shapes has 2: convert it again with --num-classes 2")  # fmt: skip


def test_a_loss_that_is_not_finite_is_a_failure(run, artifact):
    code, out, err = run("finetune", artifact, "--data", "digits", "--lr", "1e20", "--epochs", 1, "-o", "out",
                         "--device", "cpu")  # fmt: skip
    assert (code, out) == (1, "")
    assert re.search(r"^error: the loss is (nan|inf) at step \d+; the first layer with a value that is not finite is "
                     r"\S+ \(its \w+\)\. The checkpoint of step 0 is kept\. "
                     r"Try a smaller --lr, or --clip-grad 1\.$", one_line(err))  # fmt: skip
    assert written(Path("out")) == {"run.json", "checkpoints", "checkpoints/000000000.safetensors"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--teacher", "original"], "--teacher original: it has not been trained; bring its weights with --weights"),
        (["--teacher", "own_networks.py:small"], "--teacher: own_networks.py:small needs --teacher-weights"),
    ],
)
def test_a_teacher_that_knows_nothing_is_refused(refused, own, given, text):
    refused(["finetune", f"{own}:small", "--data", "digits", *given], 2, text)


def test_each_option_of_the_images_is_an_option_of_finetune():
    import typer.main

    from sphereify import cli

    names = {parameter.name for parameter in typer.main.get_command(cli.app).commands["finetune"].params}
    assert set(options_of(DataOptions)) <= names


SMALL = ["--img-size", 8, "--epochs", 1, "--batch-size", 4, "--device", "cpu"]


@pytest.mark.exhaustive
def test_a_run_is_continued_from_another_folder_with_data_that_moved(run, shapes, monkeypatch):
    home = shapes.parent
    assert run("finetune", TINY, "--data", "shapes", *SMALL, "-o", "run")[0] == 0
    (home / "sub").mkdir()
    monkeypatch.chdir(home / "sub")
    for given in ([], ["--data", "../shapes"], ["--data", shapes]):
        assert run("finetune", "--resume", "../run", *given)[::2] == (0, "")
    shapes.rename(home / "moved")
    assert run("finetune", "--resume", "../run", "--data", "../moved")[::2] == (0, "")


# -------------------------------------------------------------------------------------------- weights of other classes


@pytest.fixture
def nine(folder):
    """A checkpoint of nine classes."""
    torch.save(timm.create_model(TINY, num_classes=9).state_dict(), "nine.pth")
    return "nine.pth"


def test_weights_of_other_classes_serve_all_but_the_classifier_and_that_is_said(run, shapes, nine, refused):
    new = "nine.pth is for other classes than 2, so fc.weight, fc.bias are new"
    code, out, _ = run("convert", TINY, "--weights", nine, "--num-classes", 2, "-o", "two")
    assert (code, f"note: {new}" in " ".join(out.split())) == (0, True)
    assert run("finetune", "two", "--data", "shapes", *SMALL, "-o", "a")[0] == 0
    for options, said in (([], "the classifier is new"), (["--no-calibrate"], new)):
        code, out, err = run("finetune", TINY, "--weights", nine, "--data", "shapes", *SMALL, *options, "-o", "b",
                           "--force")  # fmt: skip
        assert (code, err, said in out) == (0, "", True)
    text = "error: the model has 9 classes, shapes has 2: leave out --num-classes, and it is built for those of the"
    refused(["finetune", TINY, "--weights", nine, "--num-classes", 9, "--data", "shapes", *SMALL], 1, text)
    run("convert", TINY, "--weights", nine, "--num-classes", 9, "-o", "all")
    text = "convert it again with --num-classes 2, for which weights of other classes serve as well, all but those"
    refused(["finetune", "all", "--data", "shapes", *SMALL], 1, text)


def test_weights_are_tested_with_the_classes_of_the_data(run, shapes, nine, refused):
    torch.save(timm.create_model(TINY, num_classes=2).state_dict(), "two.pth")
    assert run("evaluate", TINY, "--weights", "two.pth", "--data", "shapes", "--img-size", 8)[0] == 0
    text = "--weights: nine.pth is for other classes than 2, so fc.weight, fc.bias are new; shapes has 2 classes."
    refused(["evaluate", TINY, "--weights", nine, "--data", "shapes", "--img-size", 8], 2, text)


def test_test_images_alone_are_enough_for_evaluate(run, shapes, refused):
    (shapes / "val").rename("only")
    torch.save(timm.create_model(TINY, num_classes=2).state_dict(), "two.pth")
    given = [TINY, "--weights", "two.pth", "--img-size", 8, "--data"]
    code, out, _ = run("evaluate", *given, "only")
    assert (code, "of 6 images" in out) == (0, True)
    refused(["finetune", *given, "only"], 1, "expected train/ and val/ (or test/) inside, found bright, dark")
