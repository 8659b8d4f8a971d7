"""Tables and lines at the terminal: names are printed as they are, with brackets and colons."""

import pytest
import torch
from rich.console import Console
from torch import nn

from sphereify import plan_conversion
from sphereify.calibration.results import Calibration, LayerFit
from sphereify.tables import print_calibration, print_evaluation, print_plan
from sphereify.terminal import console, say, text_table
from sphereify.training import Evaluation

NAMES = ["dog [small]", "[/b]", "[red]x[/red]", ":dog:", "[link=a]", "\\[x]"]


def printed(show, *args):
    """What is printed to a console of Rich's own, which reads markup and emoji."""
    out = Console(width=120)
    with out.capture() as capture:
        show(out, *args)
    return capture.get()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_printed_by_its_name(name):
    confusion = torch.eye(2, dtype=torch.long)
    assert name in printed(print_evaluation, Evaluation(0.5, 1.0, confusion, 2, 1.0, 0), [name, "c"])


@pytest.mark.parametrize("name", [name for name in NAMES if "." not in name])
def test_a_layer_is_printed_by_its_name_in_tables_notes_and_details(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    plan = plan_conversion(model)
    plan.notes.append(f"note on {name}")
    plan.details.append(f"detail of {name}")
    text = printed(lambda out: print_plan(out, plan, verbose=True))
    assert f"│ {name} " in text
    assert f"note: note on {name}" in text
    assert f"detail of {name}" in text
    assert f"detail of {name}" not in printed(print_plan, plan)
    assert "--verbose" in printed(print_plan, plan)
    fit = LayerFit(name, 0.1, 0.9, 10, 4, f"as {name}")
    assert printed(print_calibration, Calibration({name: fit}, [f"about {name}"])).count(name) == 4


@pytest.mark.parametrize("name", NAMES)
def test_lines_headers_titles_and_captions_are_printed_as_they_are(name):
    assert printed(lambda out: say(out, name)).strip() == name
    table = text_table(f"a header as wide as the table {name}", title=name, caption=name)
    assert printed(lambda out: out.print(table)).count(name) == 3


def test_the_console_of_the_command_line_takes_strings_as_they_are(capsys):
    for name in NAMES:
        console().print(name)
    assert capsys.readouterr().out.splitlines() == NAMES
