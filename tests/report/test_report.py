"""The report: whole and by itself, each layer once, the numbers of its sources, and names as they are."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from sphereify import apply_plan, calibrate, load, plan_conversion, save
from sphereify.convert.costs import multiplications
from sphereify.convert.multiplied import Costs
from sphereify.errors import ArgumentTypeError, ArtifactError, PlanMismatchError, UsageError
from sphereify.nn import HypersphericalEnergy
from sphereify.report import measure_angles, write_report
from sphereify.report.wording import percent
from tests.report.pages import read, references


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.shortcut = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(6, 8, 1)

    def forward(self, x):
        return self.norm(self.conv(x)).relu() + self.shortcut(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3), Block()
        self.up, self.fc = nn.ConvTranspose2d(8, 8, 2), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.up(self.block(self.stem(x))).mean((2, 3)))


OPTIONS = {"skip_shortcuts": True, "radius": 1.5}
ROBUSTNESS = {
    "images": 40,
    "skipped": 0,
    "chance": 0.25,
    "networks": {
        name: {"clean": 0.9, "corrupted": {"fog": shares}, "means": {"fog": sum(shares) / 5}, "mean": sum(shares) / 5}
        for name, shares in {"net": [0.8, 0.7, 0.6, 0.5, 0.4], "original": [0.6, 0.5, 0.4, 0.3, 0.2]}.items()
    },
}
EPOCHS = [{"number": n, "loss": 1.0 / n, "accuracy": 0.5 + 0.1 * n, "lr": 1e-3} for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def networks():
    """The original, its calibrated conversion, the calibration, and the inputs. Look, don't touch."""
    torch.manual_seed(0)
    original = Net().eval()
    inputs = torch.randn(6, 3, 9, 9)
    model = apply_plan(original, plan_conversion(original, example_inputs=inputs[:2], **OPTIONS))
    return original, model, calibrate(model, original, [inputs]), inputs


@pytest.fixture(scope="module")
def everything(networks, tmp_path_factory):
    """A report with all of its parts."""
    original, model, calibration, inputs = networks
    return write_report(
        model,
        tmp_path_factory.mktemp("report") / "all.html",
        original=original,
        inputs=inputs,
        inputs_described="some inputs",
        calibration=calibration,
        robustness=ROBUSTNESS,
        epochs=EPOCHS,
        facts={"test accuracy": "80.00 %"},
        options=OPTIONS,
        name="net",
    )


def layers_of(page):
    """The titles of the blocks of the strip, in order."""
    (strip,) = page.all("div", "strip")
    return [block.attributes["title"] for block in strip.all("i", "layer")]


def test_the_page_is_well_formed_and_asks_for_nothing_else(everything):
    page = read(everything)
    assert references(page, everything.read_text(encoding="utf-8")) == []
    identifiers = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(identifiers) == len(set(identifiers))
    links = [link.attributes["href"][1:] for link in page.all("a")]
    assert links
    assert set(links) <= set(identifiers)
    assert [title.text for title in page.all("title")] == ["net: sphereify report"]
    pictures = [*page.all("svg"), *page.all("div", "strip")]
    assert all(picture.attributes["role"] == "img" and picture.attributes["aria-label"] for picture in pictures)


def test_each_layer_of_the_plan_is_in_the_strip_once_and_in_order(everything, networks):
    plan = networks[1].conversion_plan
    assert [title.split(" · ")[0] for title in layers_of(read(everything))] == [d.name for d in plan.decisions]


def test_the_classes_of_the_strip_say_what_happened(everything):
    (strip,) = read(everything).all("div", "strip")
    found = {block.attributes["title"].split(" · ")[0]: block.classes[1] for block in strip.all("i", "layer")}
    assert found == {
        "stem": "cosine",
        "block.conv": "cosine",
        "block.shortcut": "shortcut",
        "up": "other",
        "fc": "head",
    }


def test_widths_grow_with_the_costs(everything, networks):
    (strip,) = read(everything).all("div", "strip")
    widths = {
        block.attributes["title"].split(" · ")[0]: float(block.attributes["style"].removeprefix("flex-grow:"))
        for block in strip.all("i", "layer")
    }
    costs = multiplications(networks[1])
    assert sorted(widths, key=widths.get) == sorted(costs, key=costs.get)
    spread = {name: width - 1 for name, width in widths.items()}  # a least width is added
    ratio = spread["stem"] / spread["block.conv"]
    assert ratio == pytest.approx(costs["stem"] / costs["block.conv"], rel=0.01)


def test_the_numbers_are_those_of_the_plan(everything, networks):
    original, model, calibration, _ = networks
    page = read(everything)
    (cards,) = page.all("dl", "cards")
    shown = {card.all("dt")[0].text: card.all("dd")[0].text for card in cards.children}
    assert shown["angular layers"] == "3of 5"
    assert shown["kept layers"] == "2"
    assert shown["multiplications that are angular"].startswith(percent(model.conversion_plan.angular_share))
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in original.parameters())
    assert f"{more:+,} by the conversion" in shown["parameters"]
    assert shown["pooled radius ρ"] == "1.5"
    assert shown["test accuracy"] == "80.00 %"
    worst = calibration.worst()[0]
    lead = page.all("p", "lead")[0].text
    assert lead.startswith("3 of 5 layers are angular")
    assert worst.name in lead


def test_the_fits_are_those_of_the_calibration(everything, networks):
    calibration = networks[2]

    def shown(value):
        return "< 0" if value < 0 else f"{value:.3f}"

    rows = read(everything).part("fit").rows()
    expected = [
        [fit.name, "" if fit.name == "fc" else "1.5", shown(fit.after), "", shown(fit.before), f"{fit.rows:,}"]
        for fit in calibration.layers.values()
    ]
    assert [row[:6] for row in rows] == expected
    worst = [item.all("code")[0].text for item in read(everything).part("resist").all("ol")[0].all("li")]
    assert worst == [fit.name for fit in calibration.worst()]


def test_an_artifact_tells_of_its_calibration_in_later_reports(networks, tmp_path):
    _, model, calibration, inputs = networks
    save(model, tmp_path / "net")
    loaded = load(tmp_path / "net", factory=Net)
    rows = read(write_report(loaded, tmp_path / "later.html", inputs=inputs)).part("fit").rows()
    assert [(row[0], row[2], row[5]) for row in rows] == [
        (fit.name, "< 0" if fit.after < 0 else f"{fit.after:.3f}", "") for fit in calibration.layers.values()
    ]


def test_every_layer_has_its_shape_cost_and_reason(everything, networks):
    plan = networks[1].conversion_plan
    rows = {row[0]: row for row in read(everything).part("layers").rows()}
    assert list(rows) == [decision.name for decision in plan.decisions]
    for decision in plan.decisions:
        row = rows[decision.name]
        assert row[3] == "×".join(map(str, decision.shape))
        assert row[6] == percent(plan.costs.sites[decision.name] / plan.costs.total)
        assert row[7] == decision.reason


def test_the_reasons_are_counted(everything, networks):
    plan = networks[1].conversion_plan
    groups = read(everything).part("reasons").all("details")
    counts = Counter({names.text: int(group.all("strong")[0].text) for group in groups for names in group.all("p")})
    assert sum(counts.values()) == len(plan.decisions)
    assert all(len(names.split(", ")) == number for names, number in counts.items())


def test_robustness_training_and_energies_are_told_in_tables(everything, networks):
    page = read(everything)
    assert page.part("robustness").rows() == [["net", "90.0", "60.0", "60.0"], ["original", "90.0", "40.0", "40.0"]]
    assert [row[2] for row in page.part("training").rows()] == ["60.00", "70.00", "80.00"]
    energies = HypersphericalEnergy().report(networks[1]).layers
    assert [row[3] for row in page.part("energy").rows()] == [f"{row.energy:.4f}" for row in energies]


def test_names_are_shown_as_they_are(tmp_path):
    name = """<img src=x onerror=alert(1)>&"'"""
    plain = nn.Sequential()
    for key, layer in {
        name: nn.Conv2d(3, 4, 3),
        "</i>": nn.ReLU(),
        "flat": nn.Flatten(),
        "fc": nn.Linear(16, 3),
    }.items():
        plain.add_module(key, layer)
    plan = plan_conversion(plain, example_inputs=torch.zeros(1, 3, 4, 4))
    options = {"exclude": "</code><b>", "</script><script>": 1}
    file = write_report(
        plan, tmp_path / "r.html", original=plain, inputs=torch.randn(2, 3, 4, 4), name=name, options=options
    )
    page = read(file)
    assert not page.all("img")
    assert len(page.all("script")) == 1
    assert page.all("h1")[0].text == name
    assert layers_of(page)[0].startswith(f"{name} · ")
    assert page.part("layers").rows()[0][0] == name
    assert "exclude='</code><b>'" in [code.text for code in page.all("code")]


def test_a_plan_without_a_network_and_one_that_was_not_run(tmp_path, networks):
    plan = networks[1].conversion_plan
    page = read(write_report(plan, tmp_path / "plan.html"))
    assert len(layers_of(page)) == 5
    keys = {element.attributes["id"] for element in page.all("section") if "id" in element.attributes}
    assert keys == {"resist", "numbers", "reasons", "layers", "notes"}
    bare = read(write_report(replace(plan, costs=Costs(), inputs="", notes=[]), tmp_path / "bare.html"))
    assert "the multiplications are not known" in bare.all("p", "caption")[0].text
    assert "multiplications that are angular" not in bare.part("numbers").text
    widths = {block.attributes["style"] for block in bare.all("i", "layer")}
    assert widths == {"flex-grow:1.00"}


def test_a_model_that_does_not_run_has_a_report_that_says_so(tmp_path):
    class Broken(Net):
        def forward(self, x):
            raise RuntimeError("needs a <moon>")

    plain = Broken()
    page = read(write_report(plan_conversion(plain), tmp_path / "r.html", original=plain))
    assert "needs a <moon>" in page.part("angles").text
    assert len(layers_of(page)) == 5


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, networks):
    original, model, _, _ = networks
    plan = model.conversion_plan
    with pytest.raises(UsageError, match=r"report: got '.*picture.png', expected a file with the suffix .html"):
        write_report(plan, tmp_path / "picture.png")
    with pytest.raises(UsageError, match="Net was not converted: give what sphereify"):
        write_report(original, tmp_path / "r.html")
    with pytest.raises(ArgumentTypeError, match="write_report: got str, expected a converted model or a Conv"):
        write_report("net", tmp_path / "r.html")
    with pytest.raises(PlanMismatchError, match="stem: the plan for"):
        write_report(model, tmp_path / "r.html", original=nn.Linear(3, 3))
    (tmp_path / "a-file").touch()
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_report(plan, tmp_path / "a-file" / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_a_report_that_is_there_is_replaced_as_a_whole(tmp_path, networks, monkeypatch):
    plan = networks[1].conversion_plan
    file = tmp_path / "r.html"
    file.write_text("before")
    monkeypatch.setattr("sphereify.report.page._made", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(plan, file)
    assert file.read_text() == "before"
    monkeypatch.undo()
    write_report(plan, file)
    assert re.match("<!DOCTYPE html>", file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_neither_network_is_changed(networks, tmp_path):
    original, model, _, inputs = networks
    states = [{k: v.clone() for k, v in network.state_dict().items()} for network in (original, model)]
    hooks = [sum(len(m._forward_pre_hooks) for m in network.modules()) for network in (original, model)]
    model.train()
    measure_angles(model, original, inputs)
    assert model.training
    model.eval()
    for network, state, number in zip((original, model), states, hooks, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert sum(len(m._forward_pre_hooks) for m in network.modules()) == number
