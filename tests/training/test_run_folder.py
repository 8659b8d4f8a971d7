"""The folder of a run: what lies in it, and whether it is free."""

import pytest

from sphereify.errors import ArtifactError, UsageError
from sphereify.training import RunFolder, finetune
from sphereify.training.comparison import default_comparison_folder
from sphereify.training.run_folder import default_run_folder
from tests.training.small import dropout_net, images, linear_net, net, usual


def test_a_folder_has_room_for_one_run(tmp_path):
    finetune(dropout_net(), images(), usual(epochs=2), output=tmp_path)
    with pytest.raises(UsageError, match="holds a run already; resume it, remove its checkpoints/, or name another"):
        finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path)


def test_a_cleared_folder_is_free_and_keeps_what_is_not_of_a_run(tmp_path):
    for model in (net(), linear_net()):
        finetune(model, images(), usual(epochs=1), output=tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        folder = RunFolder(tmp_path)
        assert folder.summary.exists()
        folder.clear()
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
        folder.check_free()


@pytest.mark.usefixtures("pictures")
def test_the_files_of_a_run_have_the_names_that_its_folder_lists(tmp_path):
    finetune(net(), images(), usual(epochs=1), output=tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    named = {path.name for path in vars(RunFolder(tmp_path)).values()}
    assert {path.name for path in tmp_path.iterdir()} <= named


OPTIONS = {"model": "net", "lr": 0.1, "workers": 0, "device": "cpu", "milestones": [1, 2]}


@pytest.mark.parametrize("given", [{}, {"workers": 3, "device": "cuda"}, {"lr": 0.1, "milestones": [1, 2]}])
def test_a_run_is_resumed_with_its_own_options_and_new_ones_that_change_no_result(tmp_path, given):
    folder = RunFolder(tmp_path / "run")
    folder.write_options(OPTIONS)
    assert folder.read_options() == OPTIONS
    assert folder.options_to_resume(given) == {**OPTIONS, **given}


def test_an_option_that_changes_the_result_is_refused_with_both_values(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_options(OPTIONS)
    text = r"cannot be continued otherwise than it began: lr: 0\.1 before, 0\.2 now; mhe: None before, 1\.0 now$"
    with pytest.raises(UsageError, match=text):
        folder.options_to_resume({"workers": 1, "lr": 0.2, "mhe": 1.0})


def test_a_run_with_an_option_that_there_is_no_more_is_not_continued_without_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_options({**OPTIONS, "override": ["fc=keep"]})
    with pytest.raises(ArtifactError, match=r"run\.json: holds override, which this version does not have; continue"):
        folder.options_to_resume({}, OPTIONS)
    assert folder.options_to_resume({}, [*OPTIONS, "override"])["override"] == ["fc=keep"]


def test_a_folder_without_options_or_with_damaged_ones_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"resume: .* is not the folder of a run, there is no run.json in it"):
        RunFolder(tmp_path).read_options()
    (tmp_path / "run.json").write_text('{"epochs": ')
    with pytest.raises(ArtifactError, match=r"run\.json: cannot be read"):
        RunFolder(tmp_path).options_to_resume({})


@pytest.mark.parametrize(
    ("model", "name"), [("resnet18", "resnet18"), ("own.py:small", "small"), ("a/b/artifact", "artifact")]
)
def test_a_folder_is_named_after_the_model(model, name):
    assert str(default_run_folder(model)) == f"{name}-finetuned"
    assert str(default_comparison_folder(model)) == f"{name}-compared"
