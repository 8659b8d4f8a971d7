"""The program as a whole: its help, its version, how errors and warnings are shown, exit codes."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer.main

from documentation.consoles import blocks, pages
from sphereify import __version__, cli
from sphereify.errors import SphereifyWarning, UsageError, option
from tests.cli.words import TINY

ROOT = Path(__file__).parents[2]
PROGRAM = typer.main.get_command(cli.app)
COMMANDS = PROGRAM.commands


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


def commands_of(page: Path) -> list[tuple[str, str]]:
    """The commands that a page names, in a block or in a sentence, with the words behind them."""
    unbroken = page.read_text().replace("\\\n", " ")
    typed = "\n".join(line for block in blocks(page, "sh") for line in block.lines).replace("\\\n", " ")
    pattern = r"{}sphereify ([a-z]+)\b ?([^`\n#]*)"
    return [
        *re.findall(pattern.format(r"(?:\$ |`|-m )"), unbroken),
        *re.findall(pattern.format("^"), typed, re.MULTILINE),
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_each_command_and_option_that_the_documentation_names_exists(page):
    for name, rest in commands_of(page):
        assert name in COMMANDS, (name, rest)
        flags = {flag for parameter in COMMANDS[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<!\w)--[a-z-]+", rest)) <= flags, (name, rest)


def test_the_documentation_names_many_options():
    found = [rest for page in pages() for _, rest in commands_of(page) if "--" in rest]
    assert len(found) > 20


def test_without_a_command_the_help_is_shown(run):
    code, out, err = run()
    assert code == 2
    assert "convert" in out + err


def test_shell_completion_can_be_shown(run, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = run("--show-completion", "bash")
    assert code == 0
    assert "sphereify" in out


# ------------------------------------------------------------------------------------------------- errors and warnings


@pytest.fixture
def instead(monkeypatch):
    """Replace the plan that `inspect` asks for by something that happens."""

    def happen(error: BaseException | None = None, warning: Warning | None = None) -> None:
        def plan(*_, **__):
            if warning is not None:
                warnings.warn(warning, stacklevel=2)
            raise error or SystemExit

        monkeypatch.setattr("sphereify.convert.planner.plan_conversion", plan)

    return happen


def test_what_was_not_foreseen_is_one_line_and_a_hint(run, instead):
    instead(KeyError("an accident"))
    code, out, err = run("inspect", TINY)
    assert (code, out) == (1, "")
    assert err == "error: KeyError: 'an accident'\nThis was not foreseen; --debug shows the traceback.\n"


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(run, instead, where):
    instead(KeyError("an accident"))
    arguments = ["--debug", "inspect", TINY] if where == "before" else ["inspect", TINY, "--debug"]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("KeyError: 'an accident'\n")


def test_debug_keeps_the_exit_code_of_wrong_use(run):
    code, _, err = run("--debug", "inspect", TINY, "--override", "no equals sign")
    assert "Traceback (most recent call last)" in err
    assert "--override: got 'no equals sign'" in err
    assert code == 2


def test_an_error_speaks_of_options_as_the_command_line_spells_them(run, instead):
    instead(
        UsageError(f"{option('skip_shortcuts', True)}: no effect on {option('head', 'keep')} and {option('overrides')}")
    )
    code, _, err = run("inspect", TINY)
    assert (code, err) == (2, "error: --skip-shortcuts: no effect on --head keep and --override\n")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_that_speaks_of_options_so_too(run, instead):
    instead(warning=SphereifyWarning(f"give {option('factory')} next time"))
    _, _, err = run("inspect", TINY)
    assert err == "warning: give --factory next time\n"


@pytest.mark.filterwarnings("default")
def test_a_warning_of_another_package_says_where_it_comes_from(run, instead):
    instead(warning=FutureWarning("not ours"))
    _, _, err = run("inspect", TINY)
    assert re.search(r"convert\.py:\d+: FutureWarning: not ours", err)


def test_an_interrupt_is_no_error(run, instead):
    instead(KeyboardInterrupt())
    code, out, err = run("inspect", TINY)
    assert (code, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["convert", "resnet18", "--radius", "x"], 2)])
def test_one_of_several_processes_ends_without_the_end_of_its_interpreter(arguments, code):
    """A thread of torch's process group may need the interpreter until then."""
    program = f"""
import atexit, sys
from sphereify.cli import main

class Late:
    def __del__(self):
        print("the interpreter ends")

late = Late()
atexit.register(print, "what is to do at the end is done")
sys.argv = ["sphereify", *{arguments}]
main()
"""
    ended = {}
    for world in ("1", "2"):
        environment = {**os.environ, "WORLD_SIZE": world, "RANK": "0"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "what is to do at the end is done" in done.stdout
        ended[world] = "the interpreter ends" in done.stdout
    assert ended == {"1": True, "2": False}
