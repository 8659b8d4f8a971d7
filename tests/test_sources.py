"""Models by name, and weights from files."""

import pickle
import re
import sys
import textwrap

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from sphereify.errors import ArtifactError, UsageError
from sphereify.sources import Source, build_model, find_model, load_weights, recognise
from tests.convert.models import Mlp

# -------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("spec", "given", "cls", "sizes"),
    [
        ("resnet18", {}, timm.models.ResNet, (3, 1000)),
        ("resnet18", {"num_classes": 7, "in_chans": 1}, timm.models.ResNet, (1, 7)),
        ("resnet18.a1_in1k", {"num_classes": 2}, timm.models.ResNet, (3, 2)),
        ("torchvision:resnet18", {}, torchvision.models.ResNet, (3, 1000)),
        ("torchvision:resnet18", {"num_classes": 4}, torchvision.models.ResNet, (3, 4)),
    ],
)
def test_a_model_is_found_and_built_by_name_and_remembers_its_source(spec, given, cls, sizes):
    source = find_model(spec, **given)
    model = build_model(source)
    assert type(model) is cls
    assert (model.conv1.in_channels, model.fc.out_features) == sizes
    assert recognise(model)[0] == source
    assert str(source) == spec
    assert Source(**source.to_json()) == source


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("resnet81", "resnet18"),
        ("mobilnetv3_small_100", "mobilenetv3_small_100"),
        ("torchvision:resnet81", "torchvision:resnet18"),
        ("torchvision:vgg_11", "torchvision:vgg11"),
    ],
)
def test_an_unknown_model_is_answered_with_near_names(spec, near):
    with pytest.raises(UsageError, match=rf"model '{spec}': not found; did you mean .*{near}") as caught:
        find_model(spec)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("spec", ["qqqqqqqqqqqqqqqq", "", "torchvision:"])
def test_a_name_that_is_near_to_nothing_says_what_is_accepted(spec):
    with pytest.raises(UsageError, match=r"not found.*torchvision:NAME, package\.module:factory"):
        find_model(spec)


@pytest.mark.parametrize(("option", "text"), [("num_classes", "num_classes: got 0"), ("in_chans", "in_chans: got 0")])
def test_sizes_below_one_are_refused(option, text):
    with pytest.raises(UsageError, match=f"{text}, expected a number of at least 1"):
        find_model("resnet18", **{option: 0})


def test_torchvision_has_no_input_channels_to_choose():
    with pytest.raises(UsageError, match=r"torchvision:resnet18: .*no in_chans; take a timm model"):
        find_model("torchvision:resnet18", in_chans=1)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50"])
def test_builders_of_torchvision_that_warn_or_download_are_built_quietly(name):
    with torch.device("meta"):
        assert isinstance(build_model(find_model(f"torchvision:{name}")), nn.Module)


# ------------------------------------------------------------------------------------------------------- the user's own


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A file of the user's with factories; its modules are forgotten afterwards."""
    known = set(sys.modules)
    path = tmp_path / "own_nets.py"
    path.write_text(
        textwrap.dedent("""
        from torch import nn

        class Net(nn.Linear):
            pass

        def small(num_classes=3, in_chans=2):
            return Net(in_chans, num_classes)

        def fixed():
            return Net(2, 2)

        def nothing():
            return None
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    for name in set(sys.modules) - known:
        if name.startswith(("own_", "broken")):
            del sys.modules[name]


@pytest.mark.parametrize("by", ["path", "absolute path", "module"])
def test_a_factory_of_the_users_own_is_called_with_what_was_given(own_file, by):
    place = {"path": "own_nets.py", "absolute path": str(own_file), "module": "own_nets"}[by]
    model = build_model(find_model(f"{place}:small", num_classes=5))
    assert (model.in_features, model.out_features) == (2, 5)
    assert recognise(model) == [Source("factory", f"{place}:small", {"num_classes": 5})]


def test_a_class_serves_as_a_factory():
    assert type(build_model(find_model("tests.convert.models:Mlp"))) is Mlp


def test_a_missing_function_is_answered_with_the_nearest(own_file):
    with pytest.raises(UsageError, match=r"own_nets\.py has no function 'smal'; did you mean own_nets\.py:small\?"):
        find_model("own_nets.py:smal")


def test_a_missing_function_near_to_nothing_is_named(own_file):
    with pytest.raises(UsageError, match=r"own_nets has no function 'qqqq'$"):
        find_model("own_nets:qqqq")


def test_a_missing_file_is_named(own_file):
    with pytest.raises(UsageError, match=r"there is no file other\.py"):
        find_model("other.py:small")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("import not_installed_anywhere", "ModuleNotFoundError: .*not_installed_anywhere"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("place", ["broken.py", "broken"])
def test_a_module_that_fails_on_import_is_named_with_its_error(own_file, content, text, place):
    own_file.with_name("broken.py").write_text(content)
    with pytest.raises(UsageError, match=f"importing {re.escape(place)} failed: {text}"):
        find_model(f"{place}:make")


def test_a_module_that_does_not_exist_is_named(own_file):
    with pytest.raises(UsageError, match="importing own_missing failed: ModuleNotFoundError"):
        find_model("own_missing:make")


# Pickle, dataclasses and torch.fx look a class's module up in sys.modules.
def test_two_files_of_one_name_are_two_modules(own_file):
    other = own_file.parent / "elsewhere" / "own_nets.py"
    other.parent.mkdir()
    other.write_text(own_file.read_text().replace("Net(2, 2)", "Net(9, 9)"))
    assert build_model(find_model(f"{own_file}:fixed")).in_features == 2
    second = build_model(find_model(f"{other}:fixed"))
    assert second.in_features == 9
    assert type(pickle.loads(pickle.dumps(second))) is type(second)


def test_a_factory_that_does_not_take_an_argument_is_named_with_it(own_file):
    with pytest.raises(UsageError, match=r"own_nets\.py:fixed: cannot be built with \{'num_classes': 5\}"):
        build_model(find_model("own_nets.py:fixed", num_classes=5))


def test_a_factory_that_returns_no_module_is_named(own_file):
    with pytest.raises(UsageError, match=r"own_nets\.py:nothing: returned NoneType, expected a torch\.nn\.Module"):
        build_model(find_model("own_nets.py:nothing"))


# -------------------------------------------------------------------------------------------------------------- weights


def trained(seed=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def write(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def assert_filled(path, expected):
    model = trained(seed=6)
    load_weights(model, path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_come_from_any_checkpoint_with_any_usual_prefix(tmp_path, suffix, prefix):
    model = trained()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert_filled(write(tmp_path / f"weights{suffix}", state), model)


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "model"])
def test_weights_are_found_under_the_usual_keys(tmp_path, key):
    model = trained()
    checkpoint = {"epoch": 3, "arch": "resnet", key: model.state_dict()}
    assert_filled(write(tmp_path / "weights.pth", checkpoint), model)


def test_the_averaged_weights_are_taken_where_there_are_both(tmp_path):
    raw, averaged = trained(1), trained(2)
    checkpoint = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}
    assert_filled(write(tmp_path / "weights.pth", checkpoint), averaged)


def test_a_prefix_inside_a_key_is_looked_through(tmp_path):
    model = trained()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert_filled(write(tmp_path / "weights.pth", {"state_dict": state}), model)


def test_a_model_whose_own_names_begin_like_a_prefix_is_filled(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(3, 2)})
    path = write(tmp_path / "weights.pt", model.state_dict())
    other = nn.ModuleDict({"module": nn.Linear(3, 2)})
    load_weights(other, path)
    torch.testing.assert_close(other["module"].weight, model["module"].weight, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: s.update({"0.weight": torch.zeros(4, 9)}),
            r"1 of another shape: 0\.weight: \(4, 9\) in the file, \(4, 3\) in the model",
        ),
        (lambda s: s.pop("2.bias"), r"1 missing: 2\.bias"),
        (lambda s: s.update(ghost=torch.zeros(1)), r"1 not in the model: ghost"),
        (lambda s: s.clear(), r"9 missing: 0\.weight; 0\.bias; .*…"),
    ],
    ids=["shape", "missing", "unknown", "empty"],
)
def test_weights_that_do_not_fit_are_named_with_their_shapes_and_nothing_is_filled(tmp_path, suffix, change, text):
    state = dict(trained().state_dict())
    change(state)
    path = write(tmp_path / f"weights{suffix}", state)
    model = trained(seed=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=f"does not fit Sequential: {text}") as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_missing_weight_file_is_named(tmp_path, suffix):
    with pytest.raises(ArtifactError, match="there is no such file"):
        load_weights(trained(), tmp_path / f"none{suffix}")


# An empty .pt file makes torch raise an error without a text.
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"garbage, not tensors", bytes(range(256)) * 8])
def test_a_garbage_file_is_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read as a checkpoint of tensors") as caught:
        load_weights(trained(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"weights{suffix}", trained().state_dict())
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ArtifactError, match="cannot be read as a checkpoint of tensors"):
        load_weights(trained(), path)


RAN = []


class Trap:
    """Runs code of its own when it is unpickled without care."""

    def __reduce__(self):
        return RAN.append, (1,)


def test_a_pickled_object_is_refused_and_its_code_does_not_run(tmp_path):
    path = write(tmp_path / "weights.pt", {"0.weight": Trap()})
    with pytest.raises(ArtifactError, match="cannot be read as a checkpoint of tensors"):
        load_weights(trained(), path)
    assert RAN == []


def test_a_whole_pickled_model_is_refused(tmp_path):
    path = write(tmp_path / "weights.pt", trained())
    with pytest.raises(ArtifactError, match="cannot be read as a checkpoint of tensors"):
        load_weights(trained(), path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"0.weight": "text"}, {"epoch": 3}], ids=str)
def test_a_file_without_a_dictionary_of_tensors_is_refused(tmp_path, content):
    path = write(tmp_path / "weights.pt", content)
    with pytest.raises(ArtifactError, match="expected a dictionary of tensors"):
        load_weights(trained(), path)


def test_an_output_layer_of_other_classes_stays_as_the_model_has_it(tmp_path):
    def net(classes: int, width: int = 6) -> nn.Module:
        return nn.Sequential(nn.Linear(5, width), nn.Linear(width, classes))

    other, file = net(4), tmp_path / "four.pt"
    torch.save(other.state_dict(), file)
    model = net(7)
    own = model[1].weight.clone()
    assert load_weights(model, file, classes=7) == ["1.weight", "1.bias"]
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[1].weight, own)
    assert load_weights(net(4), file, classes=4) == []
    for model, classes in ((net(7), None), (net(7), 8), (net(7, width=8), 7)):
        with pytest.raises(ArtifactError, match="of another shape"):
            load_weights(model, file, classes=classes)
