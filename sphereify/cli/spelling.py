"""References to options inside messages, written as the command line takes them."""

import ast
import shlex
from collections.abc import Mapping
from typing import Any

from sphereify.options import Option


class Spelling:
    """The spelling of the options of one command as they are typed, for `SphereifyError.spelled`.

    >>> spell = Spelling()
    >>> spell("head", "'keep'"), spell("exclude", "['layer1.*', 'fc']")
    ('--head keep', "--exclude 'layer1.*' --exclude fc")
    >>> spell("batch_size"), spell("fsdp", "True")
    ('--batch-size', '--fsdp')
    """

    def __init__(self, flags: Mapping[str, str] | None = None) -> None:
        self.flags = dict(flags or {})
        """Flags that are not made of the name of their option."""
        self.on_by_default: set[str] = set()
        """Options that are on unless --no-… is given."""

    def learn(self, name: str, default: Any, about: Option) -> None:
        """Take in an option of the command."""
        if about.command_line:
            self.flags[name] = about.command_line.partition("/")[0]
        if default is True:
            self.on_by_default.add(name)

    def __call__(self, name: str, value: str | None = None) -> str:
        """An option as the command line takes it, with a value if its repr is given."""
        flag = self.flags.get(name, f"--{name.replace('_', '-')}")
        if value is None:
            return flag
        try:
            meant = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # the repr of an object
            meant = value
        if isinstance(meant, bool):
            return flag if meant else f"--no-{flag[2:]}" if name in self.on_by_default else f"no {flag}"
        if isinstance(meant, Mapping):
            meant = [_override(pattern, setting) for pattern, setting in meant.items()]
        words = meant if isinstance(meant, (list, tuple, set)) else [meant]
        return " ".join(f"{flag} {shlex.quote(str(word))}" for word in words)


def _override(pattern: str, setting: Any) -> str:
    parts = [f"{key}:{value}" for key, value in setting.items()] if isinstance(setting, Mapping) else [str(setting)]
    return f"{pattern}={','.join(parts)}"


_spelling = Spelling()


def use(spelling: Spelling) -> None:
    """Let `command_line` write options as one command takes them: the one that runs in this process."""
    global _spelling
    _spelling = spelling


def command_line(name: str, value: str | None = None) -> str:
    """An option as the command that runs takes it."""
    return _spelling(name, value)
