"""Fixtures of the command line's tests. Each runs in an empty folder of its own."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from sphereify import save, sphereify
from sphereify.sources import build_model, find_model
from tests.cli.words import TINY, one_line, written


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which sentences in cells stay on one line; test_width.py looks at 80 columns."""
    monkeypatch.setenv("COLUMNS", "140")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file in place of a run's curves, which take longer to draw than a small run."""
    monkeypatch.setattr("sphereify.plots.plot_run", lambda rows, path: Path(path).touch())


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
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

            def gray(num_classes):
                return small(num_classes, 1)

            def of_two_classes():
                return small(2)

            def of_ten_classes():
                return small(10)

            class Attentive(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
                    self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

                def forward(self, x):
                    x = self.embed(x).flatten(2).transpose(1, 2)
                    return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))

            class Partly(nn.Module):
                pretrained_cfg = {"input_size": (3, 8, 8)}

                def __init__(self):
                    super().__init__()
                    self.conv, self.spare, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

                def forward(self, x):
                    conv = self.spare if x.sum() > 1e9 else self.conv
                    return self.fc(conv(x).relu().mean((2, 3)))

            def in_brackets():
                model = small()
                model.add_module("[bold]tail[/]", nn.Linear(4, 4))
                return model

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


@pytest.fixture
def shapes(folder: Path) -> Path:
    """Images of two classes, dark and bright: six of each to train on, three to test on."""
    for part, number in (("train", 6), ("val", 3)):
        for name, value in (("bright", 230), ("dark", 20)):
            (folder / "shapes" / part / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (20, 20), (value, value - i, value)).save(folder / "shapes" / part / name / f"{i}.png")
    return folder / "shapes"


@pytest.fixture
def refused(run: Callable, folder: Path) -> Callable:
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
