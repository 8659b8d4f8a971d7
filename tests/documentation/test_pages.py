"""The pages say what the code says: reasons, messages, keys of files, names."""

import ast
import dataclasses
import importlib
import json
import posixpath
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.structure.files import Files
from torch import nn

from documentation import commands, hooks, message_list, option_tables
from documentation.consoles import blocks, pages
from documentation.messages import HOLE, Message, all_strings, error_messages
from documentation.reasons import reasons, unexplained
from documentation.reference import SECTIONS
from sphereify import save, sphereify
from sphereify.convert.multiplied import Costs
from sphereify.convert.plan import Decision
from sphereify.convert.sites import Call
from sphereify.nn import Magnitude
from sphereify.preparation import Preparation
from sphereify.training import Epoch
from tests.test_package import PUBLIC

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in pages()}


def quoted(page: str) -> list[str]:
    """The code in the first cell of the rows of a page's tables."""
    cells = [line.split(" | ")[0] for line in PAGES[page].splitlines() if line.startswith("| `")]
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


def known(text: str) -> bool:
    """True if the package has a string in which the parts of a text come in this order."""
    return any(in_order(text.split(HOLE), candidate) for candidate in candidates())


@cache
def candidates() -> tuple[str, ...]:
    return (*all_strings(), *(message.text for message in error_messages()))


def in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_the_readme_has_at_most_8_kib_and_is_the_one_home_of_the_verdict():
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 8192
    assert readme.count(b"[start:verdict]") == readme.count(b"[end:verdict]") == 1
    assert '--8<-- "README.md:verdict"' in PAGES["evidence.md"]


# ---------------------------------------------------------------------------------------------------------------- links

LINK = re.compile(r"\]\(([^)\s]+)|(?:href|src|srcset)=\"([^\"]+)\"")
CODE = re.compile(r"^( *)(`{3,}).*?^\1\2$|(`+)(?!`).+?(?<!`)\3(?!`)", re.DOTALL | re.MULTILINE)


def relative_links(page: str, text: str) -> set[str]:
    """The files that a page links to or shows, as seen from docs/, without the links to places and to other sites."""
    targets = {a or b for a, b in LINK.findall(CODE.sub("", text))}
    files = {target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)}
    return {posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) for file in files}


def test_the_relative_links_of_the_site_lead_to_its_files():
    settings = SimpleNamespace(site_dir="", use_directory_urls=False, plugins=SimpleNamespace(_current_plugin=None))
    added = hooks.on_files(Files([]), settings)
    texts = {file.src_uri: file.content_string for file in added if file.src_uri.endswith(".md")}
    pages = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
    texts |= {name: hooks.of_the_site(text) for name, text in pages.items()}
    links = {name: relative_links(name, text) for name, text in texts.items()}
    assert {"images/idea-dark.svg", "results/contrast.png", "examples.md"} <= links["index.md"]
    assert {"tutorial.ipynb", "results/features.png"} <= links["examples.md"]
    files = {*added.src_uris, *(file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*") if file.is_file())}
    assert {name: broken for name, targets in links.items() if (broken := targets - files)} == {}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_relative_links_of_a_page_lead_to_files_of_the_repository(page):
    links = {page.parent / link for link in relative_links("", PAGES[page.name])}
    assert [str(link) for link in links if not link.exists() and link.name not in hooks.GENERATED] == []


# ------------------------------------------------------------------------------------------------ reasons and messages


def test_each_reason_and_note_of_the_planner_is_explained():
    assert len(reasons()) > 60
    assert list(unexplained(PAGES["plans.md"])) == []


def test_a_reason_that_is_not_on_the_page_is_noticed():
    assert list(unexplained(PAGES["plans.md"].replace("`already angular`", ""))) == ["already angular"]


def test_each_reason_that_the_page_explains_is_one_of_the_code():
    explained = [text for text in quoted("plans.md") if " " in text]
    assert len(explained) > 60
    worded = reasons()
    assert [text for text in explained if text not in worded and not known(text)] == []


@pytest.mark.parametrize("plan", sorted((ROOT / "tests" / "data").glob("plan-*.json")), ids=lambda path: path.stem)
def test_the_reasons_of_real_plans_are_explained(plan):
    patterns = [re.compile(".+".join(map(re.escape, text.split(HOLE)))) for text in reasons()]
    for decision in json.loads(plan.read_text())["decisions"]:
        for reason in decision["reason"].split("; "):
            assert any(pattern.fullmatch(reason) for pattern in patterns), reason


def test_each_message_that_troubleshooting_quotes_exists():
    messages = quoted("troubleshooting.md")
    assert len(messages) > 40
    assert [text for text in messages if not known(text)] == []
    assert not known("…: was converted twice by …")


def test_the_list_of_messages_has_those_that_are_raised():
    listed = message_list.page()
    assert "`artifact.py`" in listed
    assert "… was not converted; save takes what sphereify(model) returns" in listed
    with_options = "AngularLoss: sampled_classes needs the features: take a margin head, or as_metric_loss(head)"
    assert with_options in listed  # an option as Python spells it
    errors = [Message(m.text, m.place, 0, m.error) for m in error_messages()]
    assert (
        Message("lr: got …, expected a positive number. Usual: 1e-3.", "calibration/distillation.py", 0, "UsageError")
        in errors
    )


def test_the_table_of_errors_has_each_class_with_its_exit_code():
    table = message_list.classes()
    assert "| `UsageError` | 2 | The request itself is wrong" in table
    assert "| `DataError` | 1 | A data set cannot be read" in table
    assert "<!-- classes of errors -->" in PAGES["troubleshooting.md"]


# --------------------------------------------------------------------------------------------------------------- files


def keys(value) -> set[str]:
    """The keys of nested JSON, without those of dictionaries whose keys are names of tensors, layers or packages."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if not isinstance(value, dict):
        return set()
    named = ("tied", "buffers", "versions", "arguments", "sites")
    inner = {name: part for name, part in value.items() if name not in named}
    return {*value, *keys(list(inner.values()))}


def test_each_key_of_a_saved_artifact_is_described(tmp_path):
    model = sphereify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)))
    save(model, tmp_path, training={"data": "digits", "classes": ["0", "1"], "accuracy": 1.0})
    written = keys(json.loads((tmp_path / "conversion.json").read_text()))
    assert {"format_version", "plan", "decisions", "owns_norm"} <= written
    assert written - set(quoted("artifacts.md")) == set()


@pytest.mark.parametrize("plain", [Decision, Call, Costs, Magnitude, Preparation, Epoch])
def test_each_field_that_a_file_may_hold_is_described(plain):
    assert {field.name for field in dataclasses.fields(plain)} <= set(quoted("artifacts.md"))


# --------------------------------------------------------------------------------------------------------------- names


def test_the_reference_has_each_public_name():
    shown = {(section.module, name) for section in SECTIONS for name in section.shown}
    public = {(module, name) for module, names in PUBLIC.items() for name in names.split()}
    for package in ("sphereify", "sphereify.nn", "sphereify.convert", "sphereify.training"):
        module = importlib.import_module(package)
        public |= {(module.__name__, name) for name in module.__all__}
    assert public - shown == set()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.module)
def test_each_public_name_has_a_docstring(section):
    for name in section.shown:
        text = getattr(importlib.import_module(section.module), name).__doc__ or ""
        assert text.strip(), name
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses make"


def imports(code: str) -> list[tuple[str, str]]:
    """The names of the package that a piece of code imports, with their modules."""
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return [(s.module, alias.name) for s in statements if (s.module or "").startswith("sphereify") for alias in s.names]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_names_that_a_page_imports_are_in_the_reference(page):
    shown = {(section.module, name) for section in SECTIONS for name in section.shown}
    named = [name for block in blocks(page, "python") for name in imports("\n".join(block.lines))]
    assert [name for name in named if name not in shown] == []


def test_the_reference_of_commands_has_each_option_with_its_help():
    page = commands.page()
    assert "## sphereify finetune" in page
    assert "| `--batch-size` | INTEGER | `64` | Images per batch on each device. |" in page
    assert "| `--fold`, `--no-fold` |  | `--fold` | Fold normalizations" in page


def test_the_reference_of_options_has_their_valid_values():
    page = option_tables.page()
    assert "| `rescale` | `auto`, `always`, `never` | `'auto'` |" in page
    assert (
        "| `batch_size` | `int` | `64` | Images per batch on each device. Expected: a number of at least 1. |" in page
    )
