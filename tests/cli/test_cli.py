"""The command line: what each option does, what is printed where, and how it fails."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import typer.main
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from sphereify import __version__, cli, load, plan_conversion, save, sphereify
from sphereify.artifact import read_document
from sphereify.datasets import load_data
from sphereify.nn import AngularHead
from sphereify.sources import build_model, find_model
from sphereify.training import Epoch, Result, Settings, Terms, accuracy

ROOT = Path(__file__).parents[1]
PROGRAM = typer.main.get_command(cli.app)
COMMANDS = PROGRAM.commands
TINY = "test_resnet"
FILES = {"model.safetensors", "conversion.json"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every command runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    """A converted network for ten classes of gray images. Look, don't touch."""
    torch.manual_seed(0)
    model = build_model(find_model(TINY, num_classes=10, in_chans=1))
    return save(sphereify(model, skip_shortcuts=True), tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def own() -> str:
    """A module of the user's own."""
    Path("own_networks.py").write_text(
        textwrap.dedent("""
            import torch
            from torch import nn

            def small(num_classes=4, in_chans=3):
                return nn.Sequential(nn.Conv2d(in_chans, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))

            class Attentive(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
                    self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

                def forward(self, x):
                    x = self.embed(x).flatten(2).transpose(1, 2)
                    return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))

            def features():
                return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

            def without_layers():
                return nn.Sequential(nn.ReLU())

            def lazy():
                return nn.Sequential(nn.LazyConv2d(6, 3), nn.ReLU())

            def compiled():
                return torch.compile(small())

            def parallel():
                return nn.DataParallel(small())

            def a_number():
                return 7

            def broken():
                raise ZeroDivisionError("the user's own mistake")
        """)
    )
    return "own_networks.py"


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def one_line(text: str) -> str:
    """Boxes and line breaks of the terminal taken out."""
    return " ".join(re.sub(r"[─│╭╮╰╯┃━]", " ", text).split())


# --------------------------------------------------------------------------------------------------------- the house


def test_the_program_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sphereify", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sphereify {__version__}\n", "")


def test_help_is_there_for_the_program_and_each_command(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert name in out
        code, out_of_command, err = run(name, "--help")
        assert (code, err) == (0, "")
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in out_of_command


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_and_each_option_has_a_help_text(name):
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        if parameter.name != "help":
            assert (getattr(parameter, "help", None) or "").strip(), f"{name}: {parameter.name} has no help text"


def test_each_option_of_the_program_has_a_help_text():
    assert PROGRAM.help
    options = {parameter.name: parameter.help for parameter in PROGRAM.params}
    assert {"version", "debug"} <= options.keys()
    assert all(options.values()), options


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_in_the_readme(name):
    assert f"sphereify {name}" in (ROOT / "README.md").read_text()


def test_each_command_named_in_the_readme_exists():
    named = set(re.findall(r"(?:\$ |`)sphereify ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= set(COMMANDS)


def test_without_a_command_the_help_is_shown(run):
    code, out, err = run()
    assert code == 2
    assert "convert" in out + err


def test_shell_completion_can_be_shown(run, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = run("--show-completion", "bash")
    assert code == 0
    assert "sphereify" in out


# ----------------------------------------------------------------------------------------------------------- convert


def test_the_example_of_the_readme(run, folder):
    code, out, err = run("convert", "resnet18", "--operator", "cosine", "--skip-shortcuts")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[-2] == "17 convolutions converted, 3 shortcuts kept, the head swapped for w-softmax"
    assert lines[-1] == "saved to resnet18-cosine/ (model.safetensors, conversion.json)"
    kept = [line for line in lines if "keep" in line]
    assert [line.split()[1] for line in kept] == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert all("1×1 convolution on a residual shortcut" in line for line in kept)
    assert written(folder) == {"resnet18-cosine", *(f"resnet18-cosine/{name}" for name in FILES)}
    model = load("resnet18-cosine")
    assert isinstance(model.fc, AngularHead)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_the_table_names_every_layer_with_its_reason(run):
    plan = plan_conversion(timm.create_model(TINY), skip_shortcuts=True, exclude="conv1.*", operator="linear")
    _, out, _ = run("inspect", TINY, "--skip-shortcuts", "--exclude", "conv1.*", "--operator", "linear")
    rows = {cells[1]: cells for line in out.splitlines() if len(cells := re.split(r"\s*│\s*", line)) == 8}
    assert rows.keys() == {decision.name for decision in plan.decisions}
    for decision in plan.decisions:
        _, _, kind, action, operator, role, reason, _ = rows[decision.name]
        assert (kind, action, operator, reason) == (
            decision.kind, decision.action, decision.operator or "", decision.reason
        )  # fmt: skip
        assert role == ("" if decision.role == "hidden" else decision.role)
    assert out.splitlines()[-1] == plan.summary()


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
    "rescale": (["--rescale", "always"], {"rescale": "always"}),
    "norm": (["--norm", "replace"], {"norm": "replace"}),
    "eps": (["--eps", "0.01"], {"eps": 0.01}),
    "skip_shortcuts": (["--skip-shortcuts"], {"skip_shortcuts": True}),
    "include": (["--include", "layer1.*"], {"include": "layer1.*"}),
    "include twice": (["--include", "layer1.*", "--include", "re:conv1\\.\\d"],
                      {"include": ["layer1.*", "re:conv1\\.\\d"]}),
    "exclude": (["--exclude", "layer1.*"], {"exclude": "layer1.*"}),
    "exclude twice": (["--exclude", "layer1.*", "--exclude", "fc"], {"exclude": ["layer1.*", "fc"]}),
    "override": (["--override", "layer1.*=keep"], {"overrides": {"layer1.*": "keep"}}),
    "override with settings": (
        ["--override", "layer1.*=operator:sigmoid, k:0.7 ,rescale:always"],
        {"overrides": {"layer1.*": {"operator": "sigmoid", "k": 0.7, "rescale": "always"}}}),
    "override twice, first wins": (
        ["--override", "layer1.0.conv1=operator:linear", "--override", "layer1.*=keep"],
        {"overrides": {"layer1.0.conv1": {"operator": "linear"}, "layer1.*": "keep"}}),
    "override by a pattern with = in it": (
        ["--override", "re:layer1(?=.0).*=keep"], {"overrides": {"re:layer1(?=.0).*": "keep"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_plan() -> str:
    return plan_conversion(timm.create_model(TINY)).to_json()


@pytest.mark.parametrize(("given", "meant"), OPTIONS.values(), ids=OPTIONS)
def test_each_option_has_its_effect_on_the_plan(run, tiny_plan, given, meant):
    code, out, err = run("inspect", TINY, "--json", *given)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(plan_conversion(timm.create_model(TINY), **meant).to_json())
    assert json.loads(out) != json.loads(tiny_plan)


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


def test_verify_says_which_layers_are_called(run):
    Path("partly_used.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    pretrained_cfg = {'input_size': (3, 8, 8)}\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv, self.spare, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        conv = self.spare if x.sum() > 1e9 else self.conv\n"
        "        return self.fc(conv(x).relu().mean((2, 3)))\n"
    )
    code, out, err = run("inspect", "partly_used.py:Net", "--json", "--verify")
    assert (code, err) == (0, "")
    called = {d["name"]: (d["called"], d["action"]) for d in json.loads(out)["decisions"]}
    assert called == {"conv": (True, "convert"), "spare": (False, "keep"), "fc": (True, "convert")}


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_no_option_is_left_out_above(command):
    elsewhere = {"model", "output", "force", "json", "pretrained", "weights", "num_classes", "in_chans", "seed"}
    elsewhere |= {"attention", "verify", "factory", "energy", "energy_plot"}
    elsewhere |= {"calibrate", "calibration_images", "calibrate_steps", "data_root", "img_size"}
    known = {parameter.name for parameter in COMMANDS[command].params} - {"help"} - elsewhere
    tested = {name.split()[0].replace("override", "overrides") for name in OPTIONS}
    assert known - {"override"} | {"overrides"} == tested


def test_energies_are_printed_and_drawn(run):
    code, out, err = run("inspect", TINY, "--energy", "--energy-plot", "energy.png")
    assert (code, err) == (0, "")
    assert "hyperspherical energy (s=1, euclidean)" in out
    assert re.search(r"^fc +\d+ +\d+ +0\.\d{4}", out, re.MULTILINE)
    assert out.endswith("drawn to energy.png\n")
    assert Path("energy.png").stat().st_size > 5000
    code, out, err = run("inspect", TINY, "--energy-plot", "nowhere/energy.png")
    assert code == 2
    assert "nowhere/energy.png: cannot write the picture" in err


def test_an_artifact_is_not_converted_again_by_finetune(run, artifact):
    code, _, err = run("finetune", artifact, "--data", "digits", "--head", "a-softmax", "-o", "out")
    assert code == 2
    assert "--head: does not go with the artifact" in err


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
def test_json_is_all_there_is_on_stdout(run, tiny_plan, command):
    code, out, err = run(command, TINY, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(tiny_plan)
    assert Path("test_resnet-cosine").is_dir() == (command == "convert")


def test_the_seed_is_that_of_the_weights(run):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("convert", TINY, "-o", folder, "--seed", seed)[0] == 0
    a, b, c = (load_file(Path(folder) / "model.safetensors") for folder in "abc")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["conv1.0.weight"], c["conv1.0.weight"])


def test_classes_and_channels_are_the_models(run):
    assert run("convert", TINY, "--num-classes", 7, "--in-chans", 2)[0] == 0
    document = read_document("test_resnet-cosine")
    assert document["source"] == {
        "library": "timm", "name": TINY, "arguments": {"num_classes": 7, "in_chans": 2}
    }  # fmt: skip
    assert load("test_resnet-cosine")(torch.randn(1, 2, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("suffix", "key"), [(".safetensors", None), (".pt", None), (".pth", "state_dict"), (".pt", "model")]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_from_a_file(run, own, suffix, key, prefix):
    torch.manual_seed(9)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Identity(), nn.Flatten(), nn.Linear(6, 4)
    )
    tensors = {prefix + name: tensor for name, tensor in plain.state_dict().items()}
    file = Path("weights" + suffix)
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({key: tensors, "epoch": 3} if key else tensors, file)
    code, _, err = run("convert", f"{own}:small", "--weights", file, "-o", "out")
    assert (code, err) == (0, "")
    saved = load_file(Path("out/model.safetensors"))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)


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
    code, _, err = run("convert", artifact, "-o", "again", "--skip-shortcuts")
    assert (code, err) == (0, "")
    assert load("again").conversion_plan == load(artifact).conversion_plan
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(load("again")(x), load(artifact)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "command", [["inspect"], ["convert", "-o", "again"], ["finetune", "--data", "digits", "--epochs", "1"]]
)
def test_an_artifact_of_ones_own_is_read_with_the_factory_that_made_it(run, own, command):
    assert run("convert", f"{own}:small", "--num-classes", "10", "--in-chans", "1", "-o", "mine")[0] == 0
    Path("plain.py").write_text(f"import {Path(own).stem}\ndef make():\n    return {Path(own).stem}.small(10, 1)\n")
    code, _, err = run(command[0], "mine", *command[1:])
    assert (code, "--factory" in err) == (2, True)
    code, _, err = run(command[0], "mine", *command[1:], "--factory", "plain.py:make")
    assert (code, err) == (0, "")


def test_a_factory_belongs_to_an_artifact(refused):
    refused(
        ["inspect", TINY, "--factory", "plain.py:make"], 2, "--factory: got 'plain.py:make'", "is no saved artifact"
    )


def test_an_artifact_can_be_converted_further(run, artifact):
    code, _, err = run("convert", artifact, "-o", "further", "--operator", "linear")
    assert (code, err) == (0, "")
    operators = {d.name: d.operator for d in load("further").conversion_plan.converted}
    assert operators["layer2.0.downsample.1"] == "linear"
    assert operators["layer2.0.conv1"] == "cosine"
    assert len(operators) == 16


@pytest.mark.parametrize("flag", ["-o", "--output"])
def test_the_output_folder_is_made_with_its_parents(run, flag):
    assert run("convert", TINY, flag, "deep/down/here")[0] == 0
    assert set(written(Path("deep/down/here"))) == FILES


def test_an_empty_folder_is_no_obstacle(run):
    Path("out").mkdir()
    assert run("convert", TINY, "-o", "out")[0] == 0


def test_force_replaces_an_artifact_and_leaves_other_files(run):
    assert run("convert", TINY, "-o", "out")[0] == 0
    Path("out/notes.txt").write_text("mine")
    code, _, err = run("convert", TINY, "-o", "out", "--operator", "linear", "--force")
    assert (code, err) == (0, "")
    assert load("out").conversion_plan.converted[0].operator == "linear"
    assert written(Path("out")) == {*FILES, "notes.txt"}


# ---------------------------------------------------------------------------------------------------------- finetune


def test_finetune_trains_an_artifact_and_saves_it_with_its_accuracy(run, artifact):
    before = (artifact / "model.safetensors").read_bytes()
    code, out, err = run("finetune", artifact, "--data", "digits", "--epochs", 2, "--batch-size", 128, "-o", "trained",
                         "--device", "cpu")  # fmt: skip
    assert (code, err) == (0, "")
    *epochs, last = out.splitlines()
    assert [line.split()[:2] for line in epochs] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all(re.search(r"loss \d+\.\d{4}  test accuracy \d+\.\d{2}%  \d+ images/s$", line) for line in epochs)
    training = read_document("trained/last")["training"]
    assert training["data"] == "digits"
    assert training["classes"] == [str(digit) for digit in range(10)]
    assert training["epochs"] == 2
    assert training["image_size"] == [1, 32, 32]
    best = read_document("trained/best")["training"]
    assert last == (f"test accuracy {training['accuracy']:.2%}, saved to trained/last; best {best['accuracy']:.2%} in "
                    f"epoch {best['epochs']}, saved to trained/best")  # fmt: skip
    assert best["accuracy"] >= training["accuracy"]
    model = load("trained/last")
    test = torch.utils.data.DataLoader(load_data("digits", channels=1).test, 90)
    assert accuracy(model, test) == pytest.approx(training["accuracy"])
    assert model.conversion_plan == load(artifact).conversion_plan
    assert not torch.equal(model.conv1[0].weight, load(artifact).conv1[0].weight)
    assert (artifact / "model.safetensors").read_bytes() == before


@pytest.fixture
def shapes(folder) -> Path:
    """Six small images a class: dark and bright."""
    for part, number in (("train", 6), ("val", 3)):
        for name, value in (("bright", 230), ("dark", 20)):
            (folder / "shapes" / part / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (20, 20), (value, value - i, value)).save(folder / "shapes" / part / name / f"{i}.png")
    return folder / "shapes"


def test_finetune_converts_a_plain_model_for_the_classes_of_the_data(run, shapes):
    code, out, err = run("finetune", TINY, "--data", shapes, "--epochs", 1, "--batch-size", 6, "--img-size", 32,
                         "--device", "cpu")  # fmt: skip
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith("saved to test_resnet-finetuned/best")
    model = load("test_resnet-finetuned/last")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    assert isinstance(model.fc, AngularHead)
    assert read_document("test_resnet-finetuned/last")["training"]["classes"] == ["bright", "dark"]


@pytest.fixture
def sizes(monkeypatch):
    """The data and settings that the loop is called with, in place of training."""
    seen = {}

    def loop(model, data, settings, **others):
        seen.update(model=model, data=data, settings=settings, **others)
        return Result([Epoch(1, 0.5, 0.25), Epoch(2, 0.4, 0.125)], None)

    monkeypatch.setattr("sphereify.training.finetune", loop)
    return seen


TERMS = {
    "label_smoothing": 0.1, "margin_anneal": False, "mhe": 0.5, "mhe_s": 2.0, "mhe_half_space": True,
    "mhe_distance": "angular", "mhe_hidden": 0.5, "mhe_output": 10.0, "orthogonality": 0.01,
}  # fmt: skip
SETTINGS = {
    "epochs": 3, "epoch_batches": 4,
    "batch_size": 5, "lr": 0.25, "opt": "lamb", "sched": "step", "warmup_epochs": 1.5, "min_lr": 1e-5,
    "decay_epochs": 1.5, "milestones": (1, 2), "decay_rate": 0.5,
    "weight_decay": 0.125, "layer_decay": 0.75, "accumulate": 2, "clip_grad": 1.5, "ema": 0.5, "mixup": 0.2,
    "cutmix": 1.0, "amp": "bf16", "channels_last": True, "compile": True, "freeze": ("conv1", "layer1.*"),
    "warmup_head_epochs": 1, "teacher_weight": 0.25, "teacher_temperature": 4.0, "seed": 7, "deterministic": True,
    "workers": 2, "device": "cpu", "strict": True, "checkpoint_minutes": 0.5,
}  # fmt: skip


def words(options: dict) -> list[str]:
    """As on the command line."""
    found = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found += [option if value else f"--no-{option[2:]}"]
        else:
            found += [word for item in (value if isinstance(value, tuple) else [value]) for word in (option, str(item))]
    return found


def test_each_option_of_finetune_reaches_the_loop(run, artifact, sizes):
    given = words(SETTINGS | TERMS)
    code, out, _ = run("finetune", artifact, "--data", "digits", "--img-size", 24, *given, "-o", "out")
    assert code == 0
    assert vars(sizes["settings"]) == {**SETTINGS, "fsdp": False, "terms": Terms(**TERMS)}
    assert SETTINGS.keys() | {"fsdp", "terms"} == vars(Settings()).keys()
    assert TERMS.keys() == vars(Terms()).keys()
    assert not [name for name, value in (SETTINGS | TERMS).items() if name != "device"
                and value in (getattr(Settings(), name, None), getattr(Terms(), name, None))]  # fmt: skip
    assert sizes["data"].image_size == (1, 24, 24)
    assert (sizes["output"], sizes["resume"], sizes["teacher"]) == (Path("out"), False, None)
    assert out == "test accuracy 12.50%, saved to out/last; best 25.00% in epoch 1, saved to out/best\n"


def test_the_seed_of_finetune_is_that_of_the_weights_of_a_plain_model_too(run, sizes, own):
    weights = []
    for seed in (1, 1, 2):
        assert run("finetune", f"{own}:small", "--data", "digits", "--seed", seed, "-o", "out", "--force")[0] == 0
        weights.append(sizes["model"][0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("start", ["artifact", "plain model"])
def test_images_of_a_folder_come_as_the_configuration_of_the_model_says(run, sizes, shapes, folder, start):
    config = timm.create_model(TINY).pretrained_cfg
    if start == "artifact":
        save(sphereify(build_model(find_model(TINY, num_classes=2))), folder / "two")
    code, _, _ = run("finetune", folder / "two" if start == "artifact" else TINY, "--data", shapes, "-o", "out")
    assert code == 0
    data = sizes["data"]
    assert data.image_size == config["input_size"] == (3, 160, 160)
    expected = (torch.tensor([230, 230, 230]) / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(data.test[0][0].mean((1, 2)), expected, atol=0.02, rtol=0)


def test_a_plain_model_for_gray_images_gets_gray_images(run, sizes):
    Path("gray_network.py").write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(6, num_classes))\n"
    )
    code, _, _ = run("finetune", "gray_network.py:small", "--data", "digits", "-o", "out")
    assert code == 0
    assert sizes["data"].image_size[0] == 1


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(run, folder):
    """Run what must fail: the exit code, a message on stderr with each fragment, and not a file more than before."""

    def refused(arguments: list, code: int, *fragments: str) -> str:
        before = written(folder)
        got, out, err = run(*arguments)
        text = one_line(err)
        assert got == code, text
        assert out == ""
        assert "Traceback" not in err
        assert "not foreseen" not in err
        for fragment in fragments:
            assert fragment in text, text
        assert written(folder) == before
        return text

    return refused


WRONG_OPTIONS = {
    "unknown operator": (["--operator", "cosin"], "operator: got 'cosin', expected one of linear, cosine, sigmoid, "
                         "learnable-sigmoid. Did you mean 'cosine'?"),
    "unknown head operator": (["--head-operator", "sin"], "got 'sin', expected one of linear, cosine"),
    "unknown head": (
        ["--head", "softmax"],
        "head: got 'softmax', expected one of auto, keep, w-softmax, ga-softmax, a-softmax, s-softmax",
    ),
    "unknown rescale": (["--rescale", "maybe"], "rescale: got 'maybe', expected one of auto, always, never"),
    "unknown norm": (["--norm", "drop"], "norm: got 'drop', expected one of keep, replace"),
    "unknown attention": (["--attention", "angular"], "attention: got 'angular', expected one of keep, convert"),
    "unknown share": (["--share-k", "model"], "share_k: got 'model', expected one of filter, layer, network"),
    "k of 0": (["--operator", "sigmoid", "--k", "0"], "k: got 0.0, expected a positive finite number"),
    "k below 0": (["--operator", "sigmoid", "--k", "-0.3"], "k: got -0.3, expected a positive finite number"),
    "k not finite": (["--operator", "sigmoid", "--k", "nan"], "k: got nan, expected a positive finite number"),
    "k of a learnable too small": (["--operator", "learnable-sigmoid", "--k", "0.05"], "expected a value above 0.05"),
    "k where there is none": (["--k", "0.3"], "k: got 0.3 for the cosine operator, which has none. Leave k out or"),
    "k not a number": (["--k", "large"], "Invalid value for '--k'"),
    "margin below 1": (["--margin", "0.5"], "margin: got 0.5, expected a number of at least 1"),
    "scale of 0": (["--scale", "0"], "scale: got 0.0, expected a number above 0"),
    "eps of 0": (["--eps", "0"], "eps: got 0.0, expected a number above 0"),
    "include without match": (["--include", "layer9.*"], "include: pattern 'layer9.*' matches no convolution or linear "
                              "layer; names look like layer"),
    "exclude without match": (["--exclude", "layer1"], "exclude: pattern 'layer1' matches no convolution or linear "
                              "layer; did you mean 'layer1.*'?"),
    "override without match": (["--override", "head=keep"], "overrides: pattern 'head' matches no convolution or"),
    "broken expression": (["--include", "re:("], "include: 're:(' is not a regular expression"),
    "override without =": (["--override", "layer1.*"], "--override: got 'layer1.*', expected PATTERN=keep or PATTERN="),
    "override without pattern": (["--override", "=keep"], "--override: got '=keep', expected PATTERN=keep"),
    "override without :": (["--override", "fc=linear"], "--override: got 'linear' in 'fc=linear', expected key:value"),
    "override of unknown key": (["--override", "fc=margin:3"], "got 'margin', expected one of operator, k, rescale"),
    "override of unknown operator": (["--override", "fc=operator:cos"], "got 'cos', expected one of linear, cosine"),
    "override of unknown rescale": (["--override", "fc=rescale:yes"], "got 'yes', expected one of auto, always, never"),
    "override with k of no number": (["--override", "fc=k:big"], "--override: k: got 'big', expected a number"),
    "nothing to convert": (["--exclude", "*"], "nothing to convert: all 16 layers would be kept (16 × excluded by "
                           "pattern). Widen the patterns."),
    "no classes": (["--num-classes", "-1"], "--num-classes: got -1, expected at least 1"),
    "no channels": (["--in-chans", "0"], "--in-chans: got 0, expected at least 1"),
    "two sources of weights": (["--pretrained", "--weights", "w.pt"], "--pretrained and --weights: got both"),
    "unknown option": (["--opertor", "cosine"], "No such option: --opertor"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize(("given", "text"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_a_wrong_option_is_wrong_use(refused, command, given, text):
    refused([command, TINY, *given], 2, text)


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("resnet81", ["model 'resnet81': not found", "did you mean", "resnet18"]),
        ("torchvision:resnet81", ["model 'torchvision:resnet81': not found", "did you mean", "torchvision:resnet18"]),
        ("zzzzqqqq", ["model 'zzzzqqqq': not found", "timm.list_models()", "path/to/file.py:factory"]),
        ("nowhere.py:make", ["model 'nowhere.py:make': there is no file nowhere.py"]),
        ("no_such_module:make", ["model 'no_such_module:make'", "importing no_such_module failed"]),
        ("own_networks.py:smal", ["own_networks.py has no function 'smal'; did you mean own_networks.py:small?"]),
        ("own_networks.py:a_number", ["own_networks.py:a_number: returned int, expected a torch.nn.Module"]),
        ("own_networks.py:without_layers", ["Sequential has no convolution or linear layer", "nothing to convert"]),
        ("own_networks.py:lazy", ["0 (LazyConv2d) is lazy and has no weights yet: run one forward pass"]),
        ("own_networks.py:compiled", ["OptimizedModule (torch.compile): convert the plain model first, then wrap"]),
        ("own_networks.py:parallel", ["DataParallel (torch.nn.parallel): convert the plain model first, then wrap"]),
    ],
)
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_model_that_cannot_be_had_or_converted_is_wrong_use(refused, own, command, spec, texts):
    refused([command, spec], 2, *texts)


def test_the_sentences_about_an_unknown_model_are_sentences(refused):
    for spec in ("zzzzqqqq", "resnet81"):
        assert re.search(r"[.?] Accepted are a timm name", refused(["inspect", spec], 2))


@pytest.mark.parametrize("head", ["w-softmax", "s-softmax"])
def test_a_head_without_a_classifier_is_wrong_use(refused, own, head):
    refused(["convert", f"{own}:features", "--head", head], 2, "no classifier was found", "Take head='keep'")


def test_a_factory_that_takes_no_such_argument_is_wrong_use(refused, own):
    refused(["convert", f"{own}:features", "--num-classes", 3], 2, "features: cannot be built with {'num_classes': 3}")


def test_a_torchvision_model_takes_no_channels(refused):
    refused(["convert", "torchvision:resnet18", "--in-chans", 1], 2, "have no --in-chans; take a timm model for that")


@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_an_output_that_exists_needs_force(refused, command):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    data = ["--data", "digits"] if command == "finetune" else []
    refused(
        [command, TINY, *data, "-o", "out"], 2, "out: exists already; --force replaces the artifact in it, -o names"
    )


@pytest.mark.parametrize("command", ["convert", "finetune"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_that_is_a_file_is_wrong_use(refused, command, force):
    Path("out").write_text("mine")
    data = ["--data", "digits"] if command == "finetune" else []
    refused([command, TINY, *data, "-o", "out", *force], 2, "out: is a file; --output names a folder")
    assert Path("out").read_text() == "mine"


def test_an_output_below_a_file_is_a_failure(refused):
    Path("out").write_text("mine")
    refused(["convert", TINY, "-o", "out/deep"], 1, "out/deep: cannot be written")


@pytest.mark.parametrize("command", ["convert", "inspect"])
@pytest.mark.parametrize(
    "given", [["--pretrained"], ["--weights", "w.pt"], ["--num-classes", "3"], ["--in-chans", "1"]]
)
def test_options_of_a_plain_model_do_not_go_with_an_artifact(refused, artifact, command, given):
    refused([command, artifact, *given], 2, f"{given[0]}: does not go with the saved artifact", "its own weights")


def damaged(artifact: Path, how: str) -> Path:
    folder = Path("damaged")
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((artifact / name).read_bytes())
    tensors, document = folder / "model.safetensors", folder / "conversion.json"
    if how == "empty":
        tensors.unlink()
        document.unlink()
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no document":
        document.unlink()
    elif how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif how == "half":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    elif how == "cut document":
        document.write_text(document.read_text()[:200])
    elif how == "newer":
        document.write_text(json.dumps({**json.loads(document.read_text()), "format_version": 99}))
    elif how == "wrong shape":
        with safe_open(tensors, framework="pt") as file:
            metadata = file.metadata()
        content = load_file(tensors)
        save_file({**content, "fc.weight": torch.zeros(11, 96)}, tensors, metadata)
    return folder


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        (
            "empty",
            ["damaged: there is no conversion.json in it; an artifact is a folder with conversion.json and model"],
        ),
        ("no tensors", ["damaged: there is no model.safetensors in it"]),
        ("no document", ["damaged: there is no conversion.json in it"]),
        ("truncated", ["damaged/model.safetensors: truncated or damaged"]),
        ("half", ["damaged/model.safetensors: truncated or damaged"]),
        ("cut document", ["damaged/conversion.json: damaged, not the JSON of a conversion"]),
        ("newer", ["damaged/conversion.json: format version 99 is newer than 1", "pip install --upgrade sphereify"]),
        ("wrong shape", ["damaged/model.safetensors: tensor fc.weight has shape (11, 96)", "expects (10, 96)"]),
    ],
)
@pytest.mark.parametrize("command", [["convert", "-o", "out"], ["inspect"], ["finetune", "--data", "digits"]])
def test_a_damaged_artifact_is_a_failure(refused, artifact, command, how, texts):
    refused([command[0], damaged(artifact, how), *command[1:]], 1, *texts)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (None, ["w.pt: there is no such file"]),
        (b"no checkpoint", ["w.pt: cannot be read as a checkpoint of tensors"]),
        ({"5.weight": (11, 6)}, ["w.pt: does not fit", "5.weight: (11, 6) in the file, (4, 6) in the model"]),
        ({"5.bias": None}, ["w.pt: does not fit Sequential", "1 missing: 5.bias"]),
        ({"9.weight": (2,)}, ["w.pt: does not fit Sequential", "1 not in the model: 9.weight"]),
        ([1, 2], ["w.pt: holds list, expected a dictionary of tensors"]),
    ],
)
def test_weights_that_do_not_fit_are_a_failure(refused, own, content, texts):
    if isinstance(content, bytes):
        Path("w.pt").write_bytes(content)
    elif isinstance(content, list):
        torch.save(content, "w.pt")
    elif content is not None:
        tensors = build_model(find_model(f"{own}:small")).state_dict()
        tensors.update({name: torch.zeros(shape) for name, shape in content.items() if shape})
        torch.save({name: tensor for name, tensor in tensors.items() if content.get(name, 0) is not None}, "w.pt")
    refused(["convert", f"{own}:small", "--weights", "w.pt"], 1, *texts)


def test_a_torch_file_with_code_in_it_is_not_run(refused, own):
    class Bomb:
        def __reduce__(self):
            return Path("exploded").touch, ()

    torch.save({"5.weight": Bomb()}, "w.pt")
    refused(["convert", f"{own}:small", "--weights", "w.pt"], 1, "w.pt: cannot be read as a checkpoint of tensors")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("spec", [TINY, "torchvision:resnet18"])
def test_pretrained_weights_without_a_network_are_a_failure_with_the_way_around(refused, monkeypatch, spec):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr("torchvision.models.get_model", unreachable)
    place, reason = f"{spec}: its pretrained weights could not be fetched", "Name or service not known"
    remedy = "Download them where there is a network and pass the file with --weights"
    refused(["convert", spec, "--pretrained"], 1, place, reason, remedy)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--lr", "0"], "--lr: got 0.0, expected a number above 0; a usual value is 1e-3"),
        (["--epochs", "0"], "--epochs: got 0, expected at least 1"),
        (["--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["--workers", "-1"], "--workers: got -1, expected at least 0"),
        (["--weight-decay", "-1"], "--weight-decay: got -1.0, expected at least 0"),
        (["--img-size", "0"], "--img-size: got 0, expected at least 1 pixel"),
        (["--device", "gpu"], "--device: got 'gpu'"),
        (["--device", "cuda"], "--device: got 'cuda', but torch sees no CUDA device. Leave it out, or take 'cpu'."),
    ],
)
def test_a_wrong_setting_of_finetune_is_wrong_use(refused, monkeypatch, artifact, given, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(["finetune", artifact, "--data", "digits", *given], 2, text)


def test_finetune_without_data_is_wrong_use(refused):
    refused(["finetune", TINY], 2, "--data: is missing; digits, a folder with train/ and val/ (or test/), or a name of")


def test_an_unknown_model_is_told_before_the_data_is_read(refused):
    refused(["finetune", "resnet81", "--data", "nowhere"], 2, "model 'resnet81': not found")


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


# --------------------------------------------------------------------------------------------- errors nobody foresaw


@pytest.fixture
def accident(monkeypatch):
    def happens(*_, **__):
        raise KeyError("an accident")

    monkeypatch.setattr("sphereify.convert.plan_conversion", happens)


def test_what_was_not_foreseen_is_one_line_and_a_hint(run, accident):
    code, out, err = run("inspect", TINY)
    assert (code, out) == (1, "")
    assert err == "error: KeyError: 'an accident'\nThis was not foreseen; --debug shows the traceback.\n"


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(run, accident, where):
    arguments = ["--debug", "inspect", TINY] if where == "before" else ["inspect", TINY, "--debug"]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("KeyError: 'an accident'\n")


def test_debug_keeps_the_exit_code_of_wrong_use():
    arguments = ["--debug", "inspect", TINY, "--override", "no equals sign"]
    done = subprocess.run([sys.executable, "-m", "sphereify", *arguments], capture_output=True, text=True)
    assert "Traceback (most recent call last)" in done.stderr
    assert "--override: got 'no equals sign'" in done.stderr
    assert done.returncode == 2


def test_an_interrupt_is_no_error(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sphereify.convert.plan_conversion", interrupt)
    code, out, err = run("inspect", TINY)
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_a_mistake_in_the_users_own_factory_is_told(run, own):
    code, out, err = run("inspect", f"{own}:broken")
    assert (code, out) == (1, "")
    assert "ZeroDivisionError: the user's own mistake" in err  # an ArithmeticError, but not the one about the loss
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------ teachers, evaluation


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            ["--teacher", "original"],
            "--teacher original: it has not been trained; bring its weights with --weights FILE",
        ),
        (["--teacher-weights", "nowhere.pt"], "--teacher-weights: belong to a --teacher by name"),
        (["--teacher", "own_networks.py:small"], "--teacher: own_networks.py:small needs --teacher-weights"),
        (["--warmup-epochs", 5, "--epochs", 1], "--warmup-epochs: got 5.0, more than the 1 --epochs there are"),
    ],
)
def test_a_teacher_that_knows_nothing_is_refused(refused, own, given, text):
    refused(["finetune", f"{own}:small", "--data", "digits", *given], 2, text)


def test_the_original_teaches_with_the_weights_it_was_given(run, sizes, own):
    sys.path.insert(0, "")
    import own_networks

    saved = own_networks.small(10, 3)
    torch.save(saved.state_dict(), "mine.pt")
    code, _, err = run("finetune", f"{own}:small", "--data", "digits", "--weights", "mine.pt", "--teacher", "original",
                       "-o", "out")  # fmt: skip
    assert (code, err) == (0, "")
    assert torch.equal(sizes["teacher"][0].weight, saved[0].weight)


def test_evaluate_takes_the_size_that_the_network_was_trained_at(run, own):
    assert run("finetune", f"{own}:small", "--data", "digits", "--img-size", 16, "--epochs", 1, "-o", "out")[0] == 0
    answers = [run("evaluate", "out/last", "--data", "digits", *given)[1].split(" of ")[0]
               for given in ([], ["--img-size", 16])]  # fmt: skip
    assert answers[0] == answers[1]


def test_evaluate_on_other_classes_is_a_failure(run, shapes):
    assert (
        run("finetune", TINY, "--data", shapes, "--epochs", 1, "--batch-size", 6, "--img-size", 32, "-o", "out")[0] == 0
    )
    for part in ("train", "val"):
        (shapes / part / "bright").rename(shapes / part / "light")
    code, out, err = run("evaluate", "out/last", "--data", shapes)
    assert (code, out) == (1, "")
    assert "was trained on other classes than" in one_line(err)
    assert "bright, light" in one_line(err)


def test_an_evaluation_is_written_as_plain_json(run, artifact):
    assert run("evaluate", artifact, "--data", "digits", "--test-images", 5, "--img-size", 24, "-o", "report")[0] == 0
    numbers = json.loads(Path("report/evaluation.json").read_text(), parse_constant=pytest.fail)
    assert None in numbers["per_class"]
    assert numbers["images"] == 5
    assert Path("report/confusion.png").is_file()


def test_a_new_run_by_force_leaves_nothing_of_the_old_one(run, own):
    begin = ["finetune", f"{own}:small", "--data", "digits", "--img-size", 8, "--epochs", 1, "-o", "out"]
    assert run(*begin)[0] == 0
    assert Path("out/summary.json").is_file()
    assert run(*begin, "--force", "--lr", "1e30")[0] == 1
    assert not {"summary.json", "metrics.csv", "curves.png", "last"} & {path.name for path in Path("out").iterdir()}


# --------------------------------------------------------------------------------------------------------- calibration


def test_convert_calibrates_and_prints_how_well_each_layer_did(run, own):
    code, out, err = run("convert", f"{own}:small", "--calibrate", "digits", "--calibration-images", 100,
                         "--calibrate-steps", 2, "-o", "calibrated")  # fmt: skip
    assert code == 0, err
    assert "2 layers calibrated" in out
    assert "the outputs' error fell from" in out
    plain = build_model(find_model(f"{own}:small"))
    calibrated = load("calibrated", factory=lambda: build_model(find_model(f"{own}:small")))
    assert not torch.equal(calibrated[0].weight, plain[0].weight)


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
    ("options", "told"),
    [
        (["--calibration-images", "5"], "--calibration-images: has no effect without --calibrate"),
        (["--calibrate-steps", "5"], "--calibrate-steps: has no effect without --calibrate"),
        (["--calibrate", ""], "empty name"),
        (["--calibrate", "digits", "--img-size", "0"], "--img-size: got 0"),
        (["--calibrate", "digits", "--calibrate-steps", "-1"], "--calibrate-steps: got -1"),
        (["--calibrate", "digits", "--calibration-images", "0"], "--calibration-images: got 0"),
        (["--calibrate", "digits", "--data-root", "x"], "--data-root: has no effect on 'digits'"),
        (["--calibrate", "nowhere"], "neither 'digits' nor a folder"),
    ],
)
def test_wrong_words_about_a_calibration_are_told_and_nothing_is_written(run, own, options, told):
    code, _, err = run("convert", f"{own}:small", *options, "-o", "out")
    assert code in (1, 2)
    assert told in err
    assert "not foreseen" not in err
    assert not Path("out").exists()


def test_an_artifact_is_not_calibrated_against_itself(run, artifact):
    code, _, err = run("convert", artifact, "--calibrate", "digits", "-o", "out")
    assert code == 2
    assert "converted already" in err
