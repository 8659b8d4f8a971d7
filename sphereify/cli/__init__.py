"""The command line: a command parses, makes one library call and prints.

Whatever needs torch is imported inside the commands, so that `--help` answers at once.
"""

import atexit
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, TextIO

import typer

from sphereify import __version__
from sphereify.cli import convert, doctor, export, predict, push, train
from sphereify.cli.spelling import command_line
from sphereify.errors import Interrupted, SphereifyError, SphereifyWarning
from sphereify.terminal import escape_what_cannot_be_written
from sphereify.torchrun import is_first_process, world_size

app = typer.Typer(
    name="sphereify",
    help="Rewrite a PyTorch network that exists into a hyperspherical one, and train it further.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (convert.convert, convert.inspect, convert.suggest, train.finetune, train.evaluate, train.compare,
                predict.predict, export.export, push.push, doctor.doctor):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line of this process. Exit codes: 0 done, 1 the work failed, 2 wrong use."""
    try:
        _run()
    except SystemExit as end:
        if world_size() > 1:
            _leave(end.code)
        raise


def _run() -> None:
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    escape_what_cannot_be_written()
    shown = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        app(args=arguments, prog_name="sphereify")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        else:
            _print_error(error)
        sys.exit(getattr(error, "exit_code", 1))
    finally:
        warnings.showwarning = shown


def _leave(code: Any) -> None:
    """End a process of torchrun without the end of its interpreter, during which a thread of torch's process group may
    still free the tensors of the last exchange. It would need the interpreter for that, and abort the process."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _print_error(error: Exception) -> None:
    if isinstance(error, Interrupted):
        if is_first_process():
            print(error.spelled(command_line), file=sys.stderr)
    elif isinstance(error, SphereifyError):
        print(f"error: {error.spelled(command_line)}", file=sys.stderr)
    else:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print("This was not foreseen; --debug shows the traceback.", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if isinstance(message, SphereifyWarning):
        print(f"warning: {message.spelled(command_line)}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        print(f"sphereify {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass
