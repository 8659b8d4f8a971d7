"""--verification and --hold-out-classes: from training to the files, and how they fail."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sphereify import save, sphereify
from sphereify.artifact import read_document
from sphereify.class_splits import targets_of
from sphereify.datasets import load_data
from sphereify.sources import build_model, find_model
from sphereify.training.verification import verification
from tests.cli.words import TINY, one_line

QUICK = ["--img-size", 8, "--epochs", 1, "--batch-size", 64, "--device", "cpu"]


@pytest.fixture
def faces(folder: Path) -> Path:
    """Three people of four pictures each, in shades of their own."""
    for value, name in enumerate(("ann", "bob", "cem")):
        (folder / "faces" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (12, 12), (80 * value, 20 * i, 255 - 80 * value)).save(
                folder / "faces" / name / f"{i}.png"
            )
    return folder / "faces"


@pytest.fixture
def pairs(folder: Path, faces: Path) -> Path:
    (folder / "pairs.csv").write_text(
        "first,second,same\nann/0.png,ann/1.png,1\nann/0.png,bob/0.png,0\ncem/1.png,bob/3.png,0\n"
    )
    return folder / "pairs.csv"


@pytest.fixture
def trained_on(artifact: Path, folder: Path):
    """A network of five classes of digits whose record says so."""

    def make(classes: str, held_out: str = "") -> Path:
        torch.manual_seed(0)
        model = sphereify(build_model(find_model(TINY, num_classes=len(classes), in_chans=1)))
        record = {"classes": list(classes), "image_size": [1, 8, 8], "held_out_classes": list(held_out)}
        return save(model, folder / "trained", training=record)

    return make


def test_classes_left_out_of_training_are_recorded_and_verified(run, own):
    code, out, err = run("finetune", f"{own}:gray", "--data", "digits", "--hold-out-classes", 4, *QUICK, "-o", "run")
    assert (code, err) == (0, "")
    assert out.startswith("left out of training: 6, 7, 8, 9\nepoch")
    record = read_document("run/last")["training"]
    assert (record["classes"], record["held_out_classes"]) == (list("012345"), list("6789"))
    assert record["data"] == "digits without 4 classes"
    assert json.loads(Path("run/run.json").read_text())["hold_out_classes"] == 4

    command = ["evaluate", "run/last", "--factory", f"{own}:gray", "--data", "digits", "--device", "cpu"]
    code, out, err = run(*command, "--verification", "-o", "report")
    assert (code, err) == (0, "")
    found = json.loads(Path("report/verification.json").read_text())
    assert f"of 4 identities; {found['pairs']['same']:,} pairs of one identity" in out
    assert f"{100 * found['eer']:.2f}" in out
    assert f"{100 * found['tar']['0.01']:.2f}" in out
    assert out.endswith("identities: 6, 7, 8, 9\n"
                        "written to report/verification.json, drawn to report/verification.png\n")  # fmt: skip
    assert found["images"] == 714
    assert Path("report/verification.png").stat().st_size > 10_000
    assert run(*command, "--verification", "--hold-out-classes", 4)[1] == out.partition("written")[0]

    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.endswith("without the classes that are held out: 6, 7, 8, 9\n")
    assert f"of {record_images(record)} images" in out


def record_images(record: dict) -> int:
    """Test images of digits in the classes that a record names."""
    return sum(str(target) in record["classes"] for target in targets_of(load_data("digits", channels=1).test))


def test_a_seed_chooses_the_classes_and_a_run_goes_on_with_them(run, own):
    command = ["finetune", f"{own}:gray", "--data", "digits", "--hold-out-classes", 4, "--hold-out-seed", 3, *QUICK]
    code, out, _ = run(*command, "-o", "run")
    first = out.splitlines()[0]
    assert (code, first) != (0, "left out of training: 6, 7, 8, 9")
    assert run("finetune", "--resume", "run")[0] == 0
    code, _, err = run("finetune", "--resume", "run", "--hold-out-seed", 4)
    assert (code, "--hold-out-seed: 3 before, 4 now" in err) == (2, True)


def test_a_folder_of_identities_is_verified_as_a_whole(run, faces, own):
    code, out, err = run("evaluate", f"{own}:small", "--data", faces, "--verification", "--img-size", 8,
                         "--neighbours", 3, "--max-pairs", 40, "-o", "report")  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(Path("report/verification.json").read_text())
    assert (found["images"], found["identities"], found["neighbours"]) == (12, 3, 3)
    assert found["pairs"] == {"same": 8, "different": 32, "chosen_of": 66}
    assert "needs 100 pairs of different identities, there are 32" in out
    assert "12 images of 3 identities; 8 pairs of one identity, 32 of two, chosen of 66" in out
    assert "identities: ann, bob, cem" in out


def test_a_list_of_pairs_is_verified(run, faces, pairs, own):
    code, out, err = run("evaluate", f"{own}:small", "--data", faces, "--verification", "--img-size", 8,
                         "--pairs", pairs, "-o", "report")  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(Path("report/verification.json").read_text())
    assert (found["images"], found["identities"], found["neighbour_accuracy"]) == (5, None, None)
    assert found["pairs"] == {"same": 1, "different": 2, "chosen_of": 3}
    assert "identities:" not in out


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_weights_of_any_number_of_classes_serve(run, faces, own, classes):
    torch.manual_seed(classes)
    trained = build_model(find_model(f"{own}:small", num_classes=classes))
    save_file(trained.state_dict(), "weights.safetensors")
    code, _, err = run("evaluate", f"{own}:small", "--weights", "weights.safetensors", "--data", faces,
                         "--verification", "--img-size", 8, "-o", "report")  # fmt: skip
    assert (code, err) == (0, "")
    data = load_data(str(faces), img_size=8, test_only=True)
    assert json.loads(Path("report/verification.json").read_text())["eer"] == verification(trained, data).eer


def test_identities_of_the_training_are_noted(run, trained_on):
    code, out, _ = run("evaluate", trained_on("01234567", "8x"), "--data", "digits", "--verification",
                       "--test-images", 50)  # fmt: skip
    assert code == 0
    assert "of 10 identities" in out
    assert "note: the model was trained on 8 of the 10 identities" in out


def test_the_record_decides_which_classes_are_held_out(run, trained_on):
    code, out, _ = run("evaluate", trained_on("01236789", "45"), "--data", "digits", "--verification")
    assert (code, "identities: 4, 5" in out, "note" in out) == (0, True, False)


def test_classes_of_the_training_cannot_be_held_out_afterwards(refused, trained_on):
    model = trained_on("01234567", "89")
    message = "--hold-out-classes: leaves out 7, 8, 9, but the model was trained on 7. Its training left out 8, 9."
    refused(["evaluate", model, "--data", "digits", "--verification", "--hold-out-classes", 3], 1, message)
    refused(["finetune", model, "--data", "digits", "--hold-out-classes", 3, "-o", "run"], 1, message)
    other = trained_on("0123456789")
    refused(
        ["evaluate", other, "--data", "digits", "--verification", "--hold-out-classes", 2], 1, "left out no classes"
    )


def test_training_a_network_further_on_all_classes_says_which_were_left_out(run, trained_on):
    code, _, err = run("finetune", trained_on("01234567", "89"), "--data", "digits", "-o", "run")
    assert code == 1
    assert "the model has 8 classes, digits has 10: its training left out 8, 9; leave out the same" in one_line(err)
    assert not Path("run").exists()
    code, _, err = run("evaluate", trained_on("01234567", "89"), "--data", "digits", "--hold-out-classes", 3)
    assert (code, "its training left out 8, 9; leave out the same" in one_line(err)) == (1, True)


WRONG = {
    "too many classes": (["finetune", TINY, "--hold-out-classes", 9], 2,
                         "--hold-out-classes: got 9, expected 2 to 8, which leaves two or more of the 10"),
    "too many to compare": (["compare", TINY, "--hold-out-classes", 10], 2, "--hold-out-classes: got 10, expected 2"),
    "one class": (["finetune", TINY, "--hold-out-classes", 1], 2, "--hold-out-classes: got 1, expected a number of at"),
    "a seed alone": (["finetune", TINY, "--hold-out-seed", 1], 2, "has no effect without --hold-out-classes"),
    "pairs alone": (["evaluate", TINY, "--pairs", "p.csv"], 2, "--pairs: has no effect without --verification"),
    "a layer alone": (["evaluate", TINY, "--embedding-layer", "fc"], 2, "has no effect without --verification"),
    "corruptions as well": (["evaluate", TINY, "--verification", "--corruptions"], 2,
                            "--verification and --corruptions: got both"),
    "pairs of digits": (["evaluate", TINY, "--verification", "--pairs", "p.csv"], 2,
                        "--pairs: needs a folder as --data, got 'digits'"),
    "no layer": (["evaluate", TINY, "--in-chans", 1, "--verification", "--embedding-layer", "body"], 2,
                 "--embedding-layer: the model has no layer 'body'"),
    "no neighbours": (["evaluate", TINY, "--verification", "--neighbours", 0], 2, "--neighbours: got 0, expected"),
    "one pair": (["evaluate", TINY, "--verification", "--max-pairs", 1], 2, "--max-pairs: got 1, expected"),
    "a comparison without classes": (["compare", TINY, "--verification"], 2,
                                     "--verification: needs --hold-out-classes, the classes to verify on"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "code", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_clear_error(refused, words, code, message):
    refused([*words, "--data", "digits"], code, message)


def test_wrong_lists_and_folders_are_one_clear_error(refused, faces, pairs, own, folder):
    command = ["evaluate", f"{own}:small", "--verification", "--img-size", 8, "--data"]
    (folder / "alone" / "ann").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (9, 9)).save(folder / "alone" / "ann" / f"{i}.png")
    refused([*command, folder / "alone"], 1, "--verification:", "has images of one identity only")
    refused([*command, faces, "--pairs", folder / "none.csv"], 1, "--pairs:", "none.csv cannot be read")
    refused([*command, faces, "--pairs", pairs, "--test-images", 3], 2, "--test-images: does not go with --pairs")
    refused([*command, faces, "--hold-out-classes", 2], 2, "--hold-out-classes: got 2, expected data of at least four "
            "classes, of which two stay; there are 3")  # fmt: skip
    Path(pairs).write_text("ann/0.png,ann/9.png,1\nann/0.png,dan/0.png,0\n")
    refused([*command, faces, "--pairs", pairs], 1, "names images that are not in", "ann/9.png, dan/0.png")
    Path(pairs).write_text("ann/0.png,ann/1.png,1\n")
    refused([*command, faces, "--pairs", pairs], 1, "has images of one identity only, or none; pairs of different")
    refused(["evaluate", f"{own}:features", *command[2:], faces], 2, "has no classifier", "--embedding-layer")


def test_listed_pairs_must_be_of_the_classes_that_are_held_out(refused, run, own, faces, folder):
    for name in ("dan", "eva"):
        (faces / name).mkdir()
        Image.new("RGB", (9, 9)).save(faces / name / "0.png")
    (folder / "pairs.csv").write_text("eva/0.png,dan/0.png,0\neva/0.png,eva/0.png,1\n")
    command = ["evaluate", f"{own}:small", "--verification", "--img-size", 8, "--data", faces, "--pairs", "pairs.csv"]
    assert run(*command, "--hold-out-classes", 2)[0] == 0
    (folder / "pairs.csv").write_text("eva/0.png,ann/0.png,0\neva/0.png,eva/0.png,1\n")
    refused([*command, "--hold-out-classes", 2], 1, "--pairs:", "names images of ann, but "
            "--hold-out-classes leaves out dan, eva only")  # fmt: skip


def test_an_image_that_cannot_be_read_is_counted(run, faces, own):
    (faces / "ann" / "2.png").write_bytes(b"no picture")
    code, out, _ = run("evaluate", f"{own}:small", "--data", faces, "--verification", "--img-size", 8)
    assert code == 0
    assert "11 images (1 could not be read) of 3 identities" in out
    code, _, err = run("evaluate", f"{own}:small", "--data", faces, "--verification", "--img-size", 8, "--strict")
    assert (code, "2.png: cannot be read" in one_line(err)) == (1, True)


@pytest.mark.exhaustive
def test_a_comparison_tells_how_its_networks_verify(run, own):
    code, out, err = run("compare", f"{own}:gray", "--data", "digits", "--hold-out-classes", 5, *QUICK,
                         "--verification", "--seeds", 2, "-o", "all")  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(Path("all/comparison.json").read_text())["verification"]
    assert [list(seed) for seed in found] == [["original", "cosine"]] * 2
    assert "equal error rate, %" in one_line(out)
    table = Path("all/comparison.md").read_text()
    mean = sum(seed["cosine"]["eer"] for seed in found) / 2
    assert f"{100 * mean:.2f} ±" in table.splitlines()[3]
    assert "true accepts at FAR 0.01, %" in table.splitlines()[0]
