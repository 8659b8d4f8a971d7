"""Checkpoints on disk: whole or not at all, and what a damaged one says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sphereify.errors import ArtifactError
from sphereify.training import finetune
from sphereify.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from tests.training.small import (
    dropout_net,
    images,
    same,
    state,
    usual,
)


def values() -> dict:
    return {"a": [1, (2.5, None, "x")], "b": {3: torch.arange(4.0), "t": torch.ones(2, 2, dtype=torch.int64)}}


def test_a_checkpoint_comes_back_as_it_was_given(tmp_path):
    back = read_checkpoint(write_checkpoint(tmp_path, 7, values()))
    assert back["a"] == [1, (2.5, None, "x")]
    assert list(back["b"]) == [3, "t"]
    torch.testing.assert_close(back["b"], values()["b"], rtol=0, atol=0)


def test_a_dtype_in_the_state_of_an_optimizer_is_kept(tmp_path):
    write_checkpoint(tmp_path, 1, {"kind": torch.bfloat16})
    assert read_checkpoint(checkpoints(tmp_path)[0]) == {"kind": torch.bfloat16}


@pytest.mark.parametrize("keep", [0, 8, 100, -1])
def test_a_damaged_checkpoint_is_told(tmp_path, keep):
    finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path)
    last = checkpoints(tmp_path / "checkpoints")[-1]
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=rf"{last.name}: cannot be read as a checkpoint \("):
        finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path, resume=True)


def test_a_damaged_checkpoint_names_the_older_one(tmp_path):
    finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path)
    checkpoints(tmp_path / "checkpoints")[-1].write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"cannot be read as a checkpoint .* Remove it to go on from step 5"):
        finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path, resume=True)


def read_step(text: str) -> int:
    return dict(map(tuple, json.loads(text)["dict"]))["step"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        pytest.param(SafetensorError("No space left on device"), marks=pytest.mark.exhaustive),
    ],
)
def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path, monkeypatch, error):
    def full(tensors, path, metadata=None) -> None:
        if read_step(metadata["state"]) >= 4:
            Path(path).write_bytes(b"half of it")
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr("sphereify.training.checkpoint.save_file", full)
    with pytest.raises(
        ArtifactError,
        match=r"000000004.safetensors: cannot be written \(.*No space left on device\). "
        r"Earlier checkpoints are kept\.",
    ):
        finetune(dropout_net(), images(), usual(), output=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000000002.safetensors",
        "000000003.safetensors",
    ]
    monkeypatch.undo()
    model, continued = dropout_net(), dropout_net(99)
    finetune(model, images(), usual())
    finetune(continued, images(), usual(), output=tmp_path, resume=True)
    assert same(state(model), state(continued))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    write_checkpoint(tmp_path, 1, values())
    (tmp_path / ".000000002.partial").write_bytes(b"half of it")
    assert [path.name for path in checkpoints(tmp_path)] == ["000000001.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["000000001.safetensors"]


def test_two_checkpoints_are_kept(tmp_path):
    seen = []

    def look(_) -> None:
        seen.append([int(path.stem) for path in checkpoints(tmp_path / "checkpoints")])

    finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path, on_step=look)
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
