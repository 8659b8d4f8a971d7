"""Factories in files: of any name, with neighbours, and in packages."""

import pickle
import sys
from pathlib import Path

import pytest

from sphereify.imports import import_file
from sphereify.sources import build_model, find_model

NET = "def make(num_classes=4):\n    return nn.Linear(3, num_classes)\n"


@pytest.fixture(autouse=True)
def _own_state(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("sphereify.imports._folders", [])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(place: str, text: str) -> Path:
    file = Path(place)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["net.v2.py", "my-net.py", "2nd net.py", "torch.py"])
def test_a_file_of_any_name_is_a_module(name):
    file = write(name, f"from torch import nn\n{NET}class Net(nn.Linear): pass\ndef own(): return Net(2, 2)\n")
    assert build_model(find_model(f"{file}:make", num_classes=5)).out_features == 5
    model = build_model(find_model(f"{file}:own"))
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


@pytest.mark.parametrize("given", ["project/net.py", "./project/../project/net.py", "absolute"])
def test_a_file_imports_its_neighbours_now_and_later(given):
    write("project/parts.py", "from torch import nn\nwidth = 3\n")
    write("project/more/__init__.py", "width = 4\n")
    file = write("project/net.py", f"from parts import nn, width\n{NET}def late():\n"
                 "    from more import width\n    return nn.Linear(width, width)\n")  # fmt: skip
    place = str(file.resolve()) if given == "absolute" else given
    assert build_model(find_model(f"{place}:make")).out_features == 4
    assert build_model(find_model(f"{place}:late")).in_features == 4


def test_each_file_has_its_own_neighbours():
    for folder, width in (("one", 5), ("two", 6)):
        write(f"{folder}/parts.py", f"width = {width}\n")
        write(
            f"{folder}/net.py",
            "from torch import nn\nfrom parts import width\ndef make(): return nn.Linear(2, width)\n",
        )
    assert [build_model(find_model(f"{folder}/net.py:make")).out_features for folder in ("one", "two", "one")] == [
        5,
        6,
        5,
    ]


def test_a_file_in_a_package_imports_relative_to_it():
    write("top/__init__.py", "")
    write("top/inner/__init__.py", "")
    write("top/widths.py", "width = 7\n")
    write("top/inner/parts.py", "height = 2\n")
    file = write("top/inner/net.py", "from torch import nn\nfrom ..widths import width\nfrom .parts import height\n"
                 "import parts\nclass Net(nn.Linear): pass\ndef make(): return Net(height, width)\n")  # fmt: skip
    model = build_model(find_model(f"{file}:make"))
    assert (model.in_features, model.out_features) == (2, 7)
    assert type(model).__module__ == "top.inner.net"
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_a_package_whose_name_is_taken_is_left_alone():
    write("torch/__init__.py", "")
    file = write("torch/net.py", f"from torch import nn\n{NET}")
    assert import_file(file).__name__ == "net"
    assert build_model(find_model(f"{file}:make")).out_features == 4
