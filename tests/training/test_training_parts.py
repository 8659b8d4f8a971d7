"""What a training run checks, keeps and says beside its loss: weights, data, folders, teachers, comparisons."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sphereify.convert.model_inputs import data_config
from sphereify.datasets import Data, load_data
from sphereify.errors import ArtifactError, DataError, TrainingError, UsageError
from sphereify.training import Settings, Variant, accuracy, compare, evaluate, finetune, train_once, trained
from sphereify.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from sphereify.training.objective import Objective
from sphereify.training.terms import Terms
from tests.training.test_resume import net, usual
from tests.training.test_run import images, state


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


class Unsteady(nn.Module):
    """Its loss is finite, and the gradient of one of its weights is not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.root = nn.Linear(72, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.fc(x.flatten(1)) + self.root.sqrt()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(TrainingError, match=r"fc\.weight|root: a value is not finite after step 1\. The checkpoint of "
                       r"step 0 is kept"):  # fmt: skip
        finetune(Unsteady(), images(24), Settings(epochs=1, batch_size=24, device="cpu"), output=tmp_path)
    (kept,) = checkpoints(tmp_path / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(kept)["model"].values())
    assert not (tmp_path / "last.safetensors").exists()


def test_a_folder_has_room_for_one_run(tmp_path):
    finetune(net(), images(), usual(epochs=2), output=tmp_path)
    with pytest.raises(UsageError, match="holds a run already; resume it, remove its checkpoints/, or name another"):
        finetune(net(), images(), usual(epochs=1), output=tmp_path)


def test_what_is_frozen_is_frozen_for_one_run():
    model = net()
    finetune(model, images(), usual(epochs=1, freeze="0"))
    before = state(model)
    finetune(model, images(), usual(epochs=1))
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_one_pattern_or_a_list_is_as_good_as_a_tuple():
    assert Settings(freeze="a", milestones=3) == Settings(freeze=["a"], milestones=[3])


def test_the_margin_comes_in_by_steps_and_not_by_batches(tmp_path):
    finetune(net(head="a-softmax"), images(24), usual(epochs=1, accumulate=3), output=tmp_path)
    last = read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert (last["step"], int(last["objective"]["loss.annealing.calls"])) == (2, 6)
    model = net(head="a-softmax")
    assert Objective(model, Terms(), accumulate=3).loss.annealing.every == 3


def test_without_new_parameters_all_train_from_the_beginning():
    model = plain()
    before = state(model)
    finetune(model, images(), usual(epochs=1, warmup_head_epochs=1))
    assert not torch.equal(model[1].weight, before["1.weight"])


def test_a_teacher_of_other_classes_is_told():
    with pytest.raises(DataError, match="the teacher has 2 classes, patterns has 3"):
        finetune(net(), images(), usual(), teacher=nn.Sequential(nn.Flatten(), nn.Linear(72, 2)))


def test_a_damaged_checkpoint_names_the_older_one(tmp_path):
    finetune(net(), images(), usual(epochs=1), output=tmp_path)
    checkpoints(tmp_path / "checkpoints")[-1].write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"cannot be read as a checkpoint .* Remove it to go on from step 5"):
        finetune(net(), images(), usual(epochs=1), output=tmp_path, resume=True)


def test_a_run_can_be_continued_from_its_very_beginning(tmp_path):
    class Killed(Exception):
        pass

    def kill(_) -> None:
        raise Killed

    settings = usual(epochs=1, checkpoint_minutes=60)
    with pytest.raises(Killed):
        finetune(net(), images(), settings, output=tmp_path, on_step=kill)
    model, continued = net(), net(99)
    finetune(model, images(), settings)
    finetune(continued, images(), settings, output=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(continued).values(), strict=True))


def test_a_dtype_in_the_state_of_an_optimizer_is_kept(tmp_path):
    write_checkpoint(tmp_path, 1, {"kind": torch.bfloat16})
    assert read_checkpoint(checkpoints(tmp_path)[0]) == {"kind": torch.bfloat16}


# --------------------------------------------------------------------------------------------------------------- data


class Unreadable(Dataset):
    """Some of its images are no images."""

    def __init__(self, part: TensorDataset, bad: set[int]):
        self.part, self.bad = part, bad

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int):
        if index in self.bad:
            raise OSError("broken data stream")
        return self.part[index]


def with_bad(train: set[int] = frozenset(), test: set[int] = frozenset()) -> Data:
    data = images(24)
    return Data(data.name, Unreadable(data.train, train), Unreadable(data.test, test), data.classes, data.image_size)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_counted_or_end_the_run_in_one_line(workers):
    result = finetune(net(), with_bad({1, 5}, {2}), usual(epochs=1, workers=workers))
    assert result.epochs[0].skipped == 3
    with pytest.raises(DataError) as caught:
        finetune(net(), with_bad({1, 5}), usual(epochs=1, workers=workers, strict=True))
    assert str(caught.value) in ("image 1: OSError: broken data stream", "image 5: OSError: broken data stream")


@pytest.mark.parametrize(
    ("part", "text"), [("train", "not one training image"), ("test", "not one of its test images")]
)
def test_a_part_without_a_readable_image_is_an_error(part, text):
    with pytest.raises(DataError, match=text):
        finetune(net(), with_bad(**{part: set(range(24))}), usual(epochs=1))
    if part == "test":
        with pytest.raises(DataError, match=text):
            evaluate(net(), with_bad(test=set(range(12))), Settings(device="cpu"))


def test_one_class_is_nothing_to_learn():
    with pytest.raises(DataError, match="has one class only, class 0"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(72, 1)), images(classes=1), usual())


def test_mixing_needs_two_images():
    with pytest.raises(UsageError, match="need pairs of images; take --batch-size 2 or more"):
        finetune(net(), images(), usual(mixup=0.2, batch_size=1))


def folder_of(root: Path, picture: Image.Image, name: str = "0.png") -> Path:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            picture.save(root / part / label / name)
    return root


def test_images_of_sixteen_bits_keep_their_contrast(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    data = load_data(str(folder_of(tmp_path, Image.fromarray(ramp))), img_size=64)
    image = data.test[0][0]
    assert (image.min(), image.max()) == (pytest.approx(-1, abs=0.02), pytest.approx(1, abs=0.02))
    assert image.std() > 0.5


def test_an_image_with_a_broken_chunk_is_left_out(tmp_path):
    folder = folder_of(tmp_path, Image.new("RGB", (32, 32), "red"))
    whole = (folder / "train" / "a" / "0.png").read_bytes()
    (folder / "train" / "a" / "1.png").write_bytes(whole.replace(b"IDAT", b"\0DAT"))
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        load_data(str(folder), img_size=32).train[1]


def test_test_images_are_prepared_as_the_model_wants_them(tmp_path):
    folder = str(
        folder_of(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)))
    )
    model = timm.create_model("test_vit")
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    found = load_data(folder, config=data_config(model)).test
    with Image.open(found.samples[0][0]) as picture:
        torch.testing.assert_close(found[0][0], expected(picture.convert("RGB")), rtol=0, atol=0)


def test_torchvision_models_want_the_images_of_imagenet():
    config = data_config(torchvision.models.resnet18())
    assert (config["mean"], config["std"]) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)


# --------------------------------------------------------------------------------------------------------- comparisons


def both(**options) -> list[Variant]:
    return [Variant("plain", None), Variant("cosine", options)]


def test_each_seed_begins_with_weights_of_its_own(tmp_path):
    compare(plain, images(), both(), usual(epochs=1, lr=1e-12), output=tmp_path, seeds=2)
    first, second = (load_file(tmp_path / f"plain-seed{i}" / "last.safetensors") for i in (0, 1))
    assert (first["1.weight"] - second["1.weight"]).abs().max() > 0.01


def test_runs_of_something_else_are_not_taken_for_finished(tmp_path):
    def compared(build=plain, data=None, **settings):
        return compare(build, data or images(), both(), usual(epochs=1, **settings), output=tmp_path)

    before = compared()
    assert compared(workers=1).markdown() == before.markdown()
    with pytest.raises(UsageError, match="holds a run with another model; take another --output"):
        compared(build=lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3, bias=False)))
    with pytest.raises(UsageError, match="holds a run with another lr;"):
        compared(lr=0.5)
    others = Data("others", images().train, images().test, images().classes, images().image_size)
    with pytest.raises(UsageError, match="holds a run with another data;"):
        compared(data=others)


@pytest.mark.parametrize("variant", both())
def test_a_variant_is_trained_once_and_found_again(tmp_path, variant):
    heard = []
    data, settings = images(), usual(epochs=2)
    results = [train_once(plain, data, variant, settings, output=tmp_path / "run", on_step=heard.append)
               for _ in range(2)]  # fmt: skip
    assert [len(result.epochs) for result in results] == [2, 2]
    assert results[0].accuracy == results[1].accuracy
    assert len(heard) == heard[-1].steps  # of the first time only
    shutil.rmtree(tmp_path / "run" / "best", ignore_errors=True)  # it is the last one that counts
    (tmp_path / "run" / "best.safetensors").unlink(missing_ok=True)
    model = trained(plain, variant, tmp_path / "run")
    assert accuracy(model, DataLoader(data.test, 5)) == results[0].accuracy
    assert hasattr(model, "conversion_plan") == (variant.options is not None)


@pytest.mark.parametrize(
    ("variants", "settings", "reach", "text"),
    [
        (both(operator="cosin"), {}, None, "operator: got 'cosin'"),
        (both(head="a-softmax"), {"mixup": 0.2}, None, "--mixup, --cutmix: the head is a-softmax"),
        (both(), {}, 95, "--reach: got 95, expected an accuracy above 0 and at most 1"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_is_trained(tmp_path, variants, settings, reach, text):
    with pytest.raises(UsageError, match=text):
        compare(plain, images(), variants, usual(epochs=1, **settings), output=tmp_path, reach=reach)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_table_of_a_comparison_is_what_the_runs_gave(tmp_path):
    found = compare(plain, images(), both(), usual(epochs=2), output=tmp_path, seeds=2)
    written = json.loads((tmp_path / "comparison.json").read_text())
    for runs in found.runs:
        accuracies = [run[-1]["accuracy"] for run in written["runs"][runs.name]]
        assert runs.mean == pytest.approx(sum(accuracies) / 2)
        assert runs.deviation == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert found.columns() == ["", "test accuracy, %", f"steps to {found.reach:.1%}", "images/s", "ratio"]
    assert (tmp_path / "comparison.md").read_text() == found.markdown()
