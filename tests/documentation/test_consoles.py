"""The consoles of README.md and docs/ print what is written there; README's Python runs."""

import contextlib
import io
from pathlib import Path

import pytest

from documentation.consoles import ROOT, Block, blocks, commands, difference, outputs, pages, refreshed, same, write

# ----------------------------------------------------------------------------------------------------- the check itself


def block(*lines: str) -> Block:
    return Block(ROOT / "README.md", "console", 0, lines)


def test_a_console_is_commands_and_their_outputs():
    first, second = commands(block("$ a --long \\", "      --longer", "one", "  …", "$ b", "two"))
    assert first.script == "a --long \\\n      --longer"
    assert (first.printed, second.typed, second.printed) == (("one", "  …"), ("b",), ("two",))
    with pytest.raises(ValueError, match=r"README.md:1: a console begins with"):
        commands(block("no command"))


def test_lines_may_be_left_out_only_where_the_page_says_so():
    now = ["title", "one", "two", "three", "saved"]
    assert not difference(["title", "…", "saved"], now)
    assert not difference(["…", "two", "  …"], now)
    assert difference(["title", "one", "saved"], now)
    assert difference(["title", "…", "two"], now)
    assert difference(["…", "three", "two", "…"], now)
    assert not difference([], now)


@pytest.mark.parametrize(
    ("printed", "now", "is_same"),
    [
        ("17 convolutions converted", "18 convolutions converted", False),
        ("R² 0.95 on average", "R² 0.93 on average", True),
        ("R² 0.95 on average", "R² 0.80 on average", False),
        ("top-1 99.17%, 2415 images/s", "top-1 97.10%, 600 images/s", True),
        ("top-1 99.17%", "top-1 91.10%", False),
        ("│ conv1   │ 0.513 │", "│ conv1 │ 0.52 │", True),
        ("│ conv1   │ 0.513 │", "│ conv2   │ 0.513 │", False),
        ("┏━━━┳━━┓", "┏━━━━━┳━━┓", True),
        ("largest difference 4.7e-07", "largest difference 9.0e-07", True),
    ],
)
def test_only_numbers_that_depend_on_the_machine_may_differ(printed, now, is_same):
    assert same(printed, now) is is_same


def test_rows_of_a_table_may_come_in_another_order():
    printed = ["┡━━━━╇━━━━━━┩", "│ b  │ 0.957 │", "│ a  │ 0.958 │", "└────┴──────┘", "x", "y"]
    now = ["┡━━━━╇━━━━━━┩", "│ a  │ 0.959 │", "│ b  │ 0.959 │", "└────┴──────┘"]
    assert not difference(printed, [*now, "x", "y"])
    assert difference(printed, [*now, "y", "x"])
    assert difference(printed, [now[0], now[1], now[1], *now[3:], "x", "y"])


def test_an_output_is_refreshed_with_as_much_left_out(tmp_path):
    now = ["title", "a 1", "b 2", "c 3", "d 4", "end", "saved"]
    assert refreshed(("title", "  …", "c 9", "  …", "saved"), now) == ["title", "  …", "c 3", "  …", "saved"]
    assert refreshed(("…", "old", "older"), now) == ["…", "end", "saved"]
    assert refreshed(("old",), now) == now
    assert refreshed((), now) == []


def test_refreshing_changes_the_outputs_of_a_page_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```console\n$ echo 1\n?\n$ echo 2\n```\n\n```sh\n$ echo 3\n```\n\n```console\n$ true\n```\n"
    )
    (tmp_path / "work").mkdir()
    write(page, list(outputs(page, tmp_path / "work")))
    assert page.read_text().startswith("# Page\n\n```console\n$ echo 1\n1\n$ echo 2\n```\n\n```sh\n$ echo 3\n```\n")


def test_a_command_that_fails_is_reported(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo so; exit 3\n```\n")
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match="ended with 3:\nso"):
        list(outputs(page, tmp_path / "work"))


# ------------------------------------------------------------------------------------------------------------ the pages


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page, "console")], ids=lambda page: page.name)
def test_consoles_print_what_is_written_there(page, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    differing = [
        f"{console.place}: {command.typed[0]}\n{differs}"
        for console, outcomes in outputs(page, folder)
        for command, now in outcomes
        if (differs := difference(command.printed, now))
    ]
    assert not differing, "\n".join(
        [*differing, "python -m documentation.consoles --update writes what is printed now"]
    )


@pytest.mark.docs
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = ["\n".join(block.lines) for block in blocks(ROOT / "README.md", "python")]
    printed = io.StringIO()
    names: dict = {}
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    assert "17 convolutions converted, 3 shortcuts kept" in printed.getvalue()
    assert Path("resnet18-cosine/conversion.json").is_file()
    assert type(names["model"]).__name__ == "ResNet"
