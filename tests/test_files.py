"""Files that are replaced together: all of them, or none."""

import os
from pathlib import Path

import pytest

from sphereify.errors import ArgumentTypeError
from sphereify.files import as_path, remove_partial, replacing_with_companions


def write(path: Path, contents: dict[str, str]) -> None:
    with replacing_with_companions(path, (".data", ".more")) as aside:
        assert aside.name == path.name
        for end, text in contents.items():
            aside.with_name(aside.name + end).write_text(text)


def contents_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_change_together_and_old_companions_go(tmp_path):
    write(tmp_path / "m", {"": "one", ".data": "1", ".more": "2"})
    assert contents_of(tmp_path) == {"m": "one", "m.data": "1", "m.more": "2"}
    (tmp_path / "m.txt").write_text("mine")
    write(tmp_path / "m", {"": "two", ".data": "3"})
    assert contents_of(tmp_path) == {"m": "two", "m.data": "3", "m.txt": "mine"}


@pytest.mark.parametrize("failing", range(5))
def test_a_move_that_fails_takes_back_those_before_it(tmp_path, monkeypatch, failing):
    write(tmp_path / "m", {"": "one", ".data": "1", ".more": "2"})
    before, replace, moves = contents_of(tmp_path), os.replace, []

    def full(start, end):
        moves.append(end)
        if len(moves) == failing + 1:
            raise OSError(28, "No space left on device")
        replace(start, end)

    monkeypatch.setattr("os.replace", full)
    if failing == 4:  # there are four moves
        write(tmp_path / "m", {"": "two", ".data": "3"})
        return
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "m", {"": "two", ".data": "3"})
    assert contents_of(tmp_path) == before


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(IsADirectoryError), replacing_with_companions(tmp_path / "m", (".data",)) as aside:
        aside.parent.write_text("half")
    assert contents_of(tmp_path) == {}


def test_a_file_that_belongs_to_no_other_is_not_replaced(tmp_path):
    (tmp_path / "m.data").write_text("mine")
    with pytest.raises(FileExistsError, match="in the way"):
        write(tmp_path / "m", {"": "one", ".data": "1"})
    assert contents_of(tmp_path) == {"m.data": "mine"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".a.partial").write_text("half")
    (tmp_path / ".b.partial" / "new").mkdir(parents=True)
    (tmp_path / "c").write_text("whole")
    remove_partial(tmp_path)
    assert contents_of(tmp_path) == {"c": "whole"}


@pytest.mark.parametrize("value", [3, None, ["a"]])
def test_what_is_no_path_is_named(value):
    with pytest.raises(ArgumentTypeError, match=f"output: got {type(value).__name__}, expected a path"):
        as_path("output", value)
