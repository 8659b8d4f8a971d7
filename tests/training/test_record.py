"""The record of a run: what it writes is read back as what the run gave."""

import json

from sphereify.options import from_json
from sphereify.training import RunFolder, finetune
from sphereify.training.record import read_result
from sphereify.training.results import Summary
from tests.training.small import images, net, usual


def test_the_files_of_a_run_are_read_back_as_its_result(tmp_path):
    folder = RunFolder(tmp_path)
    result = finetune(net(learn_radius=True, radius=1.0), images(), usual(epochs=2, milestones=(1,)), output=tmp_path)
    assert read_result(folder) == result
    summary = from_json(Summary, json.loads(folder.summary.read_text()))
    assert (summary.data, summary.epochs, summary.accuracy) == ("patterns", 2, result.accuracy)
    assert (summary.best_epoch, summary.best_accuracy) == (result.best.number, result.best.accuracy)
    speeds = [epoch.images_per_second for epoch in result.epochs]
    assert min(speeds) <= summary.images_per_second <= max(speeds)
    assert (summary.settings.lr, summary.settings.milestones) == (0.01, (1,))


def test_the_result_of_another_machine_is_read(tmp_path):
    folder = RunFolder(tmp_path)
    result = finetune(net(), images(), usual(epochs=1), output=tmp_path)
    summary = json.loads(folder.summary.read_text())
    summary["settings"] |= {"device": "cuda:7", "of_another_version": 1}
    folder.summary.write_text(json.dumps(summary))
    assert read_result(folder) == result
